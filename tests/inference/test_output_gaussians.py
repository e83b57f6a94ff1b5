"""One Gaussian per output: function covariances of each alone, nothing between them, and nothing over theta."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference.distributions import OutputGaussians, SpectralGaussian, gaussian_from_tensors
from inference.errors import CapabilityError

P, E, R = 7, 3, 2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _both() -> tuple[OutputGaussians, list[SpectralGaussian]]:
    """The Gaussian, and each output's as one over theta."""
    loc, scale = _random(P), _random(P, seed=1).exp()
    basis, values = torch.linalg.qr(_random(E, P, R, seed=2)).Q, _random(E, R, seed=3).sigmoid()
    single = [SpectralGaussian(loc, scale, b, v) for b, v in zip(basis, values, strict=True)]
    return OutputGaussians(loc, scale, basis, values), single


def test_each_output_has_the_variance_of_its_own_gaussian() -> None:
    held, single = _both()
    jacobian = _random(5, E, P, seed=4)
    expected = torch.stack([g.quadratic(jacobian[:, c : c + 1])[:, 0, 0] for c, g in enumerate(single)], -1)
    torch.testing.assert_close(held.quadratic(jacobian), torch.diag_embed(expected))


def test_the_joint_covariance_is_that_of_each_output_and_zero_between_them() -> None:
    held, single = _both()
    jacobian = _random(5, E, P, seed=4)
    expected = torch.zeros(5, E, 5, E)
    for c, gaussian in enumerate(single):
        expected[:, c, :, c] = gaussian.quadratic(jacobian[:, c])
    torch.testing.assert_close(held.joint(jacobian), expected)


def test_the_joint_covariance_of_one_gaussian_couples_the_outputs() -> None:
    _, single = _both()
    jacobian = _random(5, E, P, seed=4)
    flat = jacobian.reshape(5 * E, P)
    expected = (flat @ single[0].covariance() @ flat.T).reshape(5, E, 5, E)
    torch.testing.assert_close(single[0].joint(jacobian), expected)


def test_products_are_with_the_mean_covariance() -> None:
    held, single = _both()
    vectors = _random(4, P, seed=5)
    expected = torch.stack([g.covariance_times(vectors) for g in single]).mean(0)
    torch.testing.assert_close(held.covariance_times(vectors), expected)


def test_it_is_saved_by_name() -> None:
    held, _ = _both()
    again = gaussian_from_tensors("OutputGaussians", held.tensors())
    assert torch.equal(again.quadratic(_random(E, P)), held.quadratic(_random(E, P)))


def test_there_is_no_gaussian_over_theta() -> None:
    held, _ = _both()
    for ask in (lambda: held.sample(3), lambda: held.log_prob(held.loc), lambda: held.variance, held.covariance):
        with pytest.raises(CapabilityError, match="no Gaussian over theta has them: no .* of theta"):
            ask()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", torch.zeros(P), "scale must be > 0"),
        ("basis", torch.zeros(P, R), r"basis must have shape \(E, 7, R\), got \(7, 2\)"),
        ("eigenvalues", torch.ones(E), r"eigenvalues must have shape \(E, R\)"),
        ("eigenvalues", -torch.ones(E, R), "eigenvalues must be > 0"),
    ],
)
def test_bad_parameters_are_named(name: str, value: Tensor, message: str) -> None:
    held, _ = _both()
    with pytest.raises(ValueError, match=message):
        OutputGaussians(**{**held.tensors(), name: value})
