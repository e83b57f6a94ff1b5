"""Diagonal Laplace: exact mean, variances 1 / diag(precision), and how far that is from the truth."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.backend import ApproximationWarning
from inference.curvature import empirical_fisher, ggn
from inference.hessians import hessian, prior_precision
from inference.laplace import DenseLaplace, DiagonalLaplace
from inference.point import MAP
from inference.target import compile_target

N, D = 15, 3
NOISE, PRIOR = 0.5, 1.5
START = MAP(num_steps=30)
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([D, 3]).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1) @ w2), obs=y)


def _correlated() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) + torch.randn(N, 1, generator=generator)
    return x, x.sum(-1) + NOISE * torch.randn(N, generator=generator)


def _orthogonal() -> tuple[Tensor, Tensor]:
    x, y = _correlated()
    return torch.linalg.qr(x).Q * torch.tensor([1.0, 2.0, 3.0]), y


def _precision(x: Tensor) -> Tensor:
    return x.mT @ x / NOISE**2 + torch.eye(x.shape[1]) / PRIOR**2


def test_the_mean_is_exact_and_the_variances_are_one_over_the_diagonal_of_the_precision() -> None:
    x, y = _correlated()
    posterior = DiagonalLaplace(start=START).fit(linear, x, y)
    precision = _precision(x)
    torch.testing.assert_close(posterior.gaussian.loc, torch.linalg.solve(precision, x.mT @ y / NOISE**2), **EXACT)
    torch.testing.assert_close(posterior.gaussian.variance, 1 / precision.diagonal(), **EXACT)


def test_variances_of_correlated_weights_are_smaller_than_the_marginal_ones() -> None:
    x, y = _correlated()
    diagonal = DiagonalLaplace(start=START).fit(linear, x, y)
    dense = DenseLaplace(start=START).fit(linear, x, y)
    assert bool((diagonal.gaussian.variance < dense.gaussian.variance).all())
    # Hadamard: det(precision) is at most the product of its diagonal, so the diagonal evidence is the smaller one.
    assert diagonal.log_evidence < dense.log_evidence


def _one_feature() -> tuple[Tensor, Tensor]:
    x, y = _correlated()
    return x[:, :1], y


@pytest.mark.parametrize("data", [_orthogonal, _one_feature], ids=lambda data: data.__name__)
def test_orthogonal_features_and_a_single_weight_are_exact(data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    x, y = data()
    diagonal = DiagonalLaplace(start=START).fit(linear, x, y)
    dense = DenseLaplace(start=START).fit(linear, x, y)
    exact = torch.linalg.inv(_precision(x))
    torch.testing.assert_close(diagonal.gaussian.covariance(), exact, **EXACT)
    torch.testing.assert_close(dense.gaussian.covariance(), exact, **EXACT)
    assert diagonal.log_evidence == pytest.approx(dense.log_evidence, rel=1e-10)


def test_the_predictive_variance_is_the_diagonal_form() -> None:
    x, y = _correlated()
    x_new = torch.randn(5, D)
    prediction = DiagonalLaplace(start=START).fit(linear, x, y).predict(x_new)
    f_variance = (x_new.square() / _precision(x).diagonal()).sum(-1)
    torch.testing.assert_close(prediction.f_variance, f_variance, **EXACT)
    torch.testing.assert_close(prediction.variance, f_variance + NOISE**2, **EXACT)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_the_variances_of_a_network_are_the_inverse_of_its_curvatures_diagonal(curvature: str) -> None:
    x, _ = _correlated()
    y = torch.arange(N) % 4
    posterior = DiagonalLaplace(curvature=curvature, start=START).fit(classes, x, y)
    target, mode = posterior.target, posterior.gaussian.loc
    likelihood = {"ggn": ggn, "fisher": empirical_fisher}[curvature](target, mode).diagonal()
    expected = 1 / (likelihood + prior_precision(target, mode))
    torch.testing.assert_close(posterior.gaussian.variance, expected, **EXACT)


def test_negative_entries_of_the_exact_hessian_are_clipped_and_counted() -> None:
    x, y = _correlated()
    labels = torch.arange(N) % 4
    target = compile_target(classes, x, labels)
    theta = next(t for t in target.sample_prior(20, seed=1) if (hessian(target, t).diagonal() < 0).any())
    diagonal = hessian(target, theta).diagonal()
    count = int((diagonal < 0).sum())
    with pytest.warns(ApproximationWarning) as caught:
        posterior = DiagonalLaplace(curvature="hessian", start=None).fit(classes, x, labels, init=theta)
    assert any(f"has {count} negative entries" in str(w.message) for w in caught)
    expected = 1 / (diagonal.clamp_min(0) + prior_precision(target, theta))
    torch.testing.assert_close(posterior.gaussian.variance, expected, **EXACT)


def test_temperatures_scale_the_variances_and_the_likelihood() -> None:
    x, y = _correlated()
    posterior = DiagonalLaplace(start=START, temperature=0.3, likelihood_temperature=2.0).fit(linear, x, y)
    precision = x.square().sum(0) / (2 * NOISE**2) + 1 / PRIOR**2
    torch.testing.assert_close(posterior.gaussian.variance, 0.3 / precision, **EXACT)


def test_a_prior_that_curves_the_wrong_way_is_set_to_zero_with_a_warning() -> None:
    def heavy_tails(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.StudentT(2.0, 0.0, 0.1).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 50.0), obs=y)

    x, y = _correlated()
    with pytest.warns(ApproximationWarning) as caught:
        posterior = DiagonalLaplace(start=None).fit(heavy_tails, x, y, init=torch.full((D,), 2.0))
    assert any("3 entries of the precision were <= 0" in str(w.message) for w in caught)
    torch.testing.assert_close(posterior.gaussian.variance, 50.0**2 / x.square().sum(0), **EXACT)


def test_a_weight_that_nothing_bends_is_an_error_that_names_the_site() -> None:
    def unused(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.sample("spare", dist.Laplace(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    x, y = _correlated()
    with pytest.raises(ValueError, match="must be positive, got 0 in site 'spare'"):
        DiagonalLaplace(start=None).fit(unused, x, y, init=torch.ones(D + 1))
