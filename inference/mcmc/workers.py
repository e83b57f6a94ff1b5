"""Chains in worker processes: each records its own program and runs whole blocks of chains.

What travels to a worker is the recorded graph of the density, not the model, so a model need not be picklable. A
chain's draws are those of one process to the bit as long as its block is the same (``chains_per_block``) and so is the
number of threads.
"""

from __future__ import annotations

import importlib
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor, fx

from inference.backend import Bar
from inference.data import shapes
from inference.double import with_precise_prior
from inference.graph import Captured, CompileOption, capture
from inference.mcmc.chain import Observer, Schedule
from inference.mcmc.chains import Ensemble, Interrupts
from inference.mcmc.checkpoint import Checkpoint
from inference.mcmc.lanes import Kernel, Transition
from inference.mcmc.metrics import Metric
from inference.mcmc.recording import Recorder, Recording
from inference.target import Target, random_stream


class Portable:
    """A function of tensors as the graph that it performed, which travels between processes.

    Args:
        fn: Function of tensors.
        *example: Its arguments.
    """

    def __init__(self, fn: Callable[..., Any], *example: Tensor) -> None:
        captured = capture(fn, *example, final=False)
        self.graph = _Graph(captured.module)
        self.single = captured.single

    def __call__(self, *args: Tensor) -> Any:
        """Replay the graph."""
        out = self.graph.module(*args)
        return out[0] if self.single else tuple(out)


class _Graph:
    """A graph that finds what it needs in a fresh process."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def __getstate__(self) -> bytes:
        return pickle.dumps(self.module)

    def __setstate__(self, state: bytes) -> None:
        # Unpickling a graph traces it, and its tracer takes this module for imported.
        importlib.import_module("torch._higher_order_ops.triton_kernel_wrap")
        self.module = pickle.loads(state)


@dataclass(frozen=True)
class Job:
    """What a worker needs to run some chains.

    Attributes:
        log_density: Function of theta (P,) and ``data``, () nats.
        data: Tensors handed to it.
        starts: Starting points of all chains, (C, P).
        seed: Of the fit.
        first_stream: Number of the random stream of chain 0.
        kernel: Trajectories.
        schedule: Lengths and adaptation.
        metric: Mass matrix at the start.
        recording: What is kept.
        compile: See :func:`inference.graph.hot`.
        chains_per_block: Chains that one call advances.
        checkpoint: Where chains write their state.
    """

    log_density: Callable[..., Tensor]
    data: tuple[Tensor, ...]
    starts: Tensor
    seed: int
    first_stream: int
    kernel: Kernel
    schedule: Schedule
    metric: Metric
    recording: Recording
    compile: CompileOption
    chains_per_block: int
    checkpoint: Checkpoint | None

    def ensemble(self, recorder: Recorder, observe: Observer) -> Ensemble:
        """The chains of ``recorder``.

        Args:
            recorder: Receives their draws.
            observe: Called after every iteration.

        Returns:
            Chains ready to run, continued from the checkpoint if there is one.
        """
        return Ensemble(
            self.log_density,
            self.starts,
            [random_stream(self.seed, self.first_stream + c, self.starts.device) for c in range(len(self.starts))],
            self.kernel,
            self.schedule,
            metric=self.metric,
            recorder=recorder,
            numbers=recorder.numbers,
            data=self.data,
            compile=self.compile,
            chains_per_block=self.chains_per_block,
            checkpoint=self.checkpoint,
            observe=observe,
        )

    def run(self, recorder: Recorder, max_seconds: float | None, bar: Bar) -> Outcome:
        """Run the chains here.

        Args:
            recorder: Receives their draws.
            max_seconds: Time limit.
            bar: Advances with the iterations.

        Returns:
            How they ended.
        """
        ensemble = self.ensemble(recorder, _figures(bar))
        bar.advance(sum(chain.iterations for chain in ensemble.chains.values()))
        ensemble.run(max_seconds)
        return Outcome.of(ensemble)


@dataclass(frozen=True)
class Outcome:
    """How the chains of a fit ended.

    Attributes:
        stopped: What ended them early, if anything did.
        gradients: Leapfrogs of all chains.
        warmed_up: Iterations of warm-up done, per chain.
        warmup_divergences: Divergences in them, per chain.
    """

    stopped: str | None
    gradients: int
    warmed_up: list[int]
    warmup_divergences: list[int]

    @classmethod
    def of(cls, ensemble: Ensemble) -> Outcome:
        """That of an ensemble that has run."""
        chains = ensemble.chains.values()
        return cls(
            ensemble.stopped,
            ensemble.gradients,
            [c.warmed_up for c in chains],
            [c.warmup_divergences for c in chains],
        )


def run_in_workers(
    job: Job, recorder: Recorder, target: Target, num_workers: int, max_seconds: float | None, bar: Bar
) -> Outcome:
    """Run chains in processes of their own.

    Args:
        job: The chains.
        recorder: Receives their draws; its files exist already.
        target: Supplies the graph of the density.
        num_workers: Largest number of processes.
        max_seconds: Time limit, the start of the processes included.
        bar: Advances with the iterations of all chains.

    Returns:
        How they ended.

    Raises:
        ValueError: If something cannot be sent to another process, or the target is not on a CPU.
    """
    if target.device.type != "cpu":
        raise ValueError(f"`num_workers` must be 1 for a model on {target.device}: processes would share the device")
    deadline = None if max_seconds is None else time.time() + max_seconds
    size, num_chains = job.chains_per_block, len(job.starts)
    blocks = [list(range(i, min(i + size, num_chains))) for i in range(0, num_chains, size)]
    shares = [sum(blocks[w::num_workers], []) for w in range(min(num_workers, len(blocks)))]
    probe = job.recording.probe
    recording = replace(job.recording, probe=None if probe is None else Portable(probe, job.starts[0]))
    job = replace(job, log_density=portable_density(target), recording=recording)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder) / "board"
        np.memmap(board, np.int64, "w+", shape=(1 + len(shares),)).flush()
        calls = [
            joblib.delayed(_work)(job, share, deadline, str(board), slot, threads, dtype)
            for slot, share in enumerate(shares)
        ]
        results = _wait(lambda: joblib.Parallel(n_jobs=len(shares), backend="loky")(calls), board, bar)
    order = [number for share in shares for number in share]
    outcomes = [outcome for outcome, _ in results]
    for records, share in zip([r for _, r in results], shares, strict=True):
        for number, held in zip(share, records, strict=True):
            recorder.records[number].adopt(*held)
    stops = [o.stopped for o in outcomes if o.stopped is not None]
    stopped = stops[0] if stops else None
    return Outcome(
        f"max_seconds={max_seconds:g}" if stopped is not None and stopped.startswith("max_seconds") else stopped,
        sum(o.gradients for o in outcomes),
        _sorted(order, [n for o in outcomes for n in o.warmed_up]),
        _sorted(order, [n for o in outcomes for n in o.warmup_divergences]),
    )


def portable_density(target: Target) -> Callable[..., Tensor]:
    """The tempered log density as a recorded graph, without the model, with its sums in float64.

    Acceptance needs differences well below 1 nat of energies of 1e4 to 1e6, which float32 sums do not carry.

    Args:
        target: The target.

    Returns:
        Function of theta (P,) and the leaves of the data, giving () nats in float64. Its ``recorded`` holds what chains
        record of it, for the next fit.
    """
    zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
    target.log_density(zero)  # records the joint density if nobody has
    key = ("joint", shapes((target.x, target.y)), target.device)
    joint = with_precise_prior(target.programs.cache[key].module)
    expand = None if target.kept is None else Portable(target.expand, zero)
    temperatures = target.likelihood_temperature, target.temperature
    # What is fixed in a restricted target is in its graph, so that one is recorded afresh.
    recorded = {} if target.kept is not None else target.programs.steps.setdefault((*key, *temperatures), {})
    return _Density(_Graph(joint), expand, *temperatures, recorded)


@dataclass(frozen=True)
class _Density:
    joint: _Graph
    expand: Portable | None
    likelihood_temperature: float
    temperature: float
    recorded: dict[Any, Captured]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "recorded": {}}  # compiled code stays in its process

    def __call__(self, theta: Tensor, *leaves: Tensor) -> Tensor:
        full = theta if self.expand is None else self.expand(theta)
        prior, likelihood = self.joint.module(full.contiguous(), *(leaf.contiguous() for leaf in leaves))
        return (prior.double() + likelihood.double().sum() / self.likelihood_temperature) / self.temperature


def _work(
    job: Job,
    numbers: Sequence[int],
    deadline: float | None,
    board: str,
    slot: int,
    threads: int,
    dtype: torch.dtype,
) -> tuple[Outcome, list[Any]]:
    """Run in the worker: some chains from their start to their end."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the main one passes it on
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    counts = np.memmap(board, np.int64, "r+")  # whether to stop, and iterations of each worker

    def observe(transition: Transition, step_size: float) -> None:
        counts[1 + slot] += 1

    recorder = Recorder(job.recording, job.starts, numbers)
    ensemble = job.ensemble(recorder, observe)
    counts[1 + slot] = sum(chain.iterations for chain in ensemble.chains.values())
    left = None if deadline is None else max(deadline - time.time(), 0.0)
    ensemble.run(left, lambda: bool(counts[0]))
    recorder.close()
    return Outcome.of(ensemble), [record.contents() for record in recorder.records]


def _wait(call: Callable[[], Any], board: Path, bar: Bar) -> Any:
    """Run joblib in a thread, and meanwhile show progress and pass Ctrl-C on to the workers."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # raised again in the main thread
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    counts = np.memmap(board, np.int64, "r+")
    shown = 0
    with Interrupts() as interrupts:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            done = int(counts[1:].sum())
            bar.advance(done - shown)
            shown = done
            if interrupts.asked:
                counts[0] = 1
    result = found[0]
    if isinstance(result, pickle.PicklingError):
        raise ValueError(f"the chains cannot be sent to worker processes ({result}); use num_workers=1") from result
    if isinstance(result, BaseException):
        raise result
    return result


def _sorted(numbers: Sequence[int], values: Sequence[int]) -> list[int]:
    by_number: Mapping[int, int] = dict(zip(numbers, values, strict=True))
    return [by_number[n] for n in sorted(by_number)]


def _figures(bar: Bar) -> Observer:
    divergences = 0

    def observe(transition: Transition, step_size: float) -> None:
        nonlocal divergences
        divergences += transition.diverging
        bar.advance(
            1,
            acceptance=transition.acceptance,
            divergences=divergences,
            leapfrogs=transition.num_steps,
            step_size=step_size,
        )

    return observe
