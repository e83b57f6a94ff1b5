import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import Posterior
from inference.backend import Bar
from inference.errors import ConvergenceWarning
from inference.mcmc import HMC, NUTS, checkpoint
from inference.mcmc.lanes import Lane
from inference.posterior import DrawsPosterior
from inference.target import Target, compile_target
from tests.inference.mcmc.sampling import data

# Thinned, so that a checkpoint may fall between two kept draws; four chains that end at different times.
FIELDS: dict[str, Any] = {
    "num_samples": 60,
    "warmup_steps": 40,
    "num_chains": 4,
    "thinning": 3,
    "checkpoint_every": 7,
    "progress": False,
    "compile": False,
}
SAMPLERS = pytest.mark.parametrize("sampler", [NUTS, HMC])
# Quick: the storage that is laid out in most ways; all of them when slow.
MATRICES = pytest.mark.parametrize(
    "mass_matrix",
    ["dense", *(pytest.param(m, marks=pytest.mark.slow) for m in ("diagonal", "low_rank", "identity", "prior"))],
)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(x @ weight + bias, 0.5), obs=y)


@cache
def target() -> Target:
    return compile_target(linear, *data())


def fit(sampler: type, directory: Path | None, seed: int = 2, init: Any = None, **changes: Any) -> DrawsPosterior:
    posterior = sampler(**{**FIELDS, "checkpoint": directory, **changes}).fit_to(target(), seed=seed, init=init)
    assert isinstance(posterior, DrawsPosterior)
    return posterior


def assert_same(found: Posterior, expected: Posterior) -> None:
    assert isinstance(found, DrawsPosterior)
    assert isinstance(expected, DrawsPosterior)
    assert torch.equal(found.draws, expected.draws)
    assert found.sample_stats.keys() == expected.sample_stats.keys()
    for name, value in expected.sample_stats.items():
        assert torch.equal(found.sample_stats[name], value), name
    assert found.info.gradients == expected.info.gradients
    assert found.info.extra == expected.info.extra


def stop_after(monkeypatch: pytest.MonkeyPatch, iterations: int, error: type[BaseException]) -> None:
    """Raise after so many iterations of all chains, at the end of a stage as Ctrl-C does."""
    seen = 0
    original = Bar.advance

    def advance(self: Bar, steps: int = 1, **figures: float) -> None:
        nonlocal seen
        seen += "acceptance" in figures
        if seen == iterations:
            raise error
        original(self, steps, **figures)

    monkeypatch.setattr(Bar, "advance", advance)


_WHOLE: dict[str, DrawsPosterior] = {}


def uninterrupted(sampler: type, tmp_path: Path, **changes: Any) -> DrawsPosterior:
    key = repr((sampler, changes))
    if key not in _WHOLE:
        _WHOLE[key] = fit(sampler, tmp_path / "whole", **changes)
    return _WHOLE[key]


@SAMPLERS
@MATRICES
def test_an_interrupted_run_goes_on_to_the_same_draws(
    sampler: type, mass_matrix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uninterrupted(sampler, tmp_path, mass_matrix=mass_matrix)
    stop_after(monkeypatch, 330, KeyboardInterrupt)
    with pytest.warns(ConvergenceWarning, match=r"interrupt ended the run after \d+ of 20 draws a chain; the same"):
        part = fit(sampler, tmp_path / "part", mass_matrix=mass_matrix)
    monkeypatch.undo()
    kept = part.draws.shape[1]
    assert 0 < kept < 20
    assert torch.equal(part.draws, whole.draws[:, :kept])
    assert_same(fit(sampler, tmp_path / "part", mass_matrix=mass_matrix), whole)


@SAMPLERS
@pytest.mark.parametrize(
    "iterations", [1, 97, pytest.param(30, marks=pytest.mark.slow), pytest.param(150, marks=pytest.mark.slow)]
)
def test_a_crash_during_warmup_goes_on_from_the_last_checkpoint(
    sampler: type, iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uninterrupted(sampler, tmp_path)
    stop_after(monkeypatch, iterations, MemoryError)  # not handled, so nothing is written at the end
    with pytest.raises(MemoryError):
        fit(sampler, tmp_path / "part")
    monkeypatch.undo()
    assert_same(fit(sampler, tmp_path / "part"), whole)


def test_an_interrupt_during_warmup_says_where_the_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 20, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match=f"of 40 warm-up iterations.*goes on from {tmp_path}"):
        fit(NUTS, tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("chain-*"))) == 4
    assert_same(fit(NUTS, tmp_path), uninterrupted(NUTS, tmp_path))


@pytest.mark.parametrize("leapfrog", [5, 1234, pytest.param(333, marks=pytest.mark.slow)])
def test_a_chain_stopped_inside_a_stage_repeats_it(
    leapfrog: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inside a trajectory, or the search for a step size: random numbers of the stage are drawn already.
    whole = uninterrupted(NUTS, tmp_path)
    seen, original = 0, Lane.refresh

    def refresh(self: Lane, row: Tensor) -> Any:
        nonlocal seen
        seen += 1
        if seen == leapfrog // 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, row)

    monkeypatch.setattr(Lane, "refresh", refresh)
    with pytest.raises((KeyboardInterrupt, ConvergenceWarning), match="an interrupt ended the run"):
        fit(NUTS, tmp_path / "part")  # a warning is an error in tests
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(fit(NUTS, tmp_path / "part"), whole)


@pytest.mark.slow
def test_a_time_limit_may_be_raised_again_and_again(tmp_path: Path) -> None:
    whole = uninterrupted(NUTS, tmp_path, num_samples=300)
    for seconds in (0.01, 0.05, 0.1):  # a warning is an error in tests
        with pytest.raises((TimeoutError, ConvergenceWarning), match=f"max_seconds={seconds:g} ended the run"):
            fit(NUTS, tmp_path / "part", num_samples=300, max_seconds=seconds)
    assert_same(fit(NUTS, tmp_path / "part", num_samples=300), whole)


KILLED = """
import os, signal, sys
from functools import cache
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from inference.backend import Bar
from inference.mcmc import NUTS
from tests.inference.mcmc.test_checkpoint import fit
seen = 0
def advance(self, steps=1, **figures):
    global seen
    seen += 1
    if seen == 170:
        os.kill(os.getpid(), signal.SIGKILL)
Bar.advance = advance
fit(NUTS, Path(sys.argv[1]))
"""


def test_a_killed_process_is_continued_by_another(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    part = tmp_path / "part"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(part)], cwd=root, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert len(list(part.glob("chain-*.safetensors"))) == 4
    assert_same(fit(NUTS, part), uninterrupted(NUTS, tmp_path))


def test_a_chain_that_finished_earlier_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted(NUTS, tmp_path)
    original = checkpoint.Checkpoint.write

    def write(self: checkpoint.Checkpoint, number: int) -> None:
        original(self, number)
        if self._chains[number].done:
            raise MemoryError

    monkeypatch.setattr(checkpoint.Checkpoint, "write", write)
    with pytest.raises(MemoryError):
        fit(NUTS, tmp_path / "part")
    monkeypatch.undo()
    files = sorted((tmp_path / "part").glob("chain-*"))
    seen = [checkpoint.read_file(f, "", "bnn-zoo chain", 1)[0]["chain"]["record"]["num_seen"] for f in files]
    assert sorted(seen)[-1] == 60
    assert sorted(seen)[-2] < 60
    assert_same(fit(NUTS, tmp_path / "part"), whole)


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    whole = uninterrupted(NUTS, tmp_path)
    first = fit(NUTS, tmp_path / "part", num_samples=30)
    assert first.draws.shape[1] == 10
    assert_same(fit(NUTS, tmp_path / "part"), whole)
    assert torch.equal(first.draws, whole.draws[:, :10])
    again = fit(NUTS, tmp_path / "part", num_samples=45)  # shorter again: the first draws
    assert torch.equal(again.draws, whole.draws[:, :15])


def test_a_finished_run_is_read_without_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(NUTS, tmp_path)
    stop_after(monkeypatch, 1, AssertionError)
    assert_same(fit(NUTS, tmp_path), whole)


def test_checkpoints_change_nothing_but_rounding(tmp_path: Path) -> None:
    plain, kept = fit(NUTS, None), fit(NUTS, tmp_path)
    torch.testing.assert_close(kept.draws, plain.draws, rtol=1e-6, atol=1e-6)


def test_function_values_and_kept_sites_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"probe_inputs": data()[0][:3], "keep": "bias", "draws_on_disk": None}
    whole = uninterrupted(HMC, tmp_path, **fields)
    stop_after(monkeypatch, 250, MemoryError)
    with pytest.raises(MemoryError):
        fit(HMC, tmp_path / "part", **fields)
    monkeypatch.undo()
    found = fit(HMC, tmp_path / "part", **fields)
    assert_same(found, whole)
    assert found.probe_values is not None
    assert whole.probe_values is not None
    assert torch.equal(found.probe_values, whole.probe_values)


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_same_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted(NUTS, tmp_path, compile=True)
    stop_after(monkeypatch, 250, MemoryError)
    with pytest.raises(MemoryError):
        fit(NUTS, tmp_path / "part", compile=True)
    monkeypatch.undo()
    assert_same(fit(NUTS, tmp_path / "part", compile=True), whole)
