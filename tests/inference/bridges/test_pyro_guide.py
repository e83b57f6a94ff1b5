import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor

from inference.bridges import PyroGuideVI
from inference.errors import CapabilityError, NonFiniteError
from inference.point import MAP, Subset
from tests.conjugate import linear_regression

PROBLEM = linear_regression()


def fit(guide: Any, num_steps: int = 400, **fields: Any) -> Any:
    backend = PyroGuideVI(guide, num_steps=num_steps, num_samples=400, progress=False, **{"step_size": 0.03, **fields})
    return backend.fit(PROBLEM.model, PROBLEM.x, PROBLEM.y)


@pytest.mark.parametrize(
    "guide", ["AutoMultivariateNormal", "AutoNormal", "AutoDiagonalNormal", "AutoLowRankMultivariateNormal"]
)
def test_gaussian_guides_find_the_mean_and_their_own_variance(guide: str) -> None:
    posterior = fit(guide, num_steps=500, num_particles=4)
    draws = posterior.flat_draws
    scale = PROBLEM.covariance.diag().sqrt()
    torch.testing.assert_close((draws.mean(0) - PROBLEM.mean) / scale, torch.zeros(3), rtol=0, atol=0.35)
    independent = guide in ("AutoNormal", "AutoDiagonalNormal")
    variance = 1 / PROBLEM.precision.diag() if independent else PROBLEM.covariance.diag()
    torch.testing.assert_close(draws.var(0) / variance, torch.ones(3), rtol=0, atol=0.45)
    assert posterior.log_evidence < PROBLEM.log_evidence + 0.1
    if not independent:
        assert posterior.log_evidence == pytest.approx(PROBLEM.log_evidence, abs=0.15)


def test_a_point_guide_finds_the_mode_and_claims_no_evidence() -> None:
    posterior = fit("AutoDelta", num_steps=600)
    torch.testing.assert_close(posterior.flat_draws, PROBLEM.mode.expand(400, 3), rtol=0, atol=1e-2)
    with pytest.raises(CapabilityError, match="gives no log evidence"):
        _ = posterior.log_evidence


def test_a_flow_guide_runs() -> None:
    posterior = fit("AutoIAFNormal", num_steps=50)
    assert posterior.draws.shape == (1, 400, 3)
    assert posterior.flat_draws.unique(dim=0).shape[0] == 400
    assert posterior.log_evidence < PROBLEM.log_evidence + 0.1


def own_guide(model: Callable[..., Any]) -> Callable[..., Any]:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return guide


def test_a_hand_written_guide_is_used() -> None:
    draws = fit(own_guide, num_steps=600, num_particles=4).flat_draws
    scale = PROBLEM.precision.diag().rsqrt()
    torch.testing.assert_close((draws.mean(0) - PROBLEM.mean) / scale, torch.zeros(3), rtol=0, atol=0.4)
    torch.testing.assert_close(draws.std(0) / scale, torch.ones(3), rtol=0, atol=0.3)


def test_constrained_sites_are_drawn_inside_their_support() -> None:
    def noisy(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, scale), obs=y)

    x = torch.zeros(200)
    y = 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    posterior = PyroGuideVI(num_steps=300, num_samples=100, step_size=0.03).fit(noisy, x, y)
    scale = posterior.sample_sites(100)["scale"]
    assert (scale > 0).all()
    assert float(scale.mean()) == pytest.approx(float(y.std()), rel=0.1)


def test_a_restricted_target_keeps_the_other_sites_fixed() -> None:
    def two(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)

    x = torch.linspace(-1, 2, 20)
    y = 1.0 + x
    backend = Subset(
        PyroGuideVI("AutoMultivariateNormal", num_steps=500, step_size=0.03), sites="a", rest=MAP(num_steps=200)
    )
    posterior = backend.fit(two, x, y)
    b = posterior.sample_sites(50)["b"]
    assert b.unique().numel() == 1
    precision = 1 + 20 / 0.25
    a = posterior.flat_draws
    assert float(a.mean()) == pytest.approx(float((y - b[0] * x).sum() / 0.25 / precision), abs=0.03)
    assert float(a.std()) == pytest.approx(precision**-0.5, rel=0.2)


def test_parameter_store_and_every_random_state_are_left_alone() -> None:
    pyro.param("mine", torch.tensor(3.0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fit("AutoNormal", num_steps=3)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_same_seed_same_draws() -> None:
    backend = PyroGuideVI(num_steps=5, num_samples=10)
    first, again, other = (backend.fit(PROBLEM.model, PROBLEM.x, PROBLEM.y, seed=s).draws for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_repr_re_creates_the_backend() -> None:
    backend = PyroGuideVI(autoguide.AutoDiagonalNormal, num_steps=7)
    assert backend == PyroGuideVI("AutoDiagonalNormal", num_steps=7)
    assert eval(repr(backend)) == backend


def test_cost_is_counted_in_particles() -> None:
    assert fit("AutoNormal", num_steps=6, num_particles=3).info.gradients == 18


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"guide": "AutoMagic"}, ValueError, "has no 'AutoMagic'; known: .*AutoNormal"),
        ({"guide": 3}, TypeError, "`guide` must be a name, a class or a callable"),
        ({"num_steps": 0}, ValueError, "`num_steps` must be an integer >= 1, got 0"),
        ({"step_size": -1.0}, ValueError, "`step_size` must be > 0, got -1.0"),
        ({"temperature": 2.0}, ValueError, "PyroGuideVI has no temperature"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PyroGuideVI(**fields)


def test_an_elbo_that_is_not_finite_stops_with_the_step() -> None:
    def explodes(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((1e3 * w).exp() * x, 1.0), obs=y)

    ones = torch.ones(3)
    with pytest.raises(NonFiniteError, match="the ELBO is (nan|-inf) at step 0"):
        PyroGuideVI(num_steps=5).fit(explodes, ones, ones, init=torch.tensor([1.0]))
