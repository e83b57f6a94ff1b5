"""NUTS as the reference on UCI data: ten minutes of four chains each, so only in the slow stage."""

import warnings
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.data import load
from inference import MAP, NUTS

SHORT: dict[str, Any] = {"max_tree_depth": 9}
STIFF: dict[str, Any] = {"max_tree_depth": 12, "mass_matrix": "low_rank", "num_workers": 2}
# Reached on two shared cores: share of test inputs with R-hat < 1.1, and test NLL against MAP's, in original units:
# concrete 103 of 103 (3.06 against 3.35), energy 75 of 77 (0.32 against 0.56), yacht 29 of 31 (-0.43 against 1.33),
# again with trajectories in C++ (23 million gradients, R-hat of the two other inputs 1.102 and 1.172).
SETTINGS = {"concrete": SHORT, "energy": SHORT, "yacht": STIFF}
MIXES = {"concrete": True, "energy": True, "yacht": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_ten_minutes_of_nuts_beat_map_and_mix_or_say_that_they_do_not(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    data = load(name)
    model = MLP(
        [data.num_features, 50, 1],
        activation="tanh",
        prior=priors.Normal(scale="fan_in"),
        likelihood=likelihoods.Normal(scale=dist.HalfNormal(1.0)),
    )
    mode = MAP().fit(model, data.x_train, data.y_train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stopped by its time limit, and at its greatest depth: both are meant
        sampler = NUTS(num_samples=6000, warmup_steps=300, num_chains=4, max_seconds=560, **SETTINGS[name])
        posterior = sampler.fit(model, data.x_train, data.y_train, seed=0)
    gain = posterior.predict(data.x_test).log_prob(data.y_test) - mode.predict(data.x_test).log_prob(data.y_test)
    assert float(gain.mean()) > 0.1
    found = posterior.diagnose(data.x_test)
    mixed = float(np.mean(found.rhat_functions < 1.1)) >= 0.95
    assert mixed or not MIXES[name]
    # Where chains disagree the diagnosis, and so the report, says so.
    assert mixed or any("the chains disagree" in text for text in found.warnings)
