"""Prior precisions and noise from draws: stationary points of the exact evidence; what g-priors do not depend on."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import MAP, SampledLaplace
from inference.backend import Run
from inference.curvature import ggn
from inference.laplace.em import noise_of
from inference.laplace.sample_then_optimise import SampleThenOptimise, SolverOptions
from inference.linear_model import LinearModel
from inference.target import compile_target
from tests.networks import network
from tests.tolerances import z_limit

N, NOISE = 40, 0.5
K = 2_000
QUIET = {"compile": False, "progress": False}
START = MAP(num_steps=100, **QUIET)


@functools.cache
def data(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator)
    x[:, 5] += 0.9 * x[:, 0]
    y = x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 0.1, 0.0]) + NOISE * torch.randn(N, generator=generator)
    x[:, 0] *= scale
    return x, y


def model(x: Tensor, y: Tensor | None = None) -> None:
    first = pyro.sample("first", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    last = pyro.sample("last", dist.Normal(torch.zeros(3), 0.7).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ torch.cat([first, last]), NOISE), obs=y)


def exact(precision: Tensor, variance: float) -> tuple[Tensor, Tensor, float]:
    """Mean, diagonal of S H and sum of squared errors of the conjugate posterior."""
    x, y = data()
    curvature = x.T @ x / variance
    covariance = torch.linalg.inv(curvature + precision.diag())
    mean = covariance @ x.T @ y / variance
    return mean, covariance @ curvature, float((y - x @ mean).square().sum())


def slopes(precision: Tensor, index: Tensor, variance: float) -> Tensor:
    """Derivatives of the exact log evidence with respect to the log precision of each group."""
    mean, product, _ = exact(precision, variance)
    each = 0.5 * (product.diagonal() - precision * mean.square())
    return torch.zeros(int(index.max()) + 1).index_add(0, index, each)


def slope_errors(precision: Tensor, index: Tensor, variance: float) -> Tensor:
    """Monte-Carlo standard errors of the same from K draws: those of half the effective numbers."""
    x, _ = data()
    return 0.5 * effective_errors(x.T @ x / variance, precision, index)


def effective_errors(curvature: Tensor, precision: Tensor, index: Tensor) -> Tensor:
    r"""Standard errors of :math:`\epsilon_g^T (\epsilon - A^{1/2} z)_g`, averaged over K draws."""
    root = precision.sqrt()
    kept = root[:, None] * torch.linalg.inv(curvature + precision.diag()) * root  # Q
    gone = torch.eye(len(precision)) - kept
    errors = []
    for group in range(int(index.max()) + 1):
        own = index == group
        within, across = gone[own][:, own].square().sum(), gone[own][:, ~own].square().sum()
        noise = (kept @ gone).diagonal()[own].sum()
        errors.append(math.sqrt(max(float(2 * within + across + noise), 1e-12) / K))
    return torch.tensor(errors)


def log_evidence(log_precision: Tensor, log_variance: Tensor) -> Tensor:
    x, y = data()
    marginal = (x / log_precision.exp()) @ x.T + log_variance.exp() * torch.eye(N)
    return torch.distributions.MultivariateNormal(torch.zeros(N), marginal).log_prob(y)


def test_the_slopes_used_here_are_those_of_the_exact_evidence():
    logs, variance = torch.linspace(-1.0, 1.0, 6), torch.tensor(NOISE**2)
    found = torch.func.grad(lambda a: log_evidence(a, variance.log()))(logs)
    torch.testing.assert_close(slopes(logs.exp(), torch.arange(6), NOISE**2), found)


@pytest.mark.parametrize("groups", ["all", "site"])
def test_the_rounds_end_at_a_stationary_point_of_the_exact_evidence(groups):
    backend = SampledLaplace(num_samples=K, em_rounds=200, groups=groups, tolerance=1e-9, start=START, **QUIET)
    posterior = backend.fit(model, *data())
    precision = posterior.prior_precision
    index = torch.tensor([0, 0, 0, 1, 1, 1]) if groups == "site" else torch.zeros(6, dtype=torch.long)
    z = slopes(precision, index, NOISE**2) / slope_errors(precision, index, NOISE**2)
    assert z.abs().max() < z_limit(len(z))
    assert (slope_errors(precision, index, NOISE**2) < 0.05).all()  # nats per unit of log precision
    found = posterior.info.extra["prior_precision"]
    assert found["first"] == pytest.approx(float(precision[0]))
    ratio = float(precision[3] / precision[0])
    assert (ratio == pytest.approx(4 / 0.49, rel=1e-6)) == (groups == "all")  # declared ratios are kept within a group


def test_mackays_exact_fixed_point_is_reached_within_monte_carlo_error():
    logs = torch.tensor([-1.4, -1.4, -1.4, 0.7, 0.7, 0.7])
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    for _ in range(2000):
        mean, product, _ = exact(logs.exp(), NOISE**2)
        effective = torch.zeros(2).index_add(0, index, product.diagonal())
        squares = torch.zeros(2).index_add(0, index, mean.square())
        logs = (effective / squares).log()[index]
    assert slopes(logs.exp(), index, NOISE**2).abs().max() < 1e-8
    backend = SampledLaplace(num_samples=K, em_rounds=200, tolerance=1e-9, start=START, **QUIET)
    found = backend.fit(model, *data()).prior_precision.log()
    # Error of a log precision: that of its slope, over the curvature of the evidence at its maximum.
    hessian = torch.func.hessian(lambda a: log_evidence(a[index], torch.tensor(NOISE**2).log()))(logs[[0, 3]])
    covariance = slope_errors(logs.exp(), index, NOISE**2).square().diag()
    inverse = torch.linalg.inv(hessian)
    error = (inverse @ covariance @ inverse).diagonal().sqrt()
    assert ((found - logs)[[0, 3]].abs() / error).max() < z_limit(2)
    assert error.max() < 0.1


def test_the_noise_is_learnt_with_the_precisions():
    def louder(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 3.0), obs=y)

    backend = SampledLaplace(num_samples=K, em_rounds=300, learn_noise=True, tolerance=1e-9, start=START, **QUIET)
    posterior = backend.fit(louder, *data())
    variance = 9.0 * posterior.noise_factor
    precision = posterior.prior_precision
    _, product, squares = exact(precision, variance)
    slope = 0.5 * (squares / variance - (N - float(product.trace())))
    error = float(slope_errors(precision, torch.zeros(6, dtype=torch.long), variance)[0])
    assert abs(slope) < z_limit() * error
    assert 0.3 < variance**0.5 < 0.7
    found = posterior.predict(data()[0]).aleatoric_variance
    torch.testing.assert_close(found, torch.full((N,), variance))


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise"])
def test_the_effective_number_of_parameters_is_the_trace_on_average(name):
    target, theta = network(name)
    precision = torch.linspace(0.5, 3.0, target.dim)
    options = SolverOptions(500, 1e-12, 0.2, 0.9, None)
    linear = LinearModel(target, theta, K)
    run = Run(SampledLaplace(progress=False), target, 0)
    sampler = SampleThenOptimise(linear, K, options, run)
    z = sampler.draws(precision)
    curvature = ggn(target, theta)
    product = torch.linalg.solve(curvature + precision.diag(), curvature)
    index = torch.cat([torch.full((s.size,), i) for i, s in enumerate(target.sites)])
    truth = torch.zeros(len(target.sites)).index_add(0, index, product.diagonal())
    found = torch.zeros_like(truth).index_add(0, index, sampler.effective_numbers(z, precision))
    assert ((found - truth) / effective_errors(curvature, precision, index)).abs().max() < z_limit(len(truth))
    # The published estimate, z^T H z, is as good for all weights together.
    published = (z * linear.gram(z)).sum(-1)
    error = math.sqrt(2 * float((product @ product).trace()) / K)
    assert abs(float(published.mean() - product.trace())) < z_limit() * error


def test_the_effective_number_of_one_group_is_quieter_than_as_published():
    def tied(x: Tensor, y: Tensor | None = None) -> None:  # the data know the sum of two weights well
        first, second = (pyro.sample(name, dist.Normal(torch.zeros(1), 1.0).to_event(1)) for name in ("a", "b"))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0] * (first + second), 0.05), obs=y)

    x, y = data()
    target = compile_target(tied, x, y)
    precision, k = torch.ones(2), 500
    linear = LinearModel(target, torch.zeros(2), k)
    run = Run(SampledLaplace(progress=False), target, 0)
    sampler = SampleThenOptimise(linear, k, SolverOptions(50, 1e-12, 0.2, 0.9, None), run)
    z = sampler.draws(precision)
    noise = sampler._prior_noise()
    ours = (noise * (noise - z))[:, 0]
    published = (z * linear.gram(z))[:, 0]
    assert float(ours.mean()) == pytest.approx(0.5, abs=z_limit() * (1.5 / k) ** 0.5)
    assert ours.std() < 0.05 * published.std()


def test_a_g_prior_does_not_see_how_a_weight_is_scaled():
    def fit(scale: float, scaling: str) -> Tensor:
        backend = SampledLaplace(
            num_samples=20, em_rounds=100, groups="all", scaling=scaling, tolerance=1e-9, start=START, **QUIET
        )
        x, y = data(scale)
        return backend.fit(model, x, y).predict(x).f_variance

    torch.testing.assert_close(fit(10.0, "g_prior"), fit(1.0, "g_prior"), rtol=1e-5, atol=0)
    changed = fit(10.0, "declared") / fit(1.0, "declared")
    assert (changed - 1).abs().max() > 0.01


@pytest.mark.slow
def test_precisions_of_a_classifier_come_from_the_mode_of_the_linear_model():
    target, theta = network("by_hand")
    backend = SampledLaplace(num_samples=500, em_rounds=100, tolerance=1e-6, **QUIET)
    posterior = backend.fit_to(target)
    linear = LinearModel(target, posterior.center, 1)
    options = SolverOptions(500, 1e-10, 0.2, 0.9, None)
    sampler = SampleThenOptimise(linear, 1, options, Run(backend, target, 0))
    precision = posterior.prior_precision
    zero = torch.zeros_like(posterior.center)
    mode = posterior.center + sampler.mean(precision, zero, 1.0, zero).offset
    curvature = ggn(target, posterior.center)
    product = torch.linalg.solve(curvature + precision.diag(), curvature)
    index = torch.cat([torch.full((s.size,), i) for i, s in enumerate(target.sites)])
    gap = torch.zeros(4).index_add(0, index, product.diagonal() - precision * mode.square())
    error = effective_errors(curvature, precision, index) * (K / 500) ** 0.5
    assert (gap / error).abs().max() < z_limit(4)
    assert error.max() < 0.15


def test_residuals_are_counted_in_declared_deviations():
    x, y = data()
    target = compile_target(model, x, y)
    linear = LinearModel(target, torch.zeros(6), 1)
    expected = float((y / NOISE).square().sum()) / (N - 3.5)
    assert noise_of(linear, linear.eta, 3.5) == pytest.approx(expected)
