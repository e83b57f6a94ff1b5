"""What every Laplace approximation refuses or warns of, each with one message that says what to do."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bnn_models import bayesianize, likelihoods
from inference import (
    MAP,
    DenseLaplace,
    DiagonalLaplace,
    FunctionalLaplace,
    KroneckerLaplace,
    LowRankLaplace,
    UnsupportedModelError,
)
from inference.errors import ApproximationWarning
from tests.cases import normal

QUIET: dict[str, Any] = {"compile": False, "progress": False}
ALL = [DenseLaplace, DiagonalLaplace, KroneckerLaplace, LowRankLaplace, FunctionalLaplace]
every = pytest.mark.parametrize("backend", ALL, ids=lambda b: b.__name__)
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sum(-1)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@every
def test_a_point_that_is_no_mode_is_warned_of_with_its_newton_decrement(backend: Any) -> None:
    with pytest.warns(ApproximationWarning, match=r"not at a mode: the Newton decrement .* is .* gradient norm"):
        posterior = backend(start=None, **QUIET).fit(linear, X, Y, init=torch.tensor([3.0, -2.0, 1.0]))
    assert posterior.info.extra["newton_decrement"] > 0.3
    assert posterior.info.extra["gradient_norm"] > 1


@every
def test_at_a_mode_nothing_is_warned_of(backend: Any) -> None:
    posterior = backend(start=MAP(num_steps=100, **QUIET), **QUIET).fit(linear, X, Y)
    assert posterior.info.warnings == []


def flat(x: Tensor, y: Tensor | None = None) -> None:
    w, spare = pyro.sample("w", normal(3)), pyro.sample("spare", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + 0 * spare.sum(), 0.5), obs=y)


@every
def test_a_precision_that_is_not_positive_after_adding_the_prior_names_the_site(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"(must be positive|positive definite).*site 'spare'"):
        backend(start=None, **QUIET).fit(flat, X, Y, init=torch.full((5,), 0.4))


def stable(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Stable(1.5, 0.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


class Simulated(dist.Normal):
    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError("simulated only")


def simulated(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", Simulated(torch.zeros(3), torch.ones(3)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@every
@pytest.mark.parametrize("model", [stable, simulated], ids=lambda m: m.__name__)
def test_a_prior_without_a_density_in_closed_form_names_the_site(backend: Any, model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"site 'w' has a prior, S(table|imulated), with no density"):
        backend(**QUIET).fit(model, X, Y)


def empty(x: Tensor, y: Tensor | None = None) -> None:
    w, none = pyro.sample("w", normal(3)), pyro.sample("none", normal(3, 0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + (x @ none).sum(-1), 0.5), obs=y)


@every
def test_an_empty_layer_names_the_site(backend: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"site 'none' has no entries \(shape \(3, 0\)\)"):
        backend(**QUIET).fit(empty, X, Y)


@every
def test_batch_norm_in_training_mode_names_the_module(backend: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\) is in training mode .* call net.eval\(\)"):
        bayesianize(net)
    norm = nn.BatchNorm1d(3).double()

    def by_hand(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(norm(x) @ w, 0.5), obs=y)

    with pytest.raises(UnsupportedModelError, match=r"'norm' \(BatchNorm1d\) is in training mode.*`.eval\(\)`"):
        backend(**QUIET).fit(by_hand, X, Y)


def test_a_network_with_batch_norm_in_eval_mode_is_fitted() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
    model = bayesianize(net, likelihood=likelihoods.Normal(0.5))
    posterior = KroneckerLaplace(start=MAP(num_steps=300, **QUIET), **QUIET).fit(model, X, Y)
    assert torch.isfinite(posterior.predict(X).variance).all()


@pytest.mark.parametrize("backend", [DenseLaplace, KroneckerLaplace, LowRankLaplace, FunctionalLaplace])
def test_a_form_that_does_not_fit_names_its_size_and_what_would_do(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.laplace.memory.available_bytes", lambda device: 8)
    with pytest.raises(ValueError, match=rf"{backend.__name__} .*P = 3.* GB of memory are available; (use|lower)"):
        backend(**QUIET).fit(linear, X, Y)
