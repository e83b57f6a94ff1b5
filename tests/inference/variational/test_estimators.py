"""Reparameterised, local and flipout estimates: one mean, one variance for a datum, different correlations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import softplus

from bnn_models import bayesianize, likelihoods
from inference.target import Target, compile_target
from inference.variational import MeanFieldVI
from inference.variational.estimators import ESTIMATORS, make_estimator
from inference.variational.free_energy import free_energy, free_energy_and_grad, gaussian_prior
from tests.conjugate import linear_regression
from tests.tolerances import assert_independent_mean, seed

REWRITING = ("local", "flipout")
X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0], [0.0, 0.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w / 2 + b, 1.0), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 5]).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    v = pyro.sample("v", dist.Normal(0.0, 0.5).expand([5, 1]).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x @ w + b) @ v).squeeze(-1), noise), obs=y)


def images(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 1, 2, 2]).to_event(4))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        mean = torch.nn.functional.conv2d(x, w, b).mean((1, 2, 3))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def means_and_scales(target: Target) -> tuple[Tensor, Tensor]:
    return 0.5 * normal(target.dim, seed=3), 0.1 + normal(target.dim, seed=4).abs()


def per_datum(target: Target, name: str, num: int) -> Tensor:
    """Log-likelihoods at draws of the noise, (S, N)."""
    loc, scale = means_and_scales(target)
    noise = torch.randn(num, target.dim, generator=torch.Generator().manual_seed(seed(5)))
    if name == "reparameterised":
        return vmap(lambda e: target.log_likelihood(loc + scale * e))(noise)
    estimator = make_estimator(target, name, target.num_data)  # type: ignore[arg-type]
    rewritten: Any = estimator.likelihood.__self__  # type: ignore[attr-defined]
    noise = torch.randn(num, estimator.size, generator=torch.Generator().manual_seed(seed(6)))
    return vmap(lambda e: rewritten.per_datum(loc, scale, e, target.x, target.y))(noise)


def outputs(model: Any, x: Tensor, name: str, num: int = 50_000) -> Tensor:
    """Network outputs at draws of the noise, from log-likelihoods at targets 1 and -1, (S, N)."""
    ones = torch.ones(len(x))
    up, down = (per_datum(compile_target(model, x, y), name, num) for y in (ones, -ones))
    return (up - down) / 2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_dense_layer_has_the_exact_mean_and_variance_of_each_datum(name: str) -> None:
    loc, scale = means_and_scales(compile_target(dense, X, torch.ones(4)))
    z = outputs(dense, X, name)
    mean = X @ loc[:3] / 2 + loc[3]
    assert_independent_mean(z, mean)
    assert_independent_mean((z - mean).square(), X.square() @ scale[:3].square() / 4 + scale[3] ** 2)


def test_flipout_and_local_data_are_uncorrelated_and_plain_ones_are_not() -> None:
    loc, scale = means_and_scales(compile_target(dense, X, torch.ones(4)))
    covariance = (X[0] * X[3]) @ scale[:3].square() / 4 + scale[3] ** 2
    assert covariance > 0.1
    for name, expected in (("reparameterised", covariance), ("local", 0.0), ("flipout", 0.0)):
        z = outputs(dense, X, name) - (X @ loc[:3] / 2 + loc[3])
        assert_independent_mean((z[:, 0] * z[:, 3])[:, None], expected)


def test_a_convolution_under_flipout_has_the_variance_of_shared_weights() -> None:
    x = normal(3, 1, 4, 4)
    loc, scale = means_and_scales(compile_target(images, x, torch.ones(3)))
    windows = x.unfold(2, 2, 1).unfold(3, 2, 1).mean((1, 2, 3)).reshape(3, 4)
    design = torch.cat([windows / 2, windows / 2, torch.full((3, 2), 0.5)], 1)
    for name in ("reparameterised", "flipout"):
        z = outputs(images, x, name)
        assert_independent_mean(z, design @ loc)
        assert_independent_mean((z - design @ loc).square(), design.square() @ scale.square())


@pytest.mark.parametrize("name", REWRITING)
def test_a_network_has_the_moments_of_reparameterisation(name: str) -> None:
    target = compile_target(network, X, normal(4))
    plain, other = (per_datum(target, n, 50_000) for n in ("reparameterised", name))
    assert_independent_mean(other - plain, 0.0)
    assert_independent_mean((other - plain.mean(0)).square() - (plain - plain.mean(0)).square(), 0.0)


@pytest.mark.parametrize("name", REWRITING)
def test_gradients_agree_in_mean(name: str) -> None:
    target = compile_target(network, X, normal(4))
    loc, scale = means_and_scales(target)
    found = []
    for which in ("reparameterised", name):
        estimator = make_estimator(target, which, 4)  # type: ignore[arg-type]
        noise = torch.randn(20_000, 1, estimator.size, generator=torch.Generator().manual_seed(seed(7)))
        both = grad(estimator.likelihood, argnums=(0, 1))
        found.append(torch.cat(vmap(lambda e, b=both: b(loc, scale, e, target.x, target.y))(noise), -1))
    assert_independent_mean(found[0] - found[1], 0.0)


@pytest.mark.parametrize("name", REWRITING)
def test_gradients_vary_less_on_large_batches(name: str) -> None:
    x = normal(200, 3)
    target = compile_target(network, x, x[:, 0] + 0.1 * normal(200, seed=2))
    loc, scale = means_and_scales(target)
    spread = []
    for which in ("reparameterised", name):
        estimator = make_estimator(target, which, 200)  # type: ignore[arg-type]
        noise = torch.randn(200, 1, estimator.size, generator=torch.Generator().manual_seed(7))
        slope = grad(estimator.likelihood)
        draws = vmap(lambda e, g=slope: g(loc, scale, e, target.x, target.y))(noise)
        spread.append(float(draws[:, target.sites[0].start : target.sites[0].stop].var(0).sum()))
    assert spread[1] < spread[0] / 3


@pytest.mark.parametrize("name", REWRITING)
def test_the_elbo_is_below_the_exact_evidence_and_the_answer_is_the_same(name: str) -> None:
    problem = linear_regression()
    backend = MeanFieldVI(num_steps=600, num_particles=8, step_size=0.02, estimator=name, progress=False)  # type: ignore[arg-type]
    posterior = backend.fit(problem.model, problem.x, problem.y)
    assert posterior.log_evidence < problem.log_evidence
    scale = problem.precision.diag().rsqrt()
    torch.testing.assert_close((posterior.gaussian.loc - problem.mode) / scale, torch.zeros(3), rtol=0, atol=0.08)
    torch.testing.assert_close(posterior.gaussian.scale / scale, torch.ones(3), rtol=0, atol=0.04)


@pytest.mark.parametrize("name", REWRITING)
def test_minibatches_and_wrapped_modules_go_through(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model = bayesianize(net, likelihood=likelihoods.Normal(0.5))
    backend = MeanFieldVI(num_steps=5, batch_size=2, num_particles=2, estimator=name, progress=False)  # type: ignore[arg-type]
    first, again = (backend.fit(model, X, normal(4), seed=3) for _ in range(2))
    assert torch.equal(first.gaussian.loc, again.gaussian.loc)
    assert bool(torch.isfinite(first.gaussian.loc).all())


@pytest.mark.parametrize("name", REWRITING)
def test_a_restricted_target_keeps_its_fixed_sites(name: str) -> None:
    target = compile_target(dense, X, torch.ones(4))
    part = target.restrict("b", torch.tensor([1.0, 0.0, -1.0, 0.5]))
    estimator = make_estimator(part, name, 4)  # type: ignore[arg-type]
    noise = torch.zeros(1, estimator.size)
    got = estimator.likelihood(torch.tensor([0.3]), torch.tensor([0.0]), noise, part.x, part.y)
    torch.testing.assert_close(got, part.log_likelihood(torch.tensor([0.3])).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("model", [dense, network], ids=lambda m: m.__name__)
def test_the_written_out_gradient_is_that_of_the_objective(model: Any, particles: int, temperature: float) -> None:
    target = compile_target(model, X, normal(4)).tempered(temperature, 1.3)
    prior, weight = gaussian_prior(target), torch.tensor(0.7)
    assert prior.everywhere == (model is dense)
    params, eps = normal(2 * target.dim, seed=2), normal(particles, target.dim, seed=9)
    fast = free_energy_and_grad(target, prior, make_estimator(target, "reparameterised", 4).likelihood)
    gradient, value = fast(params, eps, target.x, target.y, weight)

    def slow(p: Tensor) -> Tensor:
        return free_energy(target, prior, p, eps, target.x, target.y, weight)

    torch.testing.assert_close(value, slow(params), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, grad(slow)(params), rtol=1e-10, atol=1e-12)


def test_a_gaussian_prior_with_means_and_several_scales_is_read_right() -> None:
    def shifted(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor([5.0, 0.0, -1.0]), torch.tensor([0.1, 1.0, 30.0])).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    target = compile_target(shifted, X, normal(4))
    prior, params, eps = gaussian_prior(target), normal(6, seed=2), normal(1, 3, seed=9)
    fast = free_energy_and_grad(target, prior, make_estimator(target, "reparameterised", 4).likelihood)
    gradient, value = fast(params, eps, target.x, target.y, torch.tensor(1.0))
    q = dist.Normal(params[:3], softplus(params[3:]))
    kl = torch.distributions.kl_divergence(
        q, dist.Normal(torch.tensor([5.0, 0.0, -1.0]), torch.tensor([0.1, 1.0, 30.0]))
    ).sum()
    energy = -target.log_likelihood(params[:3] + softplus(params[3:]) * eps[0]).sum()
    assert float(value) == pytest.approx(float(kl + energy) / 4, rel=1e-10)
    slow = grad(lambda p: free_energy(target, prior, p, eps, target.x, target.y, 1.0))(params)
    torch.testing.assert_close(gradient, slow, rtol=1e-8, atol=1e-10)


def sequences(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w).mean((1, 2)), 1.0), obs=y)


def tied(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x @ w) @ w).sum(1), 1.0), obs=y)


def location(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean.expand(len(x)), 1.0), obs=y)


@pytest.mark.parametrize(
    ("name", "model", "x", "message"),
    [
        ("local", images, torch.ones(3, 1, 4, 4), "'w' is a convolution: .* use estimator='flipout' or 'repar"),
        ("local", sequences, torch.ones(3, 5, 3), "one row per datum, but 'w' maps .* for 3 data; use estimator="),
        ("flipout", sequences, torch.ones(3, 5, 3), "one row per datum, but 'w' maps .* use estimator='reparameter"),
        ("local", tied, X, "'w' is read in more than one place; use estimator='flipout' or"),
        ("flipout", tied, X, "'w' is read in more than one place; use estimator='reparameterised'"),
        ("local", location, X, "draws noise for linear layers, and the model has none"),
    ],
)
def test_models_that_an_estimator_is_wrong_for_are_refused(name: str, model: Any, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanFieldVI(num_steps=1, estimator=name).fit(model, x, torch.ones(len(x)))  # type: ignore[arg-type]


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="`estimator` must be one of 'reparameterised', 'local', 'flipout', got 'f'"):
        MeanFieldVI(estimator="f")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", REWRITING)
def test_a_network_reaches_the_elbo_of_reparameterisation(name: str) -> None:
    x = normal(40, 3)
    y = torch.sin(x[:, 0]) + 0.1 * normal(40, seed=2)
    backend = MeanFieldVI(num_steps=3000, num_particles=4, progress=False)
    plain, other = backend.fit(network, x, y), replace(backend, estimator=name).fit(network, x, y)  # type: ignore[arg-type]
    error = math.hypot(*(p.info.extra["elbo_standard_error"] for p in (plain, other)))
    assert other.log_evidence == pytest.approx(plain.log_evidence, abs=0.5 + 4.5 * error)
