"""Gaussian processes by stochastic descent, against Cholesky factors."""

import pytest
import torch
from torch import Tensor

from inference.errors import NonFiniteError
from inference.gaussian_process import RBF, Linear, Matern, SGDPosteriorSampler
from inference.gaussian_process.descent import Descent, System, descend, kernel_times
from tests.tolerances import z_limit

QUIET = {"progress": False}


def data(num: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(num, 2, generator=generator)
    return x, (2 * x[:, 0]).sin() + x[:, 1].cos() + noise * torch.randn(num, generator=generator)


def exact(kernel, noise: float, x: Tensor, y: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the mean, mean and covariance of the function."""
    matrix = kernel(x, x) + noise**2 * torch.eye(len(x))
    weights, cross = torch.linalg.solve(matrix, y), kernel(new, x)
    return weights, cross @ weights, kernel(new, new) - cross @ torch.linalg.solve(matrix, cross.T)


def kernel_norm_error(kernel, x: Tensor, found: Tensor, expected: Tensor) -> float:
    gap = found - expected
    matrix = kernel(x, x)
    return float(((gap @ matrix @ gap) / (expected @ matrix @ expected)).sqrt())


def test_dual_descent_meets_cholesky_within_5000_steps():
    x, y = data(500)
    kernel = RBF(lengthscale=0.7)
    sampler = SGDPosteriorSampler(kernel=kernel, noise=0.3, num_samples=2, num_steps=5_000, batch_size=128, **QUIET)
    found = sampler.fit(x, y).mean_weights
    expected, _, _ = exact(kernel, 0.3, x, y, x)
    assert kernel_norm_error(kernel, x, found, expected) < 1e-3


def test_both_methods_have_the_same_solution():
    x, y = data(40)
    kernel = Matern(lengthscale=0.5, smoothness=0.5)
    expected, _, _ = exact(kernel, 0.5, x, y, x)
    for method, steps in (("dual", 2_000), ("primal", 12_000)):
        sampler = SGDPosteriorSampler(
            kernel=kernel, noise=0.5, method=method, num_samples=2, num_steps=steps, batch_size=20, **QUIET
        )
        found = sampler.fit(x, y)
        assert kernel_norm_error(kernel, x, found.mean_weights, expected) < 0.02
        assert found.residual < 0.05


@pytest.mark.parametrize("kernel", [RBF(lengthscale=0.7), Matern(lengthscale=0.8, smoothness=1.5)])
def test_draws_have_the_posterior_mean_and_covariance(kernel):
    x, y = data(30)
    new = torch.tensor([[1.0, 1.0], [1.5, 1.0], [3.0, 3.5], [6.0, 6.0]])
    num = 2_000
    sampler = SGDPosteriorSampler(
        kernel=kernel, noise=0.3, num_samples=num, num_steps=1_500, batch_size=30, num_prior_features=2_000, **QUIET
    )
    posterior = sampler.fit(x, y)
    _, mean, covariance = exact(kernel, 0.3, x, y, new)
    draws = posterior.sample(new)
    assert draws.shape == (num, 4)
    variance = covariance.diagonal()
    solver = 3e-3  # of descent, and of a finite number of features
    torch.testing.assert_close(posterior.mean(new), mean, rtol=0, atol=solver)
    error = ((draws.mean(0) - mean).abs() - solver) / (variance / num).sqrt()
    assert error.max() < z_limit(4)
    centred = draws - posterior.mean(new)
    gap = (centred.T @ centred / num - covariance).abs() - 10 * solver
    assert (gap / ((variance[:, None] * variance + covariance.square()) / num).sqrt()).max() < z_limit(16)
    moments = posterior.predict(new)
    torch.testing.assert_close(moments.variance, moments.f_variance + 0.09)
    torch.testing.assert_close(moments.f_variance, centred.square().mean(0))


def test_far_from_the_data_draws_are_the_priors():
    x, y = data(50)
    kernel = RBF(lengthscale=0.7, scale=1.3)
    sampler = SGDPosteriorSampler(kernel=kernel, noise=0.2, num_samples=2_000, num_steps=50, batch_size=50, **QUIET)
    far = torch.tensor([[40.0, -30.0], [100.0, 50.0]])
    posterior = sampler.fit(x, y)
    assert posterior.mean(far).abs().max() < 1e-12
    draws = posterior.sample(far)
    assert (draws.mean(0) / (1.69 / 2_000) ** 0.5).abs().max() < z_limit(2)
    assert (draws.var(0) / 1.69 - 1).abs().max() < z_limit(2) * (2 / 2_000) ** 0.5


def test_a_bayesian_linear_model_is_the_linear_kernel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + 0.5 * torch.randn(60, generator=generator)
    sampler = SGDPosteriorSampler(
        kernel=Linear(scale=1.5), noise=0.5, num_samples=2_000, num_steps=1_000, batch_size=60, **QUIET
    )
    posterior = sampler.fit(x, y)
    precision = x.T @ x / 0.25 + torch.eye(3) / 2.25
    covariance = torch.linalg.inv(precision)
    weights = posterior.sample(torch.eye(3))  # the function at unit vectors
    torch.testing.assert_close(posterior.mean(torch.eye(3)), covariance @ x.T @ y / 0.25, rtol=0, atol=1e-4)
    white = (weights - posterior.mean(torch.eye(3))) @ torch.linalg.cholesky(precision)
    gap = (white.T @ white / 2_000 - torch.eye(3)).abs().max()
    assert gap < z_limit(9) * (2 / 2_000) ** 0.5


def test_the_kernel_in_blocks_is_the_kernel(monkeypatch):
    x, _ = data(50)
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    expected = RBF()(x[:20], x) @ values
    monkeypatch.setattr("inference.gaussian_process.descent._BLOCK", 30)
    torch.testing.assert_close(kernel_times(RBF(), x[:20], x, values), expected)


def test_all_right_hand_sides_are_solved_as_each_alone():
    x, y = data(40)
    targets = torch.stack([y, y.flip(0)], 1)
    options = Descent("dual", 300, 10, None, 0.9, 100.0, 100)
    both = descend(System(RBF(), x, 0.3, targets, torch.zeros_like(targets)), options, torch.Generator().manual_seed(0))
    for column in range(2):
        one = targets[:, column : column + 1]
        alone = descend(System(RBF(), x, 0.3, one, torch.zeros_like(one)), options, torch.Generator().manual_seed(0))
        torch.testing.assert_close(both[:, column : column + 1], alone)


def test_the_same_seed_gives_the_same_functions_and_the_global_state_stays():
    x, y = data(30)
    sampler = SGDPosteriorSampler(kernel=RBF(), noise=0.3, num_samples=3, num_steps=50, batch_size=10, **QUIET)
    before = torch.get_rng_state()
    first, again, other = (sampler.fit(x, y, seed=s).sample(x) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_size_that_diverges_is_an_error_with_the_number():
    x, y = data(60)
    sampler = SGDPosteriorSampler(
        kernel=RBF(), noise=0.3, num_steps=2_000, num_samples=1, batch_size=60, step_size=1e4, **QUIET
    )
    with pytest.raises(NonFiniteError, match=r"diverged within \d+ steps at a step size of 1e\+04"):
        sampler.fit(x, y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise": 0.0}, "`noise` must be > 0"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1"),
        ({"num_prior_features": 1}, "`num_prior_features` must be an integer >= 2"),
        ({"method": "newton"}, "`method` must be one of 'dual', 'primal'"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SGDPosteriorSampler(**{"kernel": RBF(), "noise": 0.1, **fields})


def test_a_kernel_that_is_none_is_refused():
    with pytest.raises(TypeError, match="`kernel` must be a kernel such as"):
        SGDPosteriorSampler(kernel="rbf", noise=0.1)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3), ValueError, r"x must have shape \(N, D\)"),
        (torch.zeros(3, 1), torch.zeros(4), ValueError, r"got \(3, 1\) and \(4,\)"),
        (torch.zeros(3, 1).long(), torch.zeros(3), TypeError, "floating-point"),
        (torch.full((3, 1), float("nan")), torch.zeros(3), ValueError, "must be finite"),
        ([1.0], [1.0], TypeError, "must be torch.Tensors"),
    ],
)
def test_unusable_data_are_refused(x, y, error, message):
    with pytest.raises(error, match=message):
        SGDPosteriorSampler(kernel=RBF(), noise=0.1, **QUIET).fit(x, y)


def test_new_inputs_of_another_width_are_refused():
    x, y = data(20)
    sampler = SGDPosteriorSampler(kernel=RBF(), noise=0.3, num_samples=1, num_steps=5, batch_size=10, **QUIET)
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\), got \(5, 3\)"):
        sampler.fit(x, y).sample(torch.zeros(5, 3))
