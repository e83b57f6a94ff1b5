"""OnlineLaplace: prior and noise learnt while the network trains."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from inference import (
    DenseLaplace,
    DiagonalLaplace,
    KroneckerLaplace,
    LowRankLaplace,
    OnlineLaplace,
    tune_at_linear_mode,
)
from inference.errors import ApproximationWarning, NonFiniteError
from tests.cases import normal

QUIET: dict[str, Any] = {"compile": False, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(4, scale=3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 2.0), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(4, 6)), pyro.sample("b1", normal(6))
    w2, b2 = pyro.sample("w2", normal(6, 3)), pyro.sample("b2", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 + b1) @ w2 + b2), obs=y)


def _regression() -> tuple[Tensor, Tensor]:
    x = _random(30, 4)
    return x, x @ torch.tensor([1.0, -0.5, 0.2, 0.0]) + 0.4 * _random(30, seed=5)


def _classes() -> tuple[Tensor, Tensor]:
    x = _random(60, 4)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + 0.3 * _random(60, seed=6) > 0).long()


def test_on_a_linear_model_it_ends_at_the_maximum_of_the_exact_evidence() -> None:
    x, y = _regression()
    online = OnlineLaplace(
        structure=DenseLaplace(**QUIET), noise=True, num_epochs=300, every=3, step_size=0.05, polish_steps=50
    )
    found = online.fit(linear, x, y)
    exact = tune_at_linear_mode(DenseLaplace(**QUIET).fit(linear, x, y), noise=True)  # type: ignore[arg-type]
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-3)
    assert float(found.log_precision) == pytest.approx(float(exact.log_precision), abs=0.05)
    assert found.noise_scale == pytest.approx(exact.noise_scale, rel=0.02)


@pytest.mark.parametrize(
    "structure",
    [DenseLaplace(**QUIET), DiagonalLaplace(**QUIET), KroneckerLaplace(**QUIET), LowRankLaplace(rank=20, **QUIET)],
    ids=lambda s: type(s).__name__,
)
def test_every_structure_raises_the_evidence_and_predicts(structure: Any) -> None:
    x, y = _classes()
    online = OnlineLaplace(structure=structure, num_epochs=30, every=3, burn_in=6, step_size=0.05)
    found = online.fit(network, x, y)
    assert len(found.history) == 8
    assert found.log_evidence == pytest.approx(max(found.history), abs=1e-8)  # the best that was seen
    assert found.log_evidence > found.log_evidence_before
    assert set(found.scales) == {"w1", "b1", "w2", "b2"}
    probs = found.posterior.predict(x).probs
    assert float((probs.argmax(-1) == y).double().mean()) > 0.7
    assert found.posterior.info.gradients >= 30
    assert found.posterior.info.seconds > 0


def test_minibatches_loaders_and_seeds() -> None:
    x, y = _classes()
    online = OnlineLaplace(structure=KroneckerLaplace(**QUIET), num_epochs=5, batch_size=20, groups="all")
    first, again, other = (online.fit(network, x, y, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.posterior.mean_theta, again.posterior.mean_theta)
    assert torch.equal(first.log_precision, again.log_precision)
    assert not torch.equal(first.posterior.mean_theta, other.posterior.mean_theta)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    loaded = OnlineLaplace(structure=KroneckerLaplace(**QUIET), num_epochs=5, groups="all").fit(network, loader, seed=1)
    assert torch.equal(loaded.posterior.mean_theta, first.posterior.mean_theta)


def test_only_the_named_sites_change_their_prior() -> None:
    x, y = _classes()
    online = OnlineLaplace(structure=KroneckerLaplace(**QUIET), num_epochs=5, sites="w*")
    found = online.fit(network, x, y)
    assert set(found.scales) == {"w1", "w2"}
    assert found.posterior.target.log_prior(torch.zeros(51)).isfinite()


def test_polishing_ends_at_a_mode_of_the_tuned_model() -> None:
    x, y = _classes()
    online = OnlineLaplace(structure=KroneckerLaplace(**QUIET), num_epochs=20, step_size=0.05, polish_steps=500)
    posterior = online.fit(network, x, y).posterior
    gradient = torch.func.grad(posterior.target.log_density)(posterior.mean_theta)
    assert float(gradient.norm()) < 1e-4


def test_how_far_the_end_is_from_a_mode_is_said() -> None:
    x, y = _classes()
    with pytest.warns(ApproximationWarning, match="not at a mode: the Newton decrement"):
        OnlineLaplace(structure=KroneckerLaplace(**QUIET), num_epochs=1, step_size=1e-4).fit(network, x, y)


def test_a_diverging_training_is_stopped() -> None:
    x, y = _regression()
    with pytest.raises(NonFiniteError, match="step .*: the loss is .*; try a smaller `step_size`"):
        OnlineLaplace(structure=DenseLaplace(**QUIET), num_epochs=50, step_size=1e200).fit(linear, x, y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": "kron"}, "`structure` must be a Laplace backend such as KroneckerLaplace"),
        ({"num_epochs": 0}, "`num_epochs` must be an integer >= 1, got 0"),
        ({"every": 0}, "`every` must be an integer >= 1, got 0"),
        ({"burn_in": 300}, "`burn_in` must be below num_epochs = 300, got 300"),
        ({"hyper_step_size": 0.0}, "`hyper_step_size` must be > 0, got 0.0"),
        ({"step_size": math.inf}, "`step_size` must be > 0, got inf"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineLaplace(**fields)


def test_the_noise_of_class_labels_cannot_be_learnt() -> None:
    with pytest.raises(ValueError, match="only the noise of a Normal likelihood of known scale"):
        OnlineLaplace(structure=DiagonalLaplace(**QUIET), noise=True).fit(network, *_classes())
