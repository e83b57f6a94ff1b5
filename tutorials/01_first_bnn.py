# %% [markdown]
# # A first Bayesian neural network
#
# A network with a prior on every weight, its posterior by NUTS, and a prediction that says how sure it is. The data
# have a gap: an honest model is less sure there, and beyond the data, than where it saw any.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import load
from inference import NUTS

SMOKE_TEST = bool(os.environ.get("SMOKE_TEST"))
torch.set_num_threads(1)

# %% [markdown]
# ## Data
# Two clusters of inputs with nothing in between. `grid` reaches beyond them on both sides.

# %%
data = load("gap")
x, y, grid = data.x_train, data.y_train, data.grid
print(data)

# %% [markdown]
# ## Model
# A Pyro model `model(x, y=None)`: one hidden layer of 50 tanh units, and noise whose standard deviation is learnt. The
# prior says how functions may look before any data: weights of standard deviation 3 into the hidden units let them bend
# within a third of a unit, and 3 / sqrt(50) out of them keeps the sum of the 50 near 3. With 1 in both places the data
# below would be taken for noise around a straight line: try it.

# %%
model = MLP(
    [1, 50, 1],
    activation="tanh",
    prior=priors.Normal(scale={"layers.0.*": 3.0, "layers.1.weight": 3.0 / 50**0.5, "*": 1.0}),
    likelihood=likelihoods.Normal(scale=dist.HalfNormal(1.0)),
)
print(model)

# %% [markdown]
# ## Posterior
# Four chains, advanced together in one process. A warning here is information: it carries the number that caused it.

# %%
steps = 60 if SMOKE_TEST else 500
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    posterior = NUTS(num_samples=steps, warmup_steps=steps, num_chains=4, max_tree_depth=8).fit(model, x, y, seed=0)
for warning in caught:
    print(warning.category.__name__, warning.message)
print(posterior.diagnose(grid))

# %% [markdown]
# ## Prediction
# `mean` and `interval` are of y, noise included; `f_variance` is of the function alone. Their difference is the noise.

# %%
prediction = posterior.predict(grid)
low, high = prediction.interval(0.9)
functions = prediction.component_functions()[:: max(1, prediction.num_components // 15), :]

figure, axis = plt.subplots(figsize=(7, 4))
axis.fill_between(grid[:, 0], low, high, alpha=0.25, label="90 % of y")
axis.plot(grid[:, 0], functions.T, color="0.5", linewidth=0.5)
axis.plot(grid[:, 0], prediction.mean, label="mean")
axis.plot(x[:, 0], y, "k.", markersize=4, label="data")
axis.set(xlabel="x (standardised)", ylabel="y (standardised)", title="NUTS: wide where nothing was seen")
axis.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The claim, checked
# The function is several times less certain in the gap than at the data, and so it is beyond them.

# %%
position, spread = grid[:, 0], prediction.f_variance.sqrt()
edges = x[:, 0].sort().values
left_end, right_start = edges[len(edges) // 2 - 1], edges[len(edges) // 2]
at_data = posterior.predict(x).f_variance.sqrt().mean()
in_gap = spread[(position > left_end) & (position < right_start)].mean()
outside = spread[(position < edges[0]) | (position > edges[-1])].mean()
print(f"standard deviation of f: {at_data:.3f} at the data, {in_gap:.3f} in the gap, {outside:.3f} outside")
assert in_gap > 3 * at_data
assert outside > 3 * at_data

# %% [markdown]
# ## Where to go next
# `posterior.to_arviz()` opens all of ArviZ; `posterior.save("run/")` keeps it; the next tutorial swaps NUTS for seven
# other approximations by changing one word.
