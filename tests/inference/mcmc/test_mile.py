from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import MAP, MILE, DeepEnsemble, DenseLaplace
from inference.errors import ConvergenceWarning
from tests.inference.mcmc.test_hamiltonian import data, linear

MEMBERS = DeepEnsemble(num_steps=30, batch_size=4, compile=False)
SHORT: dict[str, Any] = {
    "num_samples": 20,
    "warmup_steps": 100,
    "num_chains": 3,
    "thinning": 2,
    "start": MEMBERS,
    "compile": False,
}


def test_without_sampling_steps_it_is_the_deep_ensemble_exactly() -> None:
    x, y = data()
    ensemble = DeepEnsemble(num_members=3, num_steps=30, batch_size=4, compile=False).fit(linear, x, y, seed=5)
    posterior = MILE(**{**SHORT, "num_samples": 0}).fit(linear, x, y, seed=5)
    assert posterior.draws.shape == (3, 1, 2)
    assert torch.equal(posterior.draws[:, 0], ensemble.draws[0])
    assert torch.equal(posterior.predict(x).mean, ensemble.predict(x).mean)
    assert posterior.info.gradients == ensemble.info.gradients


@pytest.mark.parametrize(("num", "num_steps", "fraction"), [(40, 1000, 0.125), (12, 500, 0.125), (7, 500, None)])
def test_without_a_start_the_members_are_a_deep_ensemble_trained_as_published(
    num: int, num_steps: int, fraction: float | None
) -> None:
    x, y = data(num)
    ensemble = DeepEnsemble(
        num_members=3,
        num_steps=num_steps,  # 500 epochs
        step_size=1e-3,
        batch_size=32,
        schedule="constant",
        prior=False,
        weight_decay=1e-3,
        validation_fraction=fraction,
        patience=10,
        compile=False,
    ).fit(linear, x, y, seed=2)
    posterior = MILE(**{**SHORT, "num_samples": 0, "start": None}).fit(linear, x, y, seed=2)
    assert torch.equal(posterior.draws[:, 0], ensemble.draws[0])
    assert posterior.info.extra["steps"] == ensemble.info.extra["steps"]


def test_a_model_with_a_parameter_per_datum_is_trained_without_a_validation_part() -> None:
    def local(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x[:, 0], 1.0), obs=y)

    posterior = MILE(**{**SHORT, "num_samples": 0, "start": None}).fit(local, *data(20))
    assert posterior.info.extra["steps"] == [500] * 3


def test_chains_leave_from_the_members() -> None:
    x, y = data()
    members = MILE(**{**SHORT, "num_samples": 0}).fit(linear, x, y, seed=1).draws[:, 0]
    fixed = {**SHORT, "num_samples": 4, "warmup_steps": 0, "thinning": 1, "step_size": 1e-7, "decoherence_length": 1.0}
    draws = MILE(**fixed).fit(linear, x, y, seed=1).draws[:, 0]
    torch.testing.assert_close(draws, members, rtol=0, atol=1e-6)
    assert not torch.equal(draws, members)


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
def test_the_posterior_has_a_chain_per_member_and_counts_all_gradients() -> None:
    x, y = data()
    posterior = MILE(**SHORT).fit(linear, x, y, seed=0)
    assert posterior.draws.shape == (3, 10, 2)
    training = 3 * 30 * 4 / len(x)
    assert posterior.info.gradients == pytest.approx(training + 3 * (1 + 2 * 120))


def test_the_goal_falls_linearly_from_a_coarse_one() -> None:
    tuning = MILE().tuning(100)
    assert (tuning.first_goal, tuning.last_goal) == (0.5, 0.1)
    assert tuning.steps == (40_000, 5_000, 0, 5_000)
    assert tuning.step_size == 1e-3
    assert tuning.length == 15.0
    assert MILE().tuning(400).length == 20.0
    assert (MILE().num_chains, MILE().num_samples, MILE().thinning, MILE().window) == (12, 10_000, 10, 100.0)


def test_init_without_a_start_gives_the_members() -> None:
    x, y = data()
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    posterior = MILE(**{**SHORT, "num_samples": 0, "start": None}).fit(linear, x, y, init=points)
    assert torch.equal(posterior.draws[:, 0], points)


def test_any_backend_may_give_the_members() -> None:
    x, y = data()
    start = DenseLaplace(start=MAP(num_steps=100, compile=False), compile=False)
    posterior = MILE(**{**SHORT, "num_samples": 0, "start": start}).fit(linear, x, y)
    assert len(torch.unique(posterior.draws[:, 0], dim=0)) == 3


def test_a_start_with_too_few_points_is_refused() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="`start` gives 1 points, but `num_chains` is 3"):
        MILE(**{**SHORT, "start": MAP(num_steps=5, compile=False)}).fit(linear, x, y)


def test_warm_up_ends_near_the_energy_error_it_aims_at() -> None:
    def flat(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[0] * x, 1.0), obs=y)

    settings = {**SHORT, "num_samples": 400, "warmup_steps": 600, "decoherence_length": 6.0, "initial_step_size": 1.0}
    posterior = MILE(**{**settings, "num_chains": 4}).fit(flat, torch.ones(6), torch.ones(6), seed=0)
    found = torch.tensor(posterior.info.extra["energy_variance"])
    assert float(found.mean()) == pytest.approx(0.1, rel=0.6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": -1}, "`num_samples` must be an integer >= 1, got -1"),
        ({"num_samples": 0, "num_chains": 0}, "`num_chains` must be an integer >= 1, got 0"),
        ({"initial_energy_variance": 0.0}, "`initial_energy_variance` must be > 0, got 0.0"),
        ({"warmup_steps": 0}, "`warmup_steps` must be >= 1 where something is tuned"),
        ({"temperature": 0.0}, "`temperature` must be > 0, got 0.0"),
    ],
)
def test_bad_fields_are_refused_before_any_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MILE(**fields)


def test_an_undertuned_run_warns() -> None:
    x, y = data()
    backend = MILE(**{**SHORT, "warmup_steps": 4, "energy_variance": 1e-12, "initial_step_size": 0.5})
    with pytest.warns(ConvergenceWarning, match="per parameter, where 1e-12 was aimed at"):
        backend.fit(linear, x, y, seed=0)
