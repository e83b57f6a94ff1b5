"""Evidence at the mode of the linear model: the same whatever the scale of normalised weights."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import (
    MAP,
    DenseLaplace,
    DiagonalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LowRankLaplace,
    compile_target,
    tune_at_linear_mode,
    tune_prior,
)
from inference.curvature import ggn, ggn_diagonal
from inference.errors import ApproximationWarning, ConvergenceWarning
from inference.jacobians import eta_and_jacobian
from inference.kronecker import kronecker_curvature
from inference.laplace.linear_mode import _AtLinearMode, linear_mode
from inference.linear_model import LinearModel
from inference.target import Target
from tests.cases import normal

QUIET: dict[str, Any] = {"compile": False, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(x: Tensor, y: Tensor | None = None) -> None:
    """A layer whose outputs depend on the direction of its weights alone."""
    w1 = pyro.sample("w1", normal(2, 5))
    w2 = pyro.sample("w2", normal(5))
    hidden = torch.tanh(3 * x @ (w1 / w1.square().sum().sqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(hidden @ w2, 0.3), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", normal(2, 4))
    w2, b2 = pyro.sample("w2", normal(4, 3)), pyro.sample("b2", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1) @ w2 + b2), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    w1, w2 = pyro.sample("w1", normal(2, 4)), pyro.sample("w2", normal(4))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((torch.tanh(x @ w1) @ w2).exp()), obs=y)


def _data(model: Any) -> tuple[Tensor, Tensor]:
    x = _random(40, 2)
    if model is classes:
        return x, (torch.sin(3 * x[:, 0]) > 0).long() + (x[:, 0] * x[:, 1] > 0).long()
    if model is counts:
        return x, (4 * torch.sin(2 * x[:, 0]).square() + x[:, 1]).clamp(min=0).round()
    return x, torch.sin(2 * x[:, 0]) + 0.3 * x[:, 1] + 0.3 * _random(40, seed=5)


@functools.cache
def _trained(model: Any) -> Tensor:
    """Stopped early, at no mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MAP(num_steps=80, polish=False, **QUIET).fit_to(_target(model)).mean_theta


@functools.cache
def _target(model: Any) -> Target:
    return compile_target(model, *_data(model))


def _at(theta: Tensor, backend: Any = None, model: Any = normalised) -> GaussianPosterior:
    found = (backend or DenseLaplace(start=None, **QUIET)).fit_to(_target(model), init=theta)
    assert isinstance(found, GaussianPosterior)
    return found


@pytest.mark.parametrize("scaling", ["declared", "g_prior"])
def test_scaling_a_normalised_layer_changes_no_error_bar(scaling: Any) -> None:
    theta, new = _trained(normalised), 2 * _random(7, 2, seed=8)
    scaled = theta.clone()
    scaled[:10] *= 10  # w1: the function stays the same
    found = [tune_at_linear_mode(_at(t), scaling=scaling).posterior.predict(new) for t in (theta, scaled)]
    torch.testing.assert_close(found[1].mean, found[0].mean)
    torch.testing.assert_close(found[1].f_variance, found[0].f_variance, rtol=1e-4, atol=0)


def test_one_prior_at_the_mode_of_the_network_changes_the_error_bars() -> None:
    theta, new = _trained(normalised), 2 * _random(7, 2, seed=8)
    scaled = theta.clone()
    scaled[:10] *= 10
    found = [tune_prior(_at(t), groups="all").posterior.predict(new).f_variance for t in (theta, scaled)]
    assert ((found[1] / found[0] - 1).abs() > 0.01).any()


def test_a_linear_model_is_at_its_own_mode() -> None:
    def linear(x: Tensor, y: Tensor | None = None) -> None:
        w, b = pyro.sample("w", normal(2, scale=2.0)), pyro.sample("b", normal(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)

    x, y = _data(normalised)
    posterior = DenseLaplace(**QUIET).fit(linear, x, y)
    model = LinearModel(posterior.target, posterior.mean_theta, 1)
    precision = torch.tensor([0.25, 0.25, 1.0])
    found, _ = linear_mode(model, torch.zeros(3), precision, torch.zeros(3), lambda v: v)
    torch.testing.assert_close(found, posterior.mean_theta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", [normalised, classes, counts], ids=lambda m: m.__name__)
def test_the_linear_mode_is_that_of_newtons_method_on_a_dense_jacobian(model: Any) -> None:
    theta = _trained(model)
    target = _target(model)
    eta, jacobian = eta_and_jacobian(target, theta, target.x)
    family, params = target.family(), target.parameters(theta)
    precision, mean = torch.linspace(0.5, 2.0, target.dim), 0.1 * _random(target.dim)

    def loss(w: Tensor) -> Tensor:
        at = family.from_eta(eta + jacobian @ (w - theta), params)
        return 0.5 * (precision * (w - mean).square()).sum() - family.distribution(at).log_prob(target.y).sum()

    w = theta
    for _ in range(40):
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
    linear = LinearModel(target, theta, 1)
    found, values = linear_mode(linear, mean, precision, theta, lambda v: v / precision)
    torch.testing.assert_close(found, w, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(values, eta + jacobian @ (w - theta), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("model", [classes, counts], ids=lambda m: m.__name__)
def test_the_curvature_is_taken_at_the_outputs_of_the_linear_mode(model: Any) -> None:
    theta = _trained(model)
    target, mode = _target(model), theta + 0.2 * _random(len(theta))
    eta, jacobian = eta_and_jacobian(target, theta, target.x)
    at = target.family().from_eta(eta + jacobian @ (mode - theta), target.parameters(theta))
    expected = torch.einsum("nep,nef,nfq->pq", jacobian, target.family().fisher(at), jacobian)
    moved = _AtLinearMode.of(target, theta, mode)
    torch.testing.assert_close(ggn(moved, theta), expected)
    torch.testing.assert_close(ggn(moved, theta, chunk_bytes=5000), expected)
    torch.testing.assert_close(ggn_diagonal(moved, theta), expected.diagonal())
    torch.testing.assert_close(ggn_diagonal(moved, theta, chunk_bytes=5000), expected.diagonal())
    outputs = kronecker_curvature(moved, theta, chunk_bytes=5000).layers[-1].outputs
    torch.testing.assert_close(outputs, target.family().fisher(at).sum(0))
    assert not torch.allclose(ggn(target, theta), expected, rtol=1e-3)


BACKENDS = [
    DenseLaplace(start=None, **QUIET),
    DiagonalLaplace(start=None, **QUIET),
    KroneckerLaplace(start=None, **QUIET),
    LowRankLaplace(start=None, rank=1000, **QUIET),
]


PRUNED = pytest.mark.filterwarnings(
    "ignore:the evidence asks for an ever more narrow:inference.errors.ApproximationWarning"
)


@PRUNED
@pytest.mark.parametrize("backend", BACKENDS[1:3], ids=lambda b: type(b).__name__)
def test_diagonal_and_kronecker_raise_their_evidence_and_end(backend: Any) -> None:
    tuned = tune_at_linear_mode(_at(_trained(counts), backend, counts))
    assert tuned.converged
    assert tuned.log_evidence > tuned.log_evidence_before
    assert tuned.posterior.info.extra["linear_mode_distance"] > 0


@PRUNED
def test_it_ends_where_nothing_moves() -> None:
    theta, backend = _trained(classes), BACKENDS[0]
    tuned = tune_at_linear_mode(_at(theta, backend, classes))
    again = tune_at_linear_mode(backend.fit(tuned.model, *_data(classes), init=theta))  # type: ignore[arg-type]
    kept = tuned.log_precision < 10  # the biases are pruned: there the evidence is flat
    assert kept.any()
    torch.testing.assert_close(again.log_precision[kept], tuned.log_precision[kept], rtol=0, atol=1e-3)
    assert again.log_evidence_before == pytest.approx(tuned.log_evidence, abs=1e-6)


def test_dense_and_full_rank_agree() -> None:
    theta = _trained(counts)
    found = [tune_at_linear_mode(_at(theta, BACKENDS[i], counts)) for i in (0, 3)]
    torch.testing.assert_close(found[0].log_precision, found[1].log_precision, rtol=0, atol=1e-4)
    assert found[0].log_evidence == pytest.approx(found[1].log_evidence, abs=1e-7)


def test_too_few_rounds_are_said_to_be() -> None:
    posterior = _at(_trained(counts), model=counts)
    with pytest.warns(ConvergenceWarning, match="still move after 1 rounds of linear mode and evidence"):
        tune_at_linear_mode(posterior, max_rounds=1)
    with pytest.raises(ValueError, match="`max_rounds` must be an integer >= 1, got 0"):
        tune_at_linear_mode(posterior, max_rounds=0)


def test_another_curvature_than_the_ggn_is_refused() -> None:
    posterior = _at(_trained(counts), DiagonalLaplace(start=None, curvature="fisher", **QUIET), counts)
    with pytest.raises(ValueError, match="the linear model has the curvature \"ggn\", but the posterior has 'fisher'"):
        tune_at_linear_mode(posterior)


def test_single_precision_ends_close_to_double() -> None:
    theta, new = _trained(normalised), _random(7, 2, seed=8)
    x, y = _data(normalised)
    double = tune_at_linear_mode(_at(theta))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (ConvergenceWarning, ApproximationWarning))
        single = DenseLaplace(start=None, **QUIET).fit(normalised, x.float(), y.float(), init=theta.float())
        tuned = tune_at_linear_mode(single, max_rounds=30)  # type: ignore[arg-type]
    assert tuned.log_evidence == pytest.approx(double.log_evidence, abs=1e-2)
    found, expected = tuned.posterior.predict(new.float()).f_variance, double.posterior.predict(new).f_variance
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)
