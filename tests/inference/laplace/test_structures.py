"""Every structure on all weights, the last layer, a pattern of sites and single entries: draws and densities."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

from inference import (
    Backend,
    DenseLaplace,
    DiagonalLaplace,
    FunctionalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LargestVariance,
    LowRankLaplace,
    Subset,
)
from inference.errors import ApproximationWarning
from tests.networks import network
from tests.tolerances import z_limit

QUIET: dict[str, Any] = {"compile": False, "progress": False}
STRUCTURES: dict[str, Backend] = {
    "dense": DenseLaplace(start=None, **QUIET),
    "diagonal": DiagonalLaplace(start=None, **QUIET),
    "kronecker": KroneckerLaplace(start=None, **QUIET),
    "low_rank": LowRankLaplace(start=None, rank=6, **QUIET),
    "functional": FunctionalLaplace(start=None, num_points=4, **QUIET),
}
PARTS: dict[str, Any] = {
    "all": None,
    "last layer": ["w2", "b2"],
    "a pattern": "b*",
    "entries": LargestVariance(15, by=DiagonalLaplace(**QUIET)),
}
NUM = 6000


@functools.cache
def posterior_of(structure: str, part: str) -> GaussianPosterior:
    target, theta = network("by_hand")
    backend = STRUCTURES[structure]
    backend = backend if PARTS[part] is None else Subset(backend, sites=PARTS[part], rest=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # theta is random: not a mode
        found = backend.fit_to(target, init=theta)
    assert isinstance(found, GaussianPosterior)
    return found


everywhere = pytest.mark.parametrize(("structure", "part"), [(s, p) for s in STRUCTURES for p in PARTS])


@everywhere
def test_draws_have_the_stated_mean_and_covariance_within_monte_carlo_error(structure: str, part: str) -> None:
    posterior = posterior_of(structure, part)
    draws, covariance = posterior.sample(NUM, seed=2), posterior.gaussian.covariance()
    variance = covariance.diagonal()
    torch.testing.assert_close(posterior.gaussian.variance, variance)
    z = (draws.mean(0) - posterior.mean_theta) / (variance / NUM).sqrt()
    assert z.abs().max() < z_limit(len(variance))
    spread = torch.outer(variance, variance) + covariance.square()
    z = (draws.T.cov(correction=0) - covariance) / (spread / NUM).sqrt()
    assert z.abs().max() < z_limit(covariance.numel())


@everywhere
def test_the_density_is_that_of_the_stated_covariance(structure: str, part: str) -> None:
    posterior = posterior_of(structure, part)
    twin = torch.distributions.MultivariateNormal(posterior.mean_theta, posterior.gaussian.covariance())
    draws = posterior.sample(5, seed=1)
    torch.testing.assert_close(posterior.log_density(draws), twin.log_prob(draws), rtol=1e-8, atol=1e-8)


@everywhere
def test_a_part_has_no_more_variance_of_the_function_than_all_weights(structure: str, part: str) -> None:
    x = network("by_hand")[0].x
    part_variance = posterior_of("dense", part).predict(x).f_variance
    assert (part_variance <= posterior_of("dense", "all").predict(x).f_variance + 1e-10).all()
    # Whatever a structure leaves out of the curvature, the prior bounds the variance.
    gaussian = posterior_of(structure, part).gaussian
    assert gaussian.dim == posterior_of("dense", part).gaussian.dim
    assert (gaussian.variance <= 4.0 + 1e-9).all()
