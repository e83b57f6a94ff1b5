"""Trajectories in C++ against their slow twin in Python: the same draws to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import HMC as HMCBackend
from inference import NUTS as NUTSBackend
from inference.graph import compiler_available
from inference.mcmc import native
from inference.mcmc.hmc import HMCKernel
from inference.mcmc.integrators import LeapfrogProgram
from inference.mcmc.lanes import Kernel
from inference.mcmc.nuts import NUTSKernel
from tests.inference.mcmc.sampling import HMC, NUTS, CorrelatedGaussian, data, ensemble, transitions
from tests.inference.mcmc.test_chains import FIXED, wide_or_narrow

KERNELS = {
    "tree": NUTS,
    "shallow tree": NUTSKernel(max_tree_depth=2),
    "one doubling": NUTSKernel(max_tree_depth=1),
    "steps": HMC,
    "fixed steps": HMCKernel(trajectory_length=1.0, num_leapfrogs=5, jitter=0.0, max_leapfrogs=1000),
}


@contextmanager
def followed_natively(monkeypatch: pytest.MonkeyPatch, wanted: bool = True) -> Iterator[None]:
    """Blocks of eager programs pass for compiled ones, whose trajectories run in C++."""
    with monkeypatch.context() as patch:
        patch.setattr(LeapfrogProgram, "compiled", property(lambda program: True))
        if not wanted:
            patch.setattr(native, "load", lambda: None)
        yield


def chains(log_density: object, starts: Tensor, kernel: Kernel, **changes: object) -> tuple[Tensor, list, int]:
    running = ensemble(log_density, starts, kernel, **changes)  # type: ignore[arg-type]
    assert all((block.native is not None) == (native.load() is not None) for block in running.blocks)
    running.run()
    draws = torch.stack([record.draws for record in running.records])
    return draws, [transitions(record) for record in running.records], running.gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mass_matrix", ["diagonal", "low_rank"])
@pytest.mark.parametrize("name", KERNELS)
def test_draws_are_those_of_the_trajectories_in_python(
    name: str, mass_matrix: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaussian = CorrelatedGaussian(6)
    for field in ("loc", "precision"):
        setattr(gaussian, field, getattr(gaussian, field).to(dtype))
    options = {"num_samples": 40, "warmup_steps": 60, "mass_matrix": mass_matrix}
    found = []
    for wanted in (True, False):
        with followed_natively(monkeypatch, wanted):
            found.append(chains(gaussian.log_density, gaussian.sample(3).to(dtype), KERNELS[name], **options))
    (draws, moves, gradients), (twin, twin_moves, twin_gradients) = found
    assert torch.equal(draws, twin)
    assert draws.dtype == dtype
    assert moves == twin_moves
    assert gradients == twin_gradients


@pytest.mark.parametrize("name", ["tree", "steps"])
def test_divergences_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def funnel(theta: Tensor) -> Tensor:
        return -0.5 * (theta[0] / 3).square() - 0.5 * (theta[1:].square() * (-theta[0]).exp() + theta[0]).sum()

    starts = torch.tensor([[0.5, 0.1, -0.2], [-1.0, 0.3, 0.1]])
    fixed = {"num_samples": 60, "warmup_steps": 0, "step_size": 1.6, "adapt_step_size": False}
    found = []
    for wanted in (True, False):
        with followed_natively(monkeypatch, wanted):
            found.append(chains(funnel, starts, KERNELS[name], **fixed))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert any(move.diverging for moves in found[0][1] for move in moves)


def test_chains_move_to_a_smaller_block_in_the_middle_of_their_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = torch.tensor([[200.0], [-200.0], [-200.5], [-201.0]])  # one long chain outlives three short ones
    found, sizes = [], []
    for wanted in (True, False):
        with followed_natively(monkeypatch, wanted):
            running = ensemble(wide_or_narrow, starts, num_samples=60, **FIXED)
            running.run()
            sizes.append([len(block.lanes) for block in running.blocks] + [len(running.lanes[0].block.lanes)])
            found.append([torch.stack([r.draws for r in running.records]), running.gradients])
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert sizes[0] == sizes[1] == [1]


def test_uniform_numbers_are_used_in_the_order_of_python_across_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussian = CorrelatedGaussian(2)
    states = []
    for wanted in (True, False):
        with followed_natively(monkeypatch, wanted):
            running = ensemble(gaussian.log_density, gaussian.sample(1), num_samples=200, warmup_steps=30)
            running.run()
            states.append(running.lanes[0].random_state())
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


@pytest.mark.parametrize("backend", [NUTSBackend, HMCBackend])
def test_a_checkpoint_of_one_kind_goes_on_as_the_other(
    backend: type[NUTSBackend] | type[HMCBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x, y = data()
    options = {"num_chains": 2, "warmup_steps": 100, "compile": False, "progress": False}
    draws = []
    for first, second in ((True, False), (False, True)):
        folder = tmp_path / str(first)
        with followed_natively(monkeypatch, first):
            backend(num_samples=20, checkpoint=folder, **options).fit(model, x, y, seed=1)
        with followed_natively(monkeypatch, second):
            draws.append(backend(num_samples=40, checkpoint=folder, **options).fit(model, x, y, seed=1).draws)
    assert torch.equal(*draws)


def test_without_a_compiler_trajectories_run_in_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native.load.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(native, "SOURCE", native.SOURCE.with_name("missing.cpp"))
            assert native.load() is None
        assert "trajectories run in Python" in caplog.text
    finally:
        native.load.cache_clear()
    assert (native.load() is not None) == compiler_available()
