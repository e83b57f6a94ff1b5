"""The Kronecker-factored Gaussian against its own dense covariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from inference.distributions import gaussian_from_tensors
from inference.kronecker_gaussian import KroneckerBlock, KroneckerGaussian
from tests.tolerances import z_limit

P = 21


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _example() -> KroneckerGaussian:
    """Three blocks over shuffled entries: rotated and scaled on both sides, on one side, and a diagonal."""
    places = torch.randperm(P, generator=torch.Generator().manual_seed(1))
    first, second, third = places[:12].reshape(3, 4), places[12:18].reshape(2, 3), places[18:].reshape(3, 1)
    vectors = [torch.linalg.qr(_random(size, size, seed=size)).Q for size in (3, 4, 2)]
    blocks = (
        KroneckerBlock(
            first, _random(3, 4).exp(), vectors[0], vectors[1], _random(3, seed=2).exp(), _random(4, seed=3).exp()
        ),
        KroneckerBlock(second, _random(2, 3).exp(), out_vectors=vectors[2], in_scale=_random(3).exp()),
        KroneckerBlock(third, _random(3, 1).exp()),
    )
    return KroneckerGaussian(_random(P, seed=7), blocks)


def test_the_covariance_is_the_kronecker_product_of_the_scaled_bases() -> None:
    gaussian = _example()
    covariance = gaussian.covariance()
    block = gaussian.blocks[0]
    assert block.out_vectors is not None
    assert block.in_vectors is not None
    assert block.out_scale is not None
    assert block.in_scale is not None
    basis = torch.kron(block.out_scale[:, None] * block.out_vectors, block.in_scale[:, None] * block.in_vectors)
    order = block.positions.flatten()
    expected = (basis * block.variance.flatten()) @ basis.mT
    torch.testing.assert_close(covariance[order[:, None], order], expected)
    others = torch.cat([b.positions.flatten() for b in gaussian.blocks[1:]])
    assert covariance[order[:, None], others].abs().max() == 0
    torch.testing.assert_close(gaussian.variance, covariance.diagonal())


def test_densities_products_and_quadratic_forms_are_those_of_the_dense_gaussian() -> None:
    gaussian = _example()
    covariance = gaussian.covariance()
    points, maps = _random(5, 2, P, seed=8), _random(5, 3, P, seed=9)
    dense = MultivariateNormal(gaussian.loc, covariance)
    torch.testing.assert_close(gaussian.log_prob(points), dense.log_prob(points))
    torch.testing.assert_close(gaussian.covariance_times(points), points @ covariance)
    torch.testing.assert_close(gaussian.quadratic(maps), maps @ covariance @ maps.mT)


def test_draws_have_the_mean_and_every_covariance() -> None:
    gaussian = _example()
    num = 20_000
    draws = gaussian.sample(num, torch.Generator().manual_seed(3))
    covariance = gaussian.covariance()
    assert draws.shape == (num, P)
    error = covariance.diagonal().sqrt() / num**0.5
    assert ((draws.mean(0) - gaussian.loc) / error).abs().max() < z_limit(P)
    spread = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()
    z = (draws.T.cov(correction=0) - covariance) / (spread / num).sqrt()
    assert z.abs().max() < z_limit(P * P)


def test_what_is_saved_makes_the_same_gaussian() -> None:
    gaussian = _example()
    again = gaussian_from_tensors("KroneckerGaussian", gaussian.tensors())
    points = _random(4, P)
    assert torch.equal(again.log_prob(points), gaussian.log_prob(points))
    draws = [g.sample(3, torch.Generator().manual_seed(0)) for g in (gaussian, again)]
    assert torch.equal(*draws)


def test_sums_over_places_are_the_jacobian_they_stand_for() -> None:
    gaussian = _example()
    block = gaussian.blocks[0]
    inputs, gradients = _random(5, 6, 4), _random(5, 2, 6, 3)
    jacobian = torch.einsum("nkto,nti->nkoi", gradients, inputs)
    expected = block.roots(jacobian) @ block.roots(jacobian).mT
    torch.testing.assert_close(block.function_covariance(inputs, gradients), expected)
    rows = block.roots(jacobian).flatten(0, 1)
    torch.testing.assert_close(block.joint_covariance(inputs, gradients).reshape(10, 10), rows @ rows.mT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.arange(6)}, r"positions must have shape \(out, in\), got \(6,\)"),
        ({"variance": torch.ones(3, 2)}, r"variance must have shape \(out, in\) = \(2, 3\), got \(3, 2\)"),
        ({"variance": torch.zeros(2, 3)}, "variance must be > 0, got 0 at index 0"),
        ({"out_vectors": torch.eye(3)}, r"out_vectors must have shape \(out, out\) = \(2, 2\)"),
        ({"in_vectors": torch.full((3, 3), torch.inf)}, "in_vectors must be finite, got 9 entries"),
        ({"in_scale": -torch.ones(3)}, "in_scale must be > 0, got -1"),
    ],
)
def test_bad_blocks_are_refused(changes: dict[str, Tensor], message: str) -> None:
    fields = {"positions": torch.arange(6).reshape(2, 3), "variance": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        KroneckerBlock(**{**fields, **changes})


@pytest.mark.parametrize("positions", [torch.arange(4), torch.tensor([0, 1, 2, 3, 3])])
def test_blocks_that_overlap_or_leave_something_out_are_refused(positions: Tensor) -> None:
    block = KroneckerBlock(positions[:, None], torch.ones(len(positions), 1))
    with pytest.raises(ValueError, match=r"must hold each of the 5 entries of theta once, got [45] entries"):
        KroneckerGaussian(torch.zeros(5), (block,))
