"""Annealed importance sampling against evidences in closed form, its unbiasedness, and bounds from both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from inference.errors import NonFiniteError
from inference.evidence import AnnealingOptions, annealed_importance_sampling, evidence_bounds
from inference.target import compile_target
from tests.cases import CASES
from tests.conjugate import Conjugate, beta_bernoulli, linear_regression, linear_truth, problems
from tests.tolerances import seed, z_limit


@pytest.mark.parametrize("problem", problems(), ids=lambda p: p.name)
@pytest.mark.parametrize("schedule", ["sigmoid", "power"])
def test_log_evidence_is_the_exact_one_within_its_standard_error(problem: Conjugate, schedule: str) -> None:
    found = annealed_importance_sampling(
        problem.model,
        problem.x,
        problem.y,
        num_temperatures=250 if problem.name == "linear_regression" else 20,
        num_leapfrogs=4,
        seed=seed(1),
        schedule=schedule,
    )
    # The logarithm of a mean of weights is too small by half its variance.
    error = found.log_evidence - problem.log_evidence + found.standard_error**2 / 2
    assert abs(error) < z_limit() * found.standard_error
    assert found.standard_error < 0.6
    assert found.ess > 5


def test_the_evidence_is_unbiased_however_few_the_temperatures_and_its_logarithm_is_too_small() -> None:
    problem = beta_bernoulli()
    found = annealed_importance_sampling(
        problem.model, problem.x, problem.y, num_particles=2000, num_temperatures=3, num_leapfrogs=2, seed=seed(2)
    )
    shares = (found.log_weights - problem.log_evidence).exp()
    error = shares.std() / len(shares) ** 0.5
    assert abs(shares.mean() - 1) < z_limit() * error
    assert error < 0.03
    assert found.log_weights.mean() < problem.log_evidence - 0.1
    assert found.log_evidence == pytest.approx(float(found.log_weights.exp().mean().log()), abs=1e-10)
    assert found.ess == pytest.approx(float(shares.sum() ** 2 / shares.square().sum()), rel=1e-10)


def test_weighted_particles_have_the_posteriors_mean() -> None:
    problem = linear_regression(num=10)
    found = annealed_importance_sampling(
        problem.model, problem.x, problem.y, num_particles=128, num_temperatures=50, seed=seed(3)
    )
    weights = found.log_weights.softmax(0)
    error = (problem.covariance.diagonal() / found.ess).sqrt()
    assert ((weights @ found.particles - problem.mean).abs() < z_limit(3) * error).all()


def test_bounds_on_simulated_data_enclose_the_exact_evidence() -> None:
    problem = linear_regression(num=10)
    found = evidence_bounds(problem.model, problem.x, problem.y, num_temperatures=150, seed=4)
    exact = linear_truth(problem.x, found.y, prior_scale=1.5, noise=0.5).log_evidence
    assert not torch.equal(found.y, problem.y)
    assert abs(found.lower.log_evidence - exact) < z_limit() * found.lower.standard_error
    assert abs(found.upper.log_evidence - exact) < z_limit() * found.upper.standard_error
    assert found.gap == found.upper.log_evidence - found.lower.log_evidence


def test_too_few_temperatures_leave_a_gap_around_the_exact_evidence() -> None:
    problem = linear_regression(num=30)
    lower, upper = [], []
    for number in range(4):
        found = evidence_bounds(
            problem.model, problem.x, problem.y, num_temperatures=5, num_particles=10, num_leapfrogs=2, seed=number
        )
        exact = linear_truth(problem.x, found.y, prior_scale=1.5, noise=0.5).log_evidence
        lower.append(found.lower.log_evidence - exact)
        upper.append(found.upper.log_evidence - exact)
    assert sum(lower) / 4 < -1
    assert sum(upper) / 4 > 1


def test_step_sizes_follow_the_posterior_and_reach_the_wanted_acceptance() -> None:
    problem = linear_regression()
    found = annealed_importance_sampling(problem.model, problem.x, problem.y, num_temperatures=100, seed=5)
    assert found.step_sizes[0] > 3 * found.step_sizes[-1]
    assert float(found.acceptance[30:].mean()) == pytest.approx(0.7, abs=0.08)
    # The pilot has 30 steps of warm-up; 5 leapfrogs and one gradient at the new temperature each.
    assert found.gradients == 100 * (1 + 130 * 6) + 100 * (1 + 100 * 6)


@pytest.mark.parametrize("schedule", ["sigmoid", "power"])
def test_inverse_temperatures_rise_from_zero_to_one(schedule: Any) -> None:
    betas = AnnealingOptions(num_temperatures=7, schedule=schedule).betas()
    assert betas[0] == 0
    assert betas[-1] == pytest.approx(1, abs=1e-15)
    assert (betas.diff() > 0).all()
    assert len(betas) == 8


def test_the_same_seed_gives_the_same_estimate_and_a_compiled_target_is_taken() -> None:
    problem = beta_bernoulli()
    target = compile_target(problem.model, problem.x, problem.y)
    options: dict[str, Any] = {"num_particles": 10, "num_temperatures": 5}
    first = annealed_importance_sampling(problem.model, problem.x, problem.y, seed=6, **options)
    assert annealed_importance_sampling(target, seed=6, **options).log_evidence == first.log_evidence
    assert annealed_importance_sampling(target, seed=7, **options).log_evidence != first.log_evidence
    assert str(first).startswith(f"log evidence {first.log_evidence:.3f} nats, standard error")


def test_a_network_with_a_learnt_noise_is_annealed_in_both_dtypes() -> None:
    case = next(c for c in CASES if c.name == "by_hand")
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        found = annealed_importance_sampling(
            case.model(), case.x.to(dtype), case.y.to(dtype), num_particles=10, num_temperatures=10, seed=8
        )
        assert math.isfinite(found.log_evidence)
        assert found.particles.dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, "`num_particles` must be an integer >= 2, got 1"),
        ({"num_temperatures": 0}, "`num_temperatures` must be an integer >= 1, got 0"),
        ({"num_leapfrogs": -1}, "`num_leapfrogs` must be an integer >= 1, got -1"),
        ({"target_accept": 1.0}, "`target_accept` must be between 0 and 1, got 1.0"),
        ({"schedule": "linear"}, '`schedule` must be "sigmoid" or "power", got \'linear\''),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    problem = beta_bernoulli()
    with pytest.raises(ValueError, match=message):
        annealed_importance_sampling(problem.model, problem.x, problem.y, **options)


def test_tempered_and_restricted_targets_are_refused() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    for wrong in (target.tempered(2.0), target.tempered(1.0, 0.5), target.restrict("w", torch.zeros(3))):
        with pytest.raises(ValueError, match="pass an untempered, full target"):
            annealed_importance_sampling(wrong)


def test_data_that_no_draw_from_the_prior_can_give_are_named() -> None:
    import pyro
    import pyro.distributions as dist

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.Uniform(0.1, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Uniform(0.0, scale.expand(len(x)), validate_args=False), obs=y)

    with pytest.raises(NonFiniteError, match="the data are impossible at all draws from the prior"):
        annealed_importance_sampling(model, torch.zeros(2), torch.tensor([0.1, 5.0]), num_temperatures=3)
