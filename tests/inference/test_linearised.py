"""Linearised predictions against dense formulas, the closed form of linear regression, and brute-force draws."""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from inference import prediction
from inference.distributions import DenseGaussian
from inference.linearised import LinearisedDraws
from inference.posterior import GaussianPosterior
from inference.prediction import Prediction
from inference.target import Target, compile_target
from tests.cases import CASES, Case
from tests.conjugate import linear_regression


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def laplace(name: str) -> tuple[GaussianPosterior, Tensor, Tensor, Tensor]:
    """A linearised posterior with a dense covariance; eta and the dense J S J^T of all inputs, (N, E) and (N, E, E)."""
    target = target_of(name)
    generator = torch.Generator().manual_seed(5)
    loc = 0.5 * torch.randn(target.dim, generator=generator)
    factor = 0.15 * torch.randn(target.dim, target.dim, generator=generator)
    covariance = factor @ factor.T + 0.01 * torch.eye(target.dim)
    posterior = GaussianPosterior(
        target, DenseGaussian.from_covariance(loc, covariance), backend="L()", linearized=True
    )
    jacobian = jacrev(target.eta)(loc)
    return posterior, target.eta(loc), jacobian @ covariance @ jacobian.mT, covariance


def brute(eta: Tensor, covariance: Tensor, num: int, seed: int = 0) -> Tensor:
    """Draws of eta at every input, (S, N, E)."""
    generator = torch.Generator().manual_seed(seed)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return eta + torch.einsum("nij,snj->sni", root, torch.randn(num, *eta.shape, generator=generator))


@pytest.mark.parametrize(
    "name", ["by_hand", "two_outputs", "two_plates", "heteroscedastic", "categorical", "student_t"]
)
def test_moments_of_f_are_those_of_the_dense_formula(name: str) -> None:
    posterior, eta, covariance, _ = laplace(name)
    case = case_named(name)
    predicted = posterior.predict(case.x)
    size = math.prod(predicted.f_mean.shape[1:])
    torch.testing.assert_close(predicted.f_mean.reshape(12, -1), eta[:, :size])
    torch.testing.assert_close(predicted.f_variance.reshape(12, -1), covariance.diagonal(dim1=-2, dim2=-1)[:, :size])


@pytest.mark.parametrize("name", ["by_hand", "two_outputs", "heteroscedastic"])
def test_the_noise_variance_is_the_mean_of_a_log_normal(name: str) -> None:
    posterior, eta, covariance, _ = laplace(name)
    predicted = posterior.predict(case_named(name).x)
    size = math.prod(predicted.mean.shape[1:])
    log_scale, spread = eta[:, size:], covariance.diagonal(dim1=-2, dim2=-1)[:, size:]
    expected = (2 * log_scale + 2 * spread).exp()
    torch.testing.assert_close(predicted.aleatoric_variance.reshape(12, -1), expected)
    draws = brute(eta, covariance, 100_000)[..., size:].mul(2).exp()
    error = draws.std(0) / math.sqrt(100_000)
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(predicted.epistemic_variance, predicted.f_variance)


def test_bayesian_linear_regression_is_predicted_exactly() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    gaussian = DenseGaussian.from_covariance(problem.mode, problem.covariance)
    posterior = GaussianPosterior(target, gaussian, backend="L()", linearized=True)
    x = torch.randn(9, problem.x.shape[1])
    predicted = posterior.predict(x)
    variance = torch.einsum("ni,ij,nj->n", x, problem.covariance, x)
    torch.testing.assert_close(predicted.mean, x @ problem.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(predicted.epistemic_variance, variance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(predicted.aleatoric_variance, torch.full((9,), 0.25), rtol=1e-8, atol=1e-8)
    exact = dist.Normal(x @ problem.mean, (variance + 0.25).sqrt())
    y = torch.randn(9)
    torch.testing.assert_close(predicted.log_prob(y), exact.log_prob(y), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(predicted.quantile(0.95), exact.icdf(torch.tensor(0.95)), rtol=1e-8, atol=1e-8)
    assert predicted.num_components == 1


@pytest.mark.parametrize("name", ["by_hand", "heteroscedastic", "two_outputs"])
def test_integrating_the_location_out_agrees_with_drawing_both(name: str) -> None:
    posterior, eta, covariance, _ = laplace(name)
    case = case_named(name)
    predicted = posterior.predict(case.x, num_samples=20_000, seed=1)
    size = math.prod(predicted.mean.shape[1:])
    draws = brute(eta, covariance, 100_000)
    loc, scale = draws[..., :size], draws[..., size:].exp()
    points = predicted.mean.reshape(12, size) + 0.7
    below = torch.special.ndtr((points - loc) / scale)
    error = below.std(0) * (1 / math.sqrt(100_000) + 1 / math.sqrt(20_000))
    found = predicted.cdf(points.reshape(predicted.mean.shape)).reshape(12, size)
    assert ((found - below.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "student_t"])
def test_other_families_average_over_draws_of_eta(name: str) -> None:
    posterior, eta, covariance, _ = laplace(name)
    case = case_named(name)
    predicted = posterior.predict(case.x, num_samples=20_000, seed=1)
    base = posterior.target.parameters(posterior.mean_theta)
    params = predicted.family.from_eta(brute(eta, covariance, 50_000), base)
    density = predicted.family.distribution(params).log_prob(case.y).exp()
    error = density.std(0) * (1 / math.sqrt(50_000) + 1 / math.sqrt(20_000))
    assert ((predicted.log_prob(case.y).exp() - density.mean(0)).abs() < 5 * error).all()


def test_class_probabilities_of_a_linearised_network_sum_to_one() -> None:
    posterior, _, _, _ = laplace("categorical")
    predicted = posterior.predict(case_named("categorical").x)
    torch.testing.assert_close(predicted.probs.sum(-1), torch.ones(12))
    assert (predicted.mutual_information > 0).all()
    assert predicted.num_components == 500


def shared_noise(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale).to_event(1), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_noise_shared_by_two_outputs_has_a_singular_covariance_and_still_predicts(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator)
    target = compile_target(shared_noise, x, y)
    factor = 0.2 * torch.randn(7, 7, generator=generator)
    covariance = factor @ factor.T + 0.01 * torch.eye(7)
    posterior = GaussianPosterior(
        target, DenseGaussian.from_covariance(torch.zeros(7), covariance), backend="L()", linearized=True
    )
    predicted = posterior.predict(x, num_samples=20_000)
    jacobian = jacrev(target.eta)(torch.zeros(7))
    assert torch.linalg.matrix_rank((jacobian @ covariance @ jacobian.mT).double()[0], rtol=1e-5) == 3
    total = predicted.component_means().square().mean(0) + (predicted._kept or [])[0]["scale"].square().mean(0)
    expected = predicted.variance + predicted.mean.square()
    torch.testing.assert_close(total, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["by_hand", "categorical", "heteroscedastic"])
def test_row_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, _, _, _ = laplace(name)
    case = case_named(name)
    whole = posterior.predict(case.x, num_samples=50)
    monkeypatch.setattr("inference.linearised.MAX_ROWS", 5)
    monkeypatch.setattr(prediction, "_KEEP_BYTES", 0)
    parts = posterior.predict(case.x, num_samples=50)
    assert len(parts._rows) == 3
    torch.testing.assert_close(parts.variance, whole.variance)
    torch.testing.assert_close(parts.log_prob(case.y), whole.log_prob(case.y))


@pytest.mark.parametrize("name", ["by_hand", "two_outputs", "categorical", "poisson"])
def test_components_at_given_draws_follow_the_first_order_expansion(name: str) -> None:
    posterior, eta, _, _ = laplace(name)
    target, loc, case = posterior.target, posterior.mean_theta, case_named(name)
    thetas = posterior.sample(5)
    source = LinearisedDraws(target, posterior.gaussian, thetas, case.x)
    predicted = Prediction(source, 12)
    jacobian = jacrev(target.eta)(loc)
    expected: Any = eta + torch.einsum("nep,sp->sne", jacobian, thetas - loc)
    size = math.prod(predicted.f_mean.shape[1:])
    torch.testing.assert_close(predicted.component_functions().reshape(5, 12, -1), expected[..., :size])


def test_a_linearised_prediction_repeats_with_its_seed() -> None:
    posterior, _, _, _ = laplace("by_hand")
    case = case_named("by_hand")
    before = torch.random.get_rng_state()
    first = posterior.predict(case.x, seed=1).log_prob(case.y)
    assert torch.equal(first, posterior.predict(case.x, seed=1).log_prob(case.y))
    assert not torch.equal(first, posterior.predict(case.x, seed=2).log_prob(case.y))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        posterior.predict(case.x, num_samples=0)


@pytest.mark.parametrize("name", ["by_hand", "two_outputs", "heteroscedastic", "categorical"])
def test_a_prediction_carries_a_gradient_only_where_its_inputs_do(name: str) -> None:
    posterior, _, _, _ = laplace(name)
    predicted = posterior.predict(case_named(name).x)
    assert not predicted.mean.requires_grad
    assert not predicted.variance.requires_grad
