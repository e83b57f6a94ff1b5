"""Kernels: closed forms, features that reproduce them, and refusals."""

import math

import pytest
import torch

from inference.gaussian_process import RBF, Linear, Matern
from tests.tolerances import z_limit

STATIONARY = [
    RBF(lengthscale=0.7, scale=1.5),
    RBF(lengthscale=(0.5, 2.0)),
    *(Matern(lengthscale=0.8, scale=0.6, smoothness=nu) for nu in (0.5, 1.5, 2.5)),
]


def inputs(num=6):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (RBF(lengthscale=2.0, scale=3.0), 9 * math.exp(-0.5)),
        (Matern(lengthscale=2.0, smoothness=0.5), math.exp(-1)),
        (Matern(lengthscale=2.0, smoothness=1.5), (1 + 3**0.5) * math.exp(-(3**0.5))),
        (Matern(lengthscale=2.0, smoothness=2.5), (1 + 5**0.5 + 5 / 3) * math.exp(-(5**0.5))),
        (Linear(scale=(2.0, 1.0)), 0.0),
    ],
)
def test_values_at_one_length_scale_are_the_textbooks(kernel, expected):
    x, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(kernel(x, other)) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", STATIONARY)
def test_a_kernel_is_positive_with_its_variance_on_the_diagonal(kernel):
    x = inputs(20)
    matrix = kernel(x, x)
    torch.testing.assert_close(matrix.diagonal(), kernel.variance(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-6


@pytest.mark.parametrize("kernel", STATIONARY)
def test_random_features_reproduce_the_kernel_on_average(kernel):
    x, num = inputs(), 100_000
    features = kernel.features(num, x, torch.Generator().manual_seed(1))
    phi = features(x)
    assert phi.shape == (6, features.num) == (6, num)
    variance = kernel.variance(x)
    torch.testing.assert_close((phi * phi).sum(-1), variance)
    # Each product of features is a bounded variable: its standard deviation is at most that of a cosine.
    error = variance[0] * (0.5 / (num / 2)) ** 0.5
    assert ((phi @ phi.T - kernel(x, x)) / error).abs().max() < z_limit(36)


def test_features_of_the_linear_kernel_are_exact():
    kernel, x = Linear(scale=(0.5, 2.0)), inputs()
    phi = kernel.features(10, x, torch.Generator())(x)
    torch.testing.assert_close(phi @ phi.T, kernel(x, x))
    torch.testing.assert_close(kernel.variance(x), kernel(x, x).diagonal())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBF(lengthscale=0.0), "`lengthscale` must be > 0"),
        (lambda: RBF(scale=-1.0), "`scale` must be > 0"),
        (lambda: Matern(smoothness=1.0), "`smoothness` must be 0.5, 1.5 or 2.5"),
        (lambda: Linear(scale=(1.0, -1.0)), "`scale` must be > 0"),
        (lambda: RBF(lengthscale=(1.0, 2.0, 3.0))(inputs(), inputs()), "has 3 entries, but the inputs have 2 columns"),
        (lambda: Linear(scale=(1.0,))(inputs(), inputs()), "has 1 entries, but the inputs have 2 columns"),
    ],
)
def test_kernels_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
