"""Flat Gaussians against torch.distributions and against dense linear algebra."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from inference.distributions import (
    DenseGaussian,
    DiagonalGaussian,
    FlatGaussian,
    LowRankGaussian,
    gaussian_from_tensors,
)

P, R, K = 5, 2, 3


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _spd(dim: int = P) -> Tensor:
    root = _draw(dim, dim, seed=3)
    return root @ root.mT + 0.5 * torch.eye(dim)


def diagonal() -> FlatGaussian:
    return DiagonalGaussian(_draw(P), _draw(P, seed=1).exp())


def low_rank() -> FlatGaussian:
    return LowRankGaussian(_draw(P), _draw(P, seed=1).exp(), _draw(P, R, seed=2))


def low_rank_without_factors() -> FlatGaussian:
    return LowRankGaussian(_draw(P), _draw(P, seed=1).exp(), torch.zeros(P, 0))


def dense_from_covariance() -> FlatGaussian:
    return DenseGaussian.from_covariance(_draw(P), _spd())


def dense_from_precision() -> FlatGaussian:
    return DenseGaussian.from_precision(_draw(P), _spd())


KINDS = [diagonal, low_rank, low_rank_without_factors, dense_from_covariance, dense_from_precision]
each_kind = pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)


@each_kind
def test_log_prob_equals_the_dense_multivariate_normal(build: Callable[[], FlatGaussian]) -> None:
    gaussian, theta = build(), _draw(4, 2, P, seed=9)
    twin = MultivariateNormal(gaussian.loc, gaussian.covariance())
    torch.testing.assert_close(gaussian.log_prob(theta), twin.log_prob(theta), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gaussian.log_prob(theta[0, 0]), twin.log_prob(theta[0, 0]), rtol=1e-10, atol=1e-10)


def test_each_kind_equals_its_own_torch_distribution() -> None:
    theta = _draw(7, P, seed=9)
    loc, diag, factor = _draw(P), _draw(P, seed=1).exp(), _draw(P, R, seed=2)
    pairs = [
        (DiagonalGaussian(loc, diag), Independent(Normal(loc, diag), 1)),
        (LowRankGaussian(loc, diag, factor), LowRankMultivariateNormal(loc, factor, diag)),
        (DenseGaussian.from_precision(loc, _spd()), MultivariateNormal(loc, precision_matrix=_spd())),
        (DenseGaussian(loc, scale_tril=torch.linalg.cholesky(_spd())), MultivariateNormal(loc, _spd())),
    ]
    for ours, twin in pairs:
        torch.testing.assert_close(ours.log_prob(theta), twin.log_prob(theta), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.variance, twin.variance, rtol=1e-10, atol=1e-10)


@each_kind
def test_quadratic_equals_the_dense_product(build: Callable[[], FlatGaussian]) -> None:
    gaussian, jacobian = build(), _draw(4, 2, K, P, seed=5)
    expected = jacobian @ gaussian.covariance() @ jacobian.mT
    torch.testing.assert_close(gaussian.quadratic(jacobian), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gaussian.quadratic(jacobian[0, 0]), expected[0, 0], rtol=1e-10, atol=1e-10)


@each_kind
def test_covariance_times_equals_the_dense_product(build: Callable[[], FlatGaussian]) -> None:
    gaussian, vectors = build(), _draw(4, 2, P, seed=5)
    expected = vectors @ gaussian.covariance()
    torch.testing.assert_close(gaussian.covariance_times(vectors), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gaussian.covariance_times(vectors[0, 0]), expected[0, 0], rtol=1e-10, atol=1e-10)


@each_kind
def test_variance_is_the_diagonal_of_the_covariance(build: Callable[[], FlatGaussian]) -> None:
    gaussian = build()
    torch.testing.assert_close(gaussian.variance, gaussian.covariance().diagonal(), rtol=1e-12, atol=0)


@each_kind
def test_sample_moments_match_within_monte_carlo_error(build: Callable[[], FlatGaussian]) -> None:
    gaussian, num_samples = build(), 40_000
    draws = gaussian.sample(num_samples, torch.Generator().manual_seed(11))
    covariance = gaussian.covariance()
    variance = covariance.diagonal()
    mean_error = (draws.mean(0) - gaussian.loc) / (variance / num_samples).sqrt()
    # Var of a sample covariance of Gaussians: (s_ij^2 + s_ii s_jj) / S.
    covariance_error = (draws.mT.cov() - covariance) / (
        (covariance.square() + variance[:, None] * variance) / num_samples
    ).sqrt()
    assert mean_error.abs().max() < 4.5
    assert covariance_error.abs().max() < 4.5


@each_kind
def test_same_generator_seed_gives_the_same_draws_and_another_seed_others(build: Callable[[], FlatGaussian]) -> None:
    gaussian = build()
    first, again, other = (gaussian.sample(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, P)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_kind
def test_sampling_with_a_generator_leaves_the_global_one_alone(build: Callable[[], FlatGaussian]) -> None:
    gaussian, state = build(), torch.get_rng_state()
    gaussian.sample(3, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())


@each_kind
def test_tensors_rebuild_the_same_gaussian(build: Callable[[], FlatGaussian]) -> None:
    gaussian, theta = build(), _draw(2, P, seed=9)
    rebuilt = gaussian_from_tensors(type(gaussian).__name__, gaussian.tensors())
    assert type(rebuilt) is type(gaussian)
    assert torch.equal(rebuilt.log_prob(theta), gaussian.log_prob(theta))
    assert torch.equal(
        rebuilt.sample(2, torch.Generator().manual_seed(0)), gaussian.sample(2, torch.Generator().manual_seed(0))
    )


@each_kind
def test_log_prob_is_batched_and_differentiated_by_torch_func(build: Callable[[], FlatGaussian]) -> None:
    gaussian, theta = build(), _draw(6, P, seed=9)
    grads = torch.func.vmap(torch.func.grad(gaussian.log_prob))(theta)
    expected = -torch.linalg.solve(gaussian.covariance(), (theta - gaussian.loc).mT).mT
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.vmap(gaussian.log_prob)(theta), gaussian.log_prob(theta))


@each_kind
def test_a_gaussian_is_frozen(build: Callable[[], FlatGaussian]) -> None:
    with pytest.raises(AttributeError):
        build().loc = torch.zeros(P)  # type: ignore[misc]


def test_low_rank_stays_accurate_with_a_tiny_diagonal() -> None:
    loc, factor = torch.zeros(3), torch.tensor([[1.0], [2.0], [3.0]])
    gaussian = LowRankGaussian(loc, torch.full((3,), 1e-6), factor)
    twin = MultivariateNormal(loc, gaussian.covariance())
    theta = factor[:, 0] * 0.7
    torch.testing.assert_close(gaussian.log_prob(theta), twin.log_prob(theta), rtol=1e-6, atol=1e-6)


def test_one_parameter_is_enough() -> None:
    theta = torch.tensor([[0.3], [-2.0]])
    expected = Normal(1.0, 2.0).log_prob(theta[:, 0])
    loc = torch.ones(1)
    for gaussian in (
        DiagonalGaussian(loc, torch.tensor([2.0])),
        LowRankGaussian(loc, torch.tensor([3.0]), torch.tensor([[1.0]])),
        DenseGaussian(loc, scale_tril=torch.tensor([[2.0]])),
        DenseGaussian(loc, precision_tril=torch.tensor([[0.5]])),
    ):
        torch.testing.assert_close(gaussian.log_prob(theta), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiagonalGaussian(torch.zeros(2, 2), torch.ones(2)), r"loc must have shape \(P,\), got \(2, 2\)"),
        (lambda: DiagonalGaussian(torch.zeros(3), torch.ones(2)), r"scale must have shape \(P\) = \(3,\), got \(2,\)"),
        (lambda: DiagonalGaussian(torch.zeros(2), torch.tensor([1.0, -0.5])), "scale must be > 0, got -0.5 at index 1"),
        (
            lambda: DiagonalGaussian(torch.tensor([0.0, torch.nan]), torch.ones(2)),
            "loc must be finite, got 1 entries of 2",
        ),
        (lambda: LowRankGaussian(torch.zeros(2), torch.zeros(2), torch.ones(2, 1)), "cov_diag must be > 0"),
        (
            lambda: LowRankGaussian(torch.zeros(2), torch.ones(2), torch.ones(3, 1)),
            r"cov_factor must have shape \(2, R\)",
        ),
        (lambda: DenseGaussian(torch.zeros(2)), "exactly one of scale_tril and precision_tril"),
        (lambda: DenseGaussian(torch.zeros(2), torch.eye(2), torch.eye(2)), "exactly one of scale_tril"),
        (lambda: DenseGaussian(torch.zeros(2), torch.ones(2, 2)), "scale_tril must be lower triangular"),
        (lambda: DenseGaussian(torch.zeros(2), -torch.eye(2)), "the diagonal of scale_tril must be > 0"),
        (
            lambda: DenseGaussian.from_precision(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            "precision must be positive definite, got a smallest eigenvalue of -1",
        ),
        (
            lambda: DenseGaussian.from_covariance(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            "covariance must be symmetric",
        ),
        (
            lambda: DenseGaussian.from_covariance(torch.zeros(2), torch.ones(2, 3)),
            r"covariance must have shape \(P, P\)",
        ),
        (lambda: gaussian_from_tensors("Kite", {}), "no Gaussian is called 'Kite'"),
        (lambda: gaussian_from_tensors("DiagonalGaussian", {"mean": torch.zeros(2)}), r"from tensors named \['mean'\]"),
        (lambda: diagonal().sample(0), "num_samples must be >= 1, got 0"),
    ],
)
def test_bad_arguments_say_what_was_expected_and_what_came(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
