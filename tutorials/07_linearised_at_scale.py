# %% [markdown]
# # Error bars for a network that is too large for a covariance
#
# The Laplace approximation needs the inverse of a P x P matrix. Dense, it fits up to some thousand weights; a Kronecker
# factorisation goes further and neglects the covariance between layers. `SampledLaplace` keeps all of the covariance
# and forms none of it: it *draws* from the posterior of the linearised network, each draw the solution of one
# least-squares problem. Error bars, and which prior the data prefer, come from a handful of draws.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch

from bnn_models import MLP, likelihoods, priors
from inference import MAP, ApproximationWarning, DenseLaplace, KroneckerLaplace, SampledLaplace, Subset

SMOKE_TEST = bool(os.environ.get("SMOKE_TEST"))
torch.set_num_threads(1)
warnings.simplefilter("ignore", ApproximationWarning)  # training stops short of the mode, as it does for large networks

# %% [markdown]
# ## Data and network
# A sine, seen on both sides of a gap, with noise of known size; networks with two hidden layers of tanh units.

# %%
generator = torch.Generator().manual_seed(0)
x = torch.cat([torch.rand(60, 1, generator=generator) - 2, torch.rand(60, 1, generator=generator) + 1])
y = (2 * x[:, 0]).sin() + 0.1 * torch.randn(len(x), generator=generator)
grid = torch.linspace(-3, 3, 121)[:, None]
truth = (2 * grid[:, 0]).sin()
gap, outside = grid[:, 0].abs() < 0.7, grid[:, 0].abs() > 2.5
SMALL, LARGE = 20 if SMOKE_TEST else 40, 40 if SMOKE_TEST else 300


def network(width, scale="fan_in"):
    """1-width-width-1; the noise is known."""
    return MLP([1, width, width, 1], prior=priors.Normal(scale=scale), likelihood=likelihoods.Normal(scale=0.1))


def trained(width):
    """A network fitted by Adam, as one might have it already."""
    steps = 200 if SMOKE_TEST else 1500
    return MAP(num_steps=steps, step_size=3e-3, polish=False).fit(network(width), x, y, seed=0)


# %% [markdown]
# ## A small network first, where the truth can be had
# With 1,761 weights the dense covariance is exact for the linearised network. 64 draws, each used with both signs, give
# variances with an error of sqrt(2 / 64) = 18 %, the same at any size. Kronecker and last-layer Laplace have no such
# noise, but an error of their own that no amount of work removes.

# %%
start = trained(SMALL)
already = {"start": None}  # the trained network is the mode
posteriors = {
    "dense": DenseLaplace(newton_steps=0, **already).fit(network(SMALL), x, y, init=start),
    "sampled": SampledLaplace(num_samples=64, **already).fit(network(SMALL), x, y, init=start),
    "Kronecker": KroneckerLaplace(newton_steps=0, **already).fit(network(SMALL), x, y, init=start),
    "last layer": Subset(DenseLaplace(**already), sites="layers.2.*", rest=None).fit(network(SMALL), x, y, init=start),
}
spreads = {name: posterior.predict(grid).f_variance.sqrt() for name, posterior in posteriors.items()}
errors = {name: float((s / spreads["dense"]).log().abs().mean()) for name, s in spreads.items()}
for name, error in errors.items():
    print(f"{name:>10}: standard deviations off by a factor of {2.718**error:.2f} on average")

figure, axis = plt.subplots(figsize=(7, 3.5))
for name, spread in spreads.items():
    axis.plot(grid[:, 0], spread, label=name, linewidth=3 if name == "dense" else 1.5)
axis.plot(x[:, 0], torch.zeros(len(x)), "k|", label="data")
axis.set(xlabel="x", ylabel="standard deviation of f", title=f"{start.target.dim:,} weights")
axis.legend(loc="upper right")
figure.tight_layout()
plt.show()

assert errors["sampled"] < errors["Kronecker"]
assert errors["sampled"] < errors["last layer"]

# %% [markdown]
# ## A network whose covariance does not fit
# 91,201 weights. The dense form says so before it starts; 16 draws take seconds, and memory for a few sets of 16
# vectors.

# %%
start = trained(LARGE)
try:
    DenseLaplace(**already).fit(network(1_000), x, y, init=None)
except ValueError as error:
    print(f"refused: {error}\n")
    refused = str(error)
declared = SampledLaplace(**already).fit(network(LARGE), x, y, init=start)
info = declared.info
print(
    f"{declared.target.dim:,} weights: {info.seconds:.0f} s, {info.extra['solver_steps']} steps of conjugate gradients,"
)
print(f"{info.peak_bytes / 1e6:,.0f} MB at most; a covariance would take {4e-9 * declared.target.dim**2:,.1f} GB")
assert "GB" in refused

# %% [markdown]
# ## Which prior?
# In a few rounds of expectation-maximisation the draws also say how many parameters the data determine, and from that
# which prior precision explains them best. Here one factor for all weights; `groups="site"` gives each tensor its own.

# %%
learnt = SampledLaplace(em_rounds=3 if SMOKE_TEST else 8, groups="all", **already).fit(network(LARGE), x, y, init=start)
for number, record in enumerate(learnt.info.extra["em_history"], start=1):
    print(f"round {number}: precision {record['precision']['all']:.3g} (geometric mean)")
effective = learnt.info.extra["effective_parameters"]["all"]
print(f"{effective:.1f} parameters are determined by the data, of {learnt.target.dim:,}")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for axis, posterior, title in zip(axes, (declared, learnt), ("prior as declared", "prior learnt"), strict=True):
    prediction = posterior.predict(grid)
    mean, spread = prediction.f_mean, prediction.f_variance.sqrt()
    axis.fill_between(grid[:, 0], mean - 2 * spread, mean + 2 * spread, alpha=0.25)
    axis.plot(grid[:, 0], prediction.component_functions()[::4].T, color="0.5", linewidth=0.5)
    axis.plot(grid[:, 0], mean, label="network")
    axis.plot(grid[:, 0], truth, "k--", linewidth=1, label="truth")
    axis.plot(x[:, 0], y, "k.", markersize=3)
    axis.set(xlabel="x", title=title, ylim=(-4, 4))
axes[0].set_ylabel("y")
axes[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The claims, checked
# Less sure in the gap than at the data, with either prior; and the learnt prior is wide enough to hold the truth where
# there are no data, which the declared one is not.


# %%
def misses(posterior):
    """Largest error outside the data, in standard deviations of f."""
    prediction = posterior.predict(grid)
    return float(((prediction.f_mean - truth) / prediction.f_variance.sqrt())[outside].abs().max())


for posterior in (declared, learnt):
    spread = posterior.predict(grid).f_variance.sqrt()
    assert spread[gap].mean() > 3 * posterior.predict(x).f_variance.sqrt().mean()
print(f"outside the data the network is off by up to {misses(declared):.1f} standard deviations of f; ", end="")
print(f"with the learnt prior {misses(learnt):.1f}")
assert misses(learnt) < misses(declared)

# %% [markdown]
# ## What to take from it
# `posterior.prior_scales()` gives the learnt prior back, to be declared in a new model. With `batch_size` (or a
# DataLoader) stochastic descent takes the place of conjugate gradients, for data that are too many for a pass per step.
# And the network's own mean is never touched: these are error bars for the network that you have.
