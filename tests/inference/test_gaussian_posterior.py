"""Joint covariances of a linearised network, their Gaussian process, and gradients with respect to the inputs."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from inference import (
    NUTS,
    SWAG,
    Backend,
    DenseLaplace,
    DiagonalLaplace,
    FunctionalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LowRankLaplace,
)
from inference.distributions import LowRankGaussian
from inference.errors import ApproximationWarning, CapabilityError
from inference.hessians import prior_precision_diagonal
from tests.cases import CASES, normal
from tests.networks import network

QUIET: dict[str, Any] = {"compile": False, "progress": False}
STRUCTURES: dict[str, Backend] = {
    "dense": DenseLaplace(start=None, **QUIET),
    "diagonal": DiagonalLaplace(start=None, **QUIET),
    "kronecker": KroneckerLaplace(start=None, **QUIET),
    "low_rank": LowRankLaplace(start=None, rank=5, **QUIET),
    "functional": FunctionalLaplace(start=None, num_points=4, **QUIET),
}
structures = pytest.mark.parametrize("structure", STRUCTURES)


@functools.cache
def _posterior(structure: str, name: str) -> GaussianPosterior:
    target, theta = network(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # theta is random: not a mode
        found = STRUCTURES[structure].fit_to(target, init=theta)
    assert isinstance(found, GaussianPosterior)
    return found


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise", "lenet"])
@structures
def test_the_joint_covariance_is_the_dense_product_for_the_location_alone(structure: str, name: str) -> None:
    posterior = _posterior(structure, name)
    target = posterior.target
    found = posterior.function_covariance(target.x)
    num, size = found.shape[:2]
    assert size == (1 if name == "learnt_noise" else 3)
    jacobian = jacrev(target.eta)(posterior.mean_theta)[:, :size].flatten(0, 1)
    expected = jacobian @ posterior.gaussian.covariance() @ jacobian.mT
    torch.testing.assert_close(found.reshape(num * size, num * size), expected, rtol=1e-8, atol=1e-10)
    blocks = found.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    variance = blocks.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, posterior.predict(target.x).f_variance.reshape(num, size))


def test_any_gaussian_has_a_joint_covariance() -> None:
    target, theta = network("by_hand")
    gaussian = LowRankGaussian(theta, torch.full_like(theta, 0.1), torch.randn(target.dim, 3))
    posterior = GaussianPosterior(target, gaussian, backend="L()", linearized=True)
    jacobian = jacrev(target.eta)(theta).flatten(0, 1)
    found = posterior.function_covariance(target.x).reshape(len(jacobian), -1)
    torch.testing.assert_close(found, jacobian @ gaussian.covariance() @ jacobian.mT)


@pytest.mark.parametrize(
    "backend",
    [
        DiagonalLaplace(start=None, **QUIET),
        KroneckerLaplace(start=None, **QUIET),
        LowRankLaplace(start=None, rank=2, **QUIET),
        FunctionalLaplace(start=None, num_points=2, **QUIET),
    ],
    ids=lambda b: type(b).__name__,
)
@pytest.mark.filterwarnings("ignore::inference.errors.ApproximationWarning")
def test_no_matrix_of_the_weights_squared_is_formed(backend: Backend) -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> None:  # P^2 floats are 44 GB
        w1, w2 = pyro.sample("w1", normal(100, 720)), pyro.sample("w2", normal(720, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 / 10) @ w2 / 27), obs=y)

    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    theta = torch.randn(74_160, generator=torch.Generator().manual_seed(1))
    posterior = backend.fit(wide, x, torch.arange(4) % 3, init=theta)
    found = posterior.function_covariance(x)
    assert found.shape == (4, 3, 4, 3)
    torch.testing.assert_close(found, found.permute(2, 3, 0, 1))
    variance = found.reshape(12, 12).diagonal().reshape(4, 3)
    torch.testing.assert_close(variance, posterior.predict(x, num_samples=2).f_variance)


def test_a_latent_noise_alone_leaves_the_function_without_variance() -> None:
    def noise_only(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], scale), obs=y)

    x = torch.linspace(-1, 1, 7)[:, None]
    posterior = DenseLaplace(**QUIET).fit(noise_only, x, x[:, 0] + 0.1 * torch.cos(9 * x[:, 0]))
    assert torch.equal(posterior.function_covariance(x), torch.zeros(7, 1, 7, 1))


def smooth(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(2, 5)), pyro.sample("b1", normal(5))
    w2 = pyro.sample("w2", normal(5, scale=0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2, 0.3), obs=y)


@functools.cache
def _regression() -> tuple[GaussianPosterior, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, new = torch.randn(20, 2, generator=generator), torch.randn(6, 2, generator=generator)
    y = torch.sin(x.sum(-1)) + 0.3 * torch.randn(20, generator=generator)
    return DenseLaplace(**QUIET).fit(smooth, x, y), x, new


def test_the_variance_of_a_regression_is_that_of_the_gaussian_process_with_its_kernel() -> None:
    posterior, x, new = _regression()
    target, theta = posterior.target, posterior.mean_theta
    prior = prior_precision_diagonal(target, theta)
    old, fresh = (jacrev(lambda t, at=at: target.eta(t, at)[:, 0])(theta) for at in (x, new))
    kernel = (old / prior) @ old.mT + 0.3**2 * torch.eye(20)
    cross = (fresh / prior) @ old.mT
    expected = (fresh / prior) @ fresh.mT - cross @ torch.linalg.solve(kernel, cross.mT)
    found = posterior.function_covariance(new)
    assert found.shape == (6, 1, 6, 1)
    torch.testing.assert_close(found[:, 0, :, 0], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(posterior.predict(new).f_variance, expected.diagonal(), rtol=1e-7, atol=1e-9)


# -- gradients with respect to the inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise"])
@structures
def test_means_and_variances_have_the_gradients_of_finite_differences(structure: str, name: str) -> None:
    posterior = _posterior(structure, name)
    x = posterior.target.x[:2].clone().requires_grad_()

    def moments(value: Tensor) -> tuple[Tensor, ...]:
        found = posterior.predict(value, num_samples=5)
        return found.f_mean, found.f_variance, found.mean, found.variance

    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradcheck(posterior.function_covariance, x)


def test_the_density_of_a_regression_has_a_gradient_too() -> None:
    posterior, _, new = _regression()
    x, y = new.clone().requires_grad_(), torch.zeros(6)
    assert torch.autograd.gradcheck(lambda value: posterior.predict(value).log_prob(y), x)


def test_steps_up_the_variance_find_an_input_that_is_less_known() -> None:
    posterior, _, new = _regression()
    x = new[:1].clone()
    before = posterior.predict(x).f_variance
    for _ in range(5):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(posterior.predict(x).f_variance.sum(), x)
        x = x + 0.1 * slope / slope.norm()
    assert float(posterior.predict(x.detach()).f_variance) > 1.2 * float(before)


def test_inputs_without_a_gradient_give_none() -> None:
    posterior, _, new = _regression()
    found = posterior.predict(new)
    assert not found.mean.requires_grad
    assert not found.variance.requires_grad
    assert not posterior.function_covariance(new).requires_grad


# -- refusals ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "backend",
    [
        DenseLaplace(predictive="sampled", **QUIET),
        SWAG(num_steps=40, **QUIET),
        NUTS(num_samples=6, warmup_steps=2, num_chains=2, **QUIET),
    ],
    ids=lambda b: type(b).__name__,
)
def test_posteriors_that_are_not_linearised_name_those_that_are(backend: Backend) -> None:
    case = next(c for c in CASES if c.name == "by_hand")
    posterior = backend.fit(case.model(), case.x, case.y)
    with pytest.raises(CapabilityError, match=rf"{type(backend).__name__} gives .* KroneckerLaplace.* have one"):
        posterior.function_covariance(case.x)


def test_inputs_unlike_the_training_inputs_are_refused() -> None:
    posterior, x, _ = _regression()
    with pytest.raises(ValueError, match=r"rows of shape \(1,\)"):
        posterior.function_covariance(x[:, :1])
