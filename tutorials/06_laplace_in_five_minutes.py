# %% [markdown]
# # Laplace in five minutes
#
# You have a trained network, a plain `nn.Module`, and want to know how sure it is. A Laplace approximation takes the
# weights as they are, measures how sharply the loss bends around them, and turns that into error bars. Nothing is
# trained again, and the predictions stay those of your network. First a regression with bands, then three classes with
# calibrated probabilities.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn

from bnn_models import bayesianize, likelihoods, priors
from bnn_zoo.data import load
from inference import KroneckerLaplace
from inference.calibration import calibration_bins, ece
from inference.scoring import accuracy

SMOKE_TEST = bool(os.environ.get("SMOKE_TEST"))
torch.set_num_threads(1)


def train(net, x, y, loss, weight_decay, steps):
    """Full-batch Adam on the mean loss; `weight_decay` is the precision of a Gaussian prior on the weights."""
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        penalty = sum(p.square().sum() for p in net.parameters()) * weight_decay / (2 * len(x))
        optimiser.zero_grad()
        (loss(net(x), y) + penalty).backward()
        optimiser.step()
        schedule.step()
    return net


# %% [markdown]
# ## A trained network
# One hidden layer, mean squared error, weight decay: the loop you have already. A squared error divided by twice the
# noise variance is a Gaussian likelihood, and weight decay is a Gaussian prior, so this is a maximum a posteriori fit
# without having said so.

# %%
data = load("gap")
x, y, grid = data.x_train, data.y_train[:, None], data.grid
noise, decay = 0.3, 1.0
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
train(net, x, y, lambda f, t: (f - t).square().mean() / (2 * noise**2), decay, 2000)
print(f"residuals: {(net(x) - y).std():.3f}, noise assumed: {noise}")

# %% [markdown]
# ## Error bars in five lines
# `bayesianize` declares what the training loop implied; the network itself is not touched. `start=None` takes the
# weights given as the mode. How far they are from one is measured: a decrement that is large beside the number of
# weights is warned of, and then `KroneckerLaplace()` without `start=None` goes the rest of the way by itself.

# %%
model = bayesianize(net, prior=priors.Normal(decay**-0.5), likelihood=likelihoods.Normal(noise))
posterior = KroneckerLaplace(start=None).fit(model, x, y[:, 0], init=net.state_dict())
prediction = posterior.predict(grid)
low, high = prediction.interval(0.9)
function_spread = prediction.f_variance.sqrt()

# %%
decrement = posterior.info.extra["newton_decrement"]
print(f"fitted in {posterior.info.seconds:.2f} s; Newton decrement {decrement:.3f} of {posterior.target.dim} weights")
figure, axis = plt.subplots(figsize=(7, 4))
position = grid[:, 0]
axis.fill_between(position, low, high, alpha=0.2, label="90 % of y")
band = (prediction.mean - 1.645 * function_spread, prediction.mean + 1.645 * function_spread)
axis.fill_between(position, *band, alpha=0.4, label="90 % of the function")
axis.plot(position, prediction.mean, label="the network, as it was")
axis.plot(x[:, 0], y, "k.", markersize=4, label="data")
axis.set(xlabel="x (standardised)", ylabel="y (standardised)", xlim=(-2, 2), ylim=(-6, 9))
axis.set_title("KroneckerLaplace of a trained network")
axis.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# The mean is the network's own output, and the bars are wide where there were no data.

# %%
edges = x[:, 0].sort().values
left_end, right_start = edges[len(edges) // 2 - 1], edges[len(edges) // 2]
at_data = posterior.predict(x).f_variance.sqrt().mean()
in_gap = function_spread[(position > left_end) & (position < right_start)].mean()
outside = function_spread[(position < edges[0]) | (position > edges[-1])].mean()
print(f"standard deviation of f: {at_data:.3f} at the data, {in_gap:.3f} in the gap, {outside:.3f} outside")
assert torch.allclose(prediction.mean, net(grid)[:, 0].detach(), atol=1e-5)
assert in_gap > 1.3 * at_data
assert outside > 2 * at_data

# %% [markdown]
# ## Classes: is 90 % sure right nine times in ten?
# 600 red wines by their judges' score, up to 5, 6, 7 and more, and 999 others to test on. A network this size learns
# the 600 nearly by heart and is then far too sure of new wines.

# %%
wine = load("wine")
inputs, score = torch.cat([wine.x_train, wine.x_test]), torch.cat([wine.y_train, wine.y_test])
score = (score * wine.y_std + wine.y_mean).round()
classes = (score >= 6).long() + (score >= 7).long()
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
x, labels = inputs[order[:600]], classes[order[:600]]
x_test, test_labels = inputs[order[600:]], classes[order[600:]]
hidden, steps, decay = (20, 300, 0.1) if SMOKE_TEST else (50, 3000, 0.1)
torch.manual_seed(0)
classifier = nn.Sequential(nn.Linear(11, hidden), nn.Tanh(), nn.Linear(hidden, 3))
train(classifier, x, labels, nn.functional.cross_entropy, decay, steps)

model = bayesianize(classifier, prior=priors.Normal(decay**-0.5), likelihood=likelihoods.Categorical())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    posterior = KroneckerLaplace(start=None).fit(model, x, labels, init=classifier.state_dict())
for warning in caught:
    print(warning.category.__name__, warning.message)

# %% [markdown]
# ## Four ways to average probabilities
# The logits are Gaussian, their softmax is not. `link="monte_carlo"` averages the softmax of draws. `"probit"` divides
# each logit by its own spread first: a formula, no draws, and close to the average. `"laplace_bridge"` turns the
# Gaussian into a Dirichlet: also a formula, with entropies and variances of the probabilities. But its mean follows
# another rule, and where logits are as uncertain as here it is nearly as sure as the network alone.
# `"laplace_bridge_norm"` measures the logits in units of their spread first: that repairs the mean of wide outputs like
# these, and would make narrow ones surer than the network alone.

# %%
predictions = {"network alone": classifier(x_test).softmax(-1).detach()}
for link in ("monte_carlo", "probit", "laplace_bridge", "laplace_bridge_norm"):
    predictions[link] = posterior.predict(x_test, link=link).probs
rows = torch.arange(len(test_labels))
table = {}
print(f"{'':19s} {'accuracy':>9s} {'NLL':>7s} {'ECE':>7s} {'confidence':>11s}")
for name, probs in predictions.items():
    nll = float(-probs[rows, test_labels].log().mean())
    table[name] = (accuracy(probs, test_labels), nll, ece(probs, test_labels), float(probs.max(-1).values.mean()))
    print(f"{name:19s} {table[name][0]:9.3f} {nll:7.3f} {table[name][2]:7.3f} {table[name][3]:11.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
axes[0].plot([0.3, 1], [0.3, 1], "k:", linewidth=1)
for name, probs in predictions.items():
    bins = calibration_bins(probs, test_labels, num_bins=8)
    axes[0].plot(bins.confidence, bins.accuracy, "o-", markersize=4, label=name)
axes[0].set(xlabel="confidence", ylabel="accuracy", title="Calibration on held-out wines")
axes[0].legend()
for name in ("probit", "laplace_bridge", "laplace_bridge_norm"):
    axes[1].plot(predictions["monte_carlo"].flatten(), predictions[name].flatten(), ".", markersize=4, label=name)
axes[1].plot([0, 1], [0, 1], "k:", linewidth=1)
axes[1].set(xlabel="Monte Carlo", ylabel="closed form", title="Probabilities of all classes")
axes[1].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The claims, checked

# %%
gaps = {name: float((predictions[name] - predictions["monte_carlo"]).abs().mean()) for name in predictions}
print("mean distance to Monte Carlo:", {name: round(gap, 3) for name, gap in gaps.items()})
assert gaps["probit"] < 0.08
assert gaps["probit"] < gaps["laplace_bridge"]
if not SMOKE_TEST:
    for name in ("monte_carlo", "probit", "laplace_bridge_norm"):
        assert table[name][1] < table["network alone"][1] / 2, name
        assert table[name][2] < table["network alone"][2] / 2, name

# %% [markdown]
# ## Where to go next
# `DenseLaplace()` where there are few weights, `Subset(DenseLaplace(), sites="2.*")` for the last layer alone,
# `Subset(DenseLaplace(), sites=LargestVariance(100, by=DiagonalLaplace()))` for the 100 weights that matter most. The
# noise and the weight decay were taken as given here; the evidence can choose them, as another tutorial shows.
