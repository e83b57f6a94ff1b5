"""NUTS, HMC, ChEES-HMC and MCLMC give one predictive distribution, within their Monte-Carlo errors."""

import functools
import warnings

import numpy as np
import pytest
import torch

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import load
from inference import HMC, MCLMC, NUTS, Backend, ChEESHMC, compile_target
from inference.diagnostics import as_numpy, ess_bulk, mcse_mean, mcse_sd, rhat
from inference.target import Target
from tests.tolerances import z_limit

NUM_POINTS = 100
# The variances of MCLMC are off by 0 to 2 % by design; so may its means be, in standard deviations.
BIAS = {"mclmc": 0.02}

BUDGETS: dict[str, dict[str, Backend]] = {
    "gap": {
        "nuts": NUTS(num_samples=400, warmup_steps=300, num_chains=8, max_tree_depth=8),
        "hmc": HMC(num_samples=600, warmup_steps=300, num_chains=8, max_leapfrogs=200),
        "chees_hmc": ChEESHMC(num_samples=300, warmup_steps=300, num_chains=16, max_leapfrogs=200),
        "mclmc": MCLMC(num_samples=20_000, warmup_steps=3_000, num_chains=8),
    },
    "energy": {
        "nuts": NUTS(num_samples=200, warmup_steps=150, num_chains=4),
        "hmc": HMC(num_samples=300, warmup_steps=150, num_chains=4, trajectory_length=4.0, max_leapfrogs=500),
        "chees_hmc": ChEESHMC(num_samples=150, warmup_steps=200, num_chains=16, max_leapfrogs=300),
        "mclmc": MCLMC(num_samples=20_000, warmup_steps=5_000, num_chains=4),
    },
}
SIZES = {"gap": 20, "energy": 50}


@functools.cache
def target_of(name: str) -> tuple[Target, torch.Tensor]:
    data = load(name)
    model = MLP(
        [data.num_features, SIZES[name], 1],
        activation="tanh",
        prior=priors.Normal(scale="fan_in"),
        likelihood=likelihoods.Normal(0.1),
    )
    points = torch.cat([data.x_test, data.x_train])[:NUM_POINTS]
    return compile_target(model, data.x_train, data.y_train), points


@functools.cache
def figures(name: str, backend: str) -> tuple[np.ndarray, ...]:
    """Predictive mean and standard deviation at the points, and their standard errors."""
    target, points = target_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saturated depths of a short run
        posterior = BUDGETS[name][backend].fit_to(target, seed=1)
    evaluate = torch.func.vmap(lambda theta: target.eta(theta, points)[:, 0])
    flat = torch.cat([evaluate(part) for part in posterior.draws.flatten(0, 1).split(500)])
    values = as_numpy(flat.reshape(*posterior.draws.shape[:2], -1)).astype(np.float64)
    assert np.median(rhat(values)) < 1.05
    assert np.median(ess_bulk(values)) > 200
    pooled = values.reshape(-1, NUM_POINTS)
    return pooled.mean(0), pooled.std(0), mcse_mean(values), mcse_sd(values)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hmc", "chees_hmc", "mclmc"])
@pytest.mark.parametrize("name", list(BUDGETS))
def test_samplers_agree_with_nuts_on_predictive_mean_and_standard_deviation(name: str, backend: str) -> None:
    torch.set_default_dtype(torch.float32)
    mean, sd, mean_error, sd_error = figures(name, "nuts")
    other_mean, other_sd, other_mean_error, other_sd_error = figures(name, backend)
    limit, allowed = z_limit(2 * NUM_POINTS), BIAS.get(backend, 0.0) * sd
    assert (np.abs(other_mean - mean) <= limit * np.hypot(mean_error, other_mean_error) + allowed).all()
    assert (np.abs(other_sd - sd) <= limit * np.hypot(sd_error, other_sd_error) + allowed).all()
    # The comparison means something: errors are small against what is compared.
    assert np.median(limit * np.hypot(sd_error, other_sd_error) / sd) < 0.6
