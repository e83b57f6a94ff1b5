import os
import pickle
import signal
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.backend import Bar
from inference.errors import ConvergenceWarning, NonFiniteError
from inference.mcmc import HMC, NUTS, workers
from inference.mcmc.hamiltonian import precise_log_density
from inference.mcmc.workers import Portable
from inference.posterior import DrawsPosterior
from inference.target import Target, compile_target
from tests.inference.mcmc.sampling import data

FIELDS: dict[str, Any] = {"num_samples": 30, "warmup_steps": 40, "num_chains": 4, "progress": False, "compile": False}


def make_model() -> Any:
    scale = threading.Lock()  # a closure over something that cannot be pickled

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.Gamma(4.0, 8.0))
        with scale, pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(torch.tanh(x @ weight), noise), obs=y)

    return model


@cache
def target() -> Target:
    return compile_target(make_model(), *data())


def fit(sampler: type = NUTS, at: Target | None = None, **changes: Any) -> DrawsPosterior:
    posterior = sampler(**{**FIELDS, **changes}).fit_to(at or target(), seed=1)
    assert isinstance(posterior, DrawsPosterior)
    return posterior


def assert_same(found: DrawsPosterior, expected: DrawsPosterior) -> None:
    assert torch.equal(found.draws, expected.draws)
    assert all(torch.equal(found.sample_stats[k], v) for k, v in expected.sample_stats.items())
    assert found.info.gradients == expected.info.gradients
    assert found.info.extra == expected.info.extra


def test_a_density_travels_as_its_graph() -> None:
    full = target().tempered(2.0, 3.0)
    for each in (full, full.restrict("weight", torch.tensor([0.1, 0.2, 0.3]))):
        density, tensors = precise_log_density(each)
        theta = torch.linspace(-1, 1, each.dim)
        travelled = pickle.loads(pickle.dumps(density))
        assert torch.equal(travelled(theta, *tensors), density(theta, *tensors))
        torch.testing.assert_close(density(theta, *tensors), each.log_density(theta), rtol=1e-12, atol=0)
    doubled = Portable(lambda a, b: (a + b, a * b), torch.ones(2), torch.ones(2))
    assert [v.tolist() for v in doubled(torch.ones(2), torch.full((2,), 3.0))] == [[4.0, 4.0], [3.0, 3.0]]


@pytest.mark.parametrize("sampler", [NUTS, pytest.param(HMC, marks=pytest.mark.slow)])
def test_draws_of_workers_are_those_of_one_process(sampler: type) -> None:
    assert_same(fit(sampler, num_workers=2), fit(sampler, chains_per_block=2))


@pytest.mark.slow
def test_a_last_block_that_is_smaller_is_the_same_too() -> None:
    assert_same(fit(num_workers=2, chains_per_block=3), fit(chains_per_block=3))


@pytest.mark.slow
def test_more_workers_than_chains_are_not_started() -> None:
    assert_same(fit(num_workers=9, num_chains=2), fit(chains_per_block=1, num_chains=2))


def test_what_is_recorded_comes_back_from_workers(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"thinning": 4, "keep": "noise", "probe_inputs": data()[0][:3]}
    alone = fit(chains_per_block=2, **fields)
    for more in ({}, {"draws_on_disk": tmp_path}):
        found = fit(num_workers=2, **fields, **more)
        assert_same(found, alone)
        assert found.probe_values is not None
        assert alone.probe_values is not None
        assert torch.equal(found.probe_values, alone.probe_values)


@pytest.mark.slow
def test_a_restricted_target_runs_in_workers() -> None:
    at = target().restrict("weight", torch.tensor([0.1, 0.2, 0.3]))
    assert_same(fit(at=at, num_workers=2), fit(at=at, chains_per_block=2))


@pytest.mark.slow
def test_workers_go_on_from_a_checkpoint_and_may_change_in_number(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_samples": 400, "checkpoint_every": 10, "target_accept": 0.95}
    whole = fit(checkpoint=tmp_path / "whole", chains_per_block=2, **fields)
    with pytest.raises((TimeoutError, ConvergenceWarning), match="max_seconds=1 ended the run"):
        fit(checkpoint=tmp_path / "part", num_workers=2, max_seconds=1, **{**fields, "num_samples": 10**5})
    first = fit(checkpoint=tmp_path / "part", **fields)
    assert_same(first, whole)
    longer = fit(checkpoint=tmp_path / "part", num_workers=2, **{**fields, "num_samples": 450})
    assert torch.equal(longer.draws[:, :400], whole.draws)
    with pytest.raises(ValueError, match=r"with `chains_per_block`=2, got 4: rounding would differ"):
        fit(checkpoint=tmp_path / "part", chains_per_block=4, **fields)


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Bar.advance

    def advance(self: Bar, steps: int = 1, **figures: float) -> None:
        seen.append(steps)
        if sum(seen) > 400 and len([s for s in seen if s < 0]) == 0:
            seen.append(-(10**9))
            os.kill(os.getpid(), signal.SIGINT)
        original(self, steps, **figures)

    monkeypatch.setattr(Bar, "advance", advance)
    with pytest.warns(ConvergenceWarning, match="an interrupt ended the run"):
        posterior = fit(num_workers=2, num_samples=10**6)
    assert posterior.draws.shape[0] == 4
    assert bool(torch.isfinite(posterior.draws).all())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_progress_of_workers_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Bar, "advance", lambda self, n=1, **figures: steps.append(n))
    fit(num_workers=2)
    assert sum(steps) == 4 * 70


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_one_of_one_process() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            loc = torch.where(x > 2, weight / 0.0, weight)
            pyro.sample("y", dist.Normal(loc, 1.0, validate_args=False), obs=y)

    broken = compile_target(model, torch.arange(4.0), torch.zeros(4))
    with pytest.raises(NonFiniteError, match="likelihood of site 'y' is not finite at 1 data, the first at row 3"):
        fit(at=broken, num_workers=2)


def test_what_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "portable_density", lambda target: threading.Lock())
    with pytest.raises(ValueError, match="cannot be sent to worker processes .*; use num_workers=1"):
        fit(num_workers=2)


@pytest.mark.parametrize("field", ["num_workers", "chains_per_block"])
def test_bad_numbers_are_named(field: str) -> None:
    for sampler in (NUTS, HMC):
        with pytest.raises(ValueError, match=f"`{field}` must be an integer >= 1, got 0"):
            sampler(**{field: 0})
