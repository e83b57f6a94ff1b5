# %% [markdown]
# # Inspecting chains with ArviZ
#
# Six plots (trace, rank, energy, pair, autocorrelation, growth of the effective sample size), each on weights and on
# functions, first for chains that are fine and then for three that are not: one stuck in another mode, one with too
# large a step, one without warm-up. The lesson to take home: a network's weights have symmetries, so R-hat of the
# weights is large when nothing is wrong; R-hat of the functions is the one to believe, at inputs that matter.

# %%
import math
import os
import warnings

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import load
from inference import HMC, NUTS
from inference.diagnostics import bfmi, ess_bulk, rhat

SMOKE_TEST = bool(os.environ.get("SMOKE_TEST"))
torch.set_num_threads(1)
warnings.simplefilter("ignore")
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9})

# %% [markdown]
# ## A model whose modes are known
# One hidden unit with a sine, f(x) = v sin(w x + b) + c, and eleven inputs one apart. Two other sets of weights fit as
# well as the true one:
#
# - the mirror image (-w, -b, -v, c), which is *the same function*;
# - the alias w + 2 pi, which agrees with it at every integer, so at the data, and is *another function* in between.
#
# Four numbers make plots that can be read; a network of five units follows at the end.

# %%
x = torch.arange(-5.0, 6.0)[:, None]
noise = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
y = torch.sin(0.7 * x[:, 0] + 0.3) + 0.1 * noise
probes = torch.tensor([[-3.0], [-1.25], [0.5], [2.0]])
wave = MLP([1, 1, 1], activation="sin", prior=priors.Normal(3.0), likelihood=likelihoods.Normal(0.1))

TRUE, MIRROR = [0.7, 0.3, 1.0, 0.0], [-0.7, -0.3, -1.0, 0.0]
ALIAS = [0.7 + 2 * math.pi, 0.3, 1.0, 0.0]
NAMES = {"layers.0.weight": "w", "layers.0.bias": "b", "layers.1.weight": "v", "layers.1.bias": "c"}
num_draws = 150 if SMOKE_TEST else 500
sampler = NUTS(num_samples=num_draws, warmup_steps=num_draws // 2, num_chains=4)

good = sampler.fit(wave, x, y, seed=0, init=torch.tensor([TRUE, TRUE, TRUE, MIRROR]))

# %% [markdown]
# ## Two views of one posterior
# `to_arviz` gives the weights, with the sampler's own statistics. The functions at inputs of our choice come from
# `predict`: its components are the draws, chain after chain.


# %%
def weights(posterior):
    """The weights, one letter each."""
    found = posterior.to_arviz()
    short = found.posterior.squeeze([d for d in found.posterior.dims if "_dim_" in d], drop=True).rename(NAMES)
    return az.InferenceData(posterior=short, sample_stats=found.sample_stats)


def functions(posterior, inputs):
    """f at some inputs, chain by chain."""
    num_chains, num_kept, _ = posterior.draws.shape
    values = posterior.predict(inputs).component_functions().reshape(num_chains, num_kept, len(inputs))
    coords = {"x": inputs[:, 0].numpy()}
    return az.from_dict({"f": values.numpy()}, coords=coords, dims={"f": ["x"]})


def figures(posterior, inputs):
    """Largest R-hat and smallest bulk ESS, of weights and of functions."""
    f = functions(posterior, inputs).posterior["f"].to_numpy()
    return {
        "rhat of weights": float(rhat(posterior.draws).max()),
        "rhat of functions": float(rhat(f).max()),
        "ess of functions": float(ess_bulk(f).min()),
    }


def finish(title):
    """Title and layout of the figure ArviZ just made."""
    figure = plt.gcf()
    for axis in figure.axes:
        axis.title.set_fontsize(9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    plt.show()


view, f_view = weights(good), functions(good, probes)
print(az.summary(view, kind="diagnostics"), az.summary(f_view, kind="diagnostics"), sep="\n\n")

# %% [markdown]
# ## 1. Trace
# Left the marginal of each chain, right its path. A good path is a hairy caterpillar: no trend, no pauses, and all
# chains over each other. In w, b and v the fourth chain is somewhere else: it is the mirror image, so nothing is wrong,
# and the functions show it: all four chains lie over each other there.

# %%
az.plot_trace(view, compact=False, figsize=(9, 6.5))
finish("Trace of the weights: chain 3 is the mirror image")
az.plot_trace(f_view, compact=False, figsize=(9, 6.5))
finish("Trace of f at four inputs: the same chains agree")

# %% [markdown]
# ## 2. Rank
# Every draw's rank among the draws of all chains, as a histogram per chain. If the chains sample the same distribution
# the bars are level. Two chains at opposite ends (w, v) have parted; a slope says that one chain's values are larger; a
# heap at both ends that its spread is larger.

# %%
az.plot_rank(view, var_names=["w", "v"], figsize=(9, 3.2))
finish("Ranks of the weights: chain 3 is apart")
az.plot_rank(f_view, coords={"x": probes[1:3, 0].numpy()}, figsize=(9, 3.2))
finish("Ranks of f: level")

# %% [markdown]
# ## 3. Energy
# The distribution of the energy, and of its change from one draw to the next. If the second is much narrower the
# momentum cannot carry the chain across the energies, and the tails are seen too rarely; the figure for it is BFMI,
# with alarm below 0.3. There is one energy per draw, so weights and functions share this plot.

# %%
az.plot_energy(view, figsize=(6, 3.2))
finish("Energy and its change: of the same width")
print("BFMI of each chain:", bfmi(good.sample_stats["energy"]).round(2))

# %% [markdown]
# ## 4. Pair
# Two quantities against each other. In weights: two islands, the mirror images. In functions: one island, whose tilt
# says how f at one input goes with f at another.

# %%
az.plot_pair(
    view, var_names=["w", "b", "v"], divergences=True, scatter_kwargs={"s": 5, "alpha": 0.5}, textsize=9, figsize=(7, 5)
)
finish("Weights: two islands, one function")
az.plot_pair(
    f_view, coords={"x": probes[:3, 0].numpy()}, scatter_kwargs={"s": 5, "alpha": 0.5}, textsize=9, figsize=(7, 5)
)
finish("f at three inputs: one island")

# %% [markdown]
# ## 5. Autocorrelation
# How long a chain remembers; within the band it is noise. It is computed within each chain, so the islands do not show
# here: a chain that never leaves its own looks perfect.

# %%
az.plot_autocorr(view, var_names=["w", "c"], max_lag=30, textsize=9, figsize=(10, 4))
finish("Autocorrelation of the weights")
az.plot_autocorr(f_view, coords={"x": probes[1:3, 0].numpy()}, max_lag=30, textsize=9, figsize=(10, 4))
finish("Autocorrelation of f")

# %% [markdown]
# ## 6. Growth of the effective sample size
# It has to grow in proportion to the draws. For w it stays at about 7 however many draws there are, because no chain
# ever moves from one island to the other. For f it grows.

# %%
az.plot_ess(view, kind="evolution", var_names=["w", "c"], textsize=9, figsize=(9, 3.4))
finish("ESS of the weights: w stays at a handful, c grows")
az.plot_ess(f_view, kind="evolution", coords={"x": probes[1:3, 0].numpy()}, textsize=9, figsize=(9, 3.4))
finish("ESS of f: in proportion to the draws")

# %% [markdown]
# ## What a bad chain looks like
# - **Stuck in another mode**: the fourth chain starts at the alias, and stays there.
# - **Too large a step**: 98 % of the proposals are refused; the path is a staircase. The edge is sharp: at 0.02 this
#   sampler accepts 60 %, at 0.03 next to nothing, because leapfrog is unstable above a limit that the narrowest
#   direction of the posterior sets.
# - **No warm-up**: chains that started apart are still on their way.

# %%
fixed = {"num_samples": num_draws, "warmup_steps": 0, "adapt_step_size": False, "mass_matrix": "identity"}
apart = torch.tensor([[0.8, 0.8, 1.3, 0.3], [0.6, -0.2, 0.7, -0.3], [0.75, 0.0, 1.3, -0.3], [0.65, 0.6, 0.7, 0.3]])
bad = {
    "another mode": sampler.fit(wave, x, y, seed=0, init=torch.tensor([TRUE, TRUE, TRUE, ALIAS])),
    "too large a step": HMC(step_size=0.03, num_leapfrogs=3, **fixed).fit(wave, x, y, seed=0, init=good),
    "no warm-up": HMC(step_size=0.0005, num_leapfrogs=5, **fixed).fit(wave, x, y, seed=0, init=apart),
}
table = {name: figures(posterior, probes) for name, posterior in {"good": good, **bad}.items()}
print(f"{'':18s}" + "".join(f"{name:>20s}" for name in table["good"]) + f"{'acceptance':>13s}")
for name, row in table.items():
    accepted = float({"good": good, **bad}[name].sample_stats["acceptance_rate"].mean())
    print(f"{name:18s}" + "".join(f"{value:20.2f}" for value in row.values()) + f"{accepted:13.2f}")

# %%
between = probes[1:2]
figure, axes = plt.subplots(2, 4, figsize=(13, 5))
for column, (name, posterior) in enumerate({"good": good, **bad}.items()):
    f = functions(posterior, between)
    for chain in f.posterior.chain:
        axes[0, column].plot(f.posterior["f"].sel(chain=chain)[:, 0], linewidth=0.7)
    axes[0, column].set(title=f"{name}: trace", xlabel="draw")
    az.plot_autocorr(f.sel(chain=[0]), max_lag=50, textsize=9, ax=axes[1, column])
    axes[1, column].set(title=f"{name}: autocorrelation of chain 0", xlabel="lag")
axes[0, 0].set_ylabel("f(-1.25)")
figure.suptitle("One input between the data, four runs")
figure.tight_layout()
plt.show()

# %%
figure, axes = plt.subplots(2, 4, figsize=(13, 5))
for column, (name, posterior) in enumerate({"good": good, **bad}.items()):
    f = functions(posterior, between)
    az.plot_rank(f, ax=axes[0, column], labels=False)
    az.plot_ess(f, kind="evolution", ax=axes[1, column], textsize=8)
    axes[0, column].set(title=f"{name}: ranks", xlabel="rank")
    axes[1, column].set(title=f"{name}: ESS", xlabel="draws")
figure.suptitle("The same runs: ranks of each chain, and growth of the effective sample size")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Where to look matters
# The alias agrees with the truth at every training input. Diagnosed there (which is what `diagnose()` does without
# inputs of its own) the stuck chain is invisible: give it inputs at which you will predict.

# %%
at_data = figures(bad["another mode"], x)["rhat of functions"]
elsewhere = table["another mode"]["rhat of functions"]
print(f"stuck chain, largest R-hat of f: {at_data:.2f} at the training inputs, {elsewhere:.2f} between them")

line = torch.linspace(-5, 5, 201)[:, None]
figure, axis = plt.subplots(figsize=(9, 3.2))
stuck = functions(bad["another mode"], line).posterior["f"].mean("draw")
axis.plot(line[:, 0], stuck.sel(chain=3), label="chain 3, the alias", linewidth=0.8)
axis.plot(line[:, 0], stuck.sel(chain=0), label="chain 0")
axis.plot(x[:, 0], y, "k.", label="data")
axis.set(xlabel="x", ylabel="f", title="Two modes that the data cannot tell apart")
axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
figure.tight_layout()
plt.show()

# %% [markdown]
# ## An ordinary network
# Five tanh units on the data with a gap, chains from random starts. Each chain numbers its units in its own way and
# gives them its own signs, 5! x 2^5 = 3840 mirror images, so R-hat of the weights is far above 1.1, and that of the
# functions is not.

# %%
data = load("gap")
net = MLP([1, 5, 1], prior=priors.Normal(scale="fan_in"), likelihood=likelihoods.Normal(scale=dist.HalfNormal(1.0)))
steps = 100 if SMOKE_TEST else 300
posterior = NUTS(num_samples=steps, warmup_steps=steps, num_chains=4, max_tree_depth=7).fit(
    net, data.x_train, data.y_train, seed=0
)
of_weights = rhat(posterior.draws)
of_functions = rhat(functions(posterior, data.grid).posterior["f"].to_numpy())
print(f"median R-hat: {np.median(of_weights):.2f} of {len(of_weights)} weights, {np.median(of_functions):.3f} of f")

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, values, name in ((axes[0], of_weights, "weights"), (axes[1], of_functions, "f on the grid")):
    axis.hist(values, bins=20)
    axis.axvline(1.1, color="k", linestyle=":")
    axis.set(title=f"R-hat of {name}", xlabel="R-hat (dotted: 1.1)")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The claims, checked

# %%
assert table["good"]["rhat of weights"] > 1.3  # the mirror image...
assert table["good"]["rhat of functions"] < 1.1  # ...is harmless
assert table["another mode"]["rhat of functions"] > 1.3  # the alias: not
assert at_data < 1.1 < elsewhere  # and invisible at the training inputs
for name in ("too large a step", "no warm-up"):
    assert table[name]["rhat of functions"] > 1.1, name
    assert table[name]["ess of functions"] < 0.2 * table["good"]["ess of functions"], name
assert float(bad["too large a step"].sample_stats["acceptance_rate"].mean()) < 0.2
assert np.median(of_weights) > 1.1 > np.median(of_functions)

# %% [markdown]
# ## In short
# Look at functions before weights, at inputs where predictions are wanted, and start chains apart: chains that all
# start in one mode cannot report another. Run longer before reading anything into a single plot.
