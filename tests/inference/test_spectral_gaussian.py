import pytest
import torch
from torch import Tensor

from inference.distributions import DenseGaussian, LowRankGaussian, gaussian_from_tensors
from inference.spectral_gaussian import SpectralGaussian, from_factor


def spectral(dim: int = 6, rank: int = 2) -> SpectralGaussian:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator))[0]
    scale = 0.5 + torch.rand(dim, generator=generator)
    return SpectralGaussian(torch.arange(float(dim)), scale, basis, torch.tensor([0.05, 7.0])[:rank])


def slow_covariance(gaussian: SpectralGaussian) -> Tensor:
    inner = torch.eye(gaussian.dim) + gaussian.basis @ torch.diag(gaussian.eigenvalues - 1) @ gaussian.basis.T
    return torch.diag(gaussian.scale) @ inner @ torch.diag(gaussian.scale)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_everything_equals_the_dense_gaussian(rank: int) -> None:
    fast = spectral(rank=rank)
    covariance = slow_covariance(fast)
    slow = DenseGaussian.from_covariance(fast.loc, covariance)
    theta, jacobian = torch.randn(5, 6), torch.randn(4, 3, 6)
    for got, expected in (
        (fast.covariance(), covariance),
        (fast.variance, covariance.diagonal()),
        (fast.log_prob(theta), slow.log_prob(theta)),
        (fast.quadratic(jacobian), slow.quadratic(jacobian)),
        (fast.covariance_times(theta), slow.covariance_times(theta)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_draws_have_the_covariance() -> None:
    fast = spectral()
    draws = fast.sample(40_000, torch.Generator().manual_seed(1))
    covariance = slow_covariance(fast)
    deviation = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()  # variance of a product
    z = (torch.cov(draws.T) - covariance) / (deviation / 40_000).sqrt()
    assert float(z.abs().max()) < 4
    assert float(((draws.mean(0) - fast.loc) / (covariance.diagonal() / 40_000).sqrt()).abs().max()) < 4


def test_a_factor_gives_the_same_gaussian() -> None:
    diagonal, factor = 0.5 + torch.rand(5), torch.randn(5, 2)
    found = from_factor(torch.zeros(5), diagonal, factor)
    expected = LowRankGaussian(torch.zeros(5), diagonal, factor)
    torch.testing.assert_close(found.covariance(), expected.covariance(), rtol=1e-9, atol=1e-9)
    assert found.eigenvalues.shape == (2,)


def test_it_is_saved_by_name() -> None:
    gaussian = spectral()
    found = gaussian_from_tensors("SpectralGaussian", gaussian.tensors())
    theta = torch.randn(3, 6)
    assert torch.equal(found.log_prob(theta), gaussian.log_prob(theta))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.zeros(6)}, "scale must be > 0"),
        ({"scale": torch.ones(5)}, r"scale must have shape \(P\) = \(6,\)"),
        ({"basis": torch.ones(5, 2)}, r"basis must have shape \(6, R\)"),
        ({"basis": torch.ones(6, 2)}, "orthonormal columns, got products off by 6"),
        ({"eigenvalues": torch.tensor([1.0, 0.0])}, "eigenvalues must be > 0"),
        ({"eigenvalues": torch.ones(3)}, r"eigenvalues must have shape \(R\) = \(2,\)"),
    ],
)
def test_bad_parameters_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralGaussian(**{**spectral().tensors(), **changes})
