r"""Many Hamiltonian chains in one process, each at its own pace.

Every chain is a generator: it puts a state into its lane of a block, yields, and is sent the energies of the state one
leapfrog later. The :class:`Ensemble` advances all lanes by one recorded call, so chains share the cost of dispatching
but never wait for each other: a chain whose trajectory has ended starts the next one at once. A chain draws all its
randomness from its own stream, so it depends on its neighbours only through the rounding of batched products: to the
bit it is a function of its place in its block and of the sizes the block goes through.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Self

import torch
from torch import Tensor

from inference.graph import CompileOption
from inference.mcmc.chain import Chain, Observer, Schedule
from inference.mcmc.checkpoint import Checkpoint, check_draws
from inference.mcmc.integrators import LeapfrogProgram, LogDensity, leapfrog_program
from inference.mcmc.lanes import Block, Kernel, Lane
from inference.mcmc.metrics import Metric
from inference.mcmc.recording import Recorder
from inference.mcmc.shards import ShardedDensity, shard_program

# Recording a smaller graph takes about as long as this many leapfrogs of a small network.
_REGROUP_CALLS = 500


class Ensemble:
    """All chains of one fit that one process runs, and the loop that advances them.

    Args:
        log_density: Function of theta (P,) and ``data``, () nats.
        starts: Starting points, (C, P).
        streams: One random stream per chain.
        kernel: Trajectories.
        schedule: Lengths and adaptation.
        metric: Mass matrix that every chain starts with.
        recorder: Receives the draws.
        numbers: Numbers of the chains that run here, in the order of ``recorder.records``; all by default.
        data: Tensors handed to ``log_density``.
        compile: See :func:`inference.graph.hot`.
        chains_per_block: Chains that one call advances; None for all.
        checkpoint: Where chains write their state, and continue from if there is one. Blocks keep their size then:
            in a smaller one products round differently, and a resumed chain would not be the uninterrupted one.
        observe: Called after every iteration of every chain.
    """

    def __init__(
        self,
        log_density: LogDensity,
        starts: Tensor,
        streams: Sequence[torch.Generator],
        kernel: Kernel,
        schedule: Schedule,
        *,
        metric: Metric,
        recorder: Recorder,
        numbers: Sequence[int] | None = None,
        data: Sequence[Tensor] = (),
        compile: CompileOption = False,
        chains_per_block: int | None = None,
        checkpoint: Checkpoint | None = None,
        observe: Observer = lambda transition, step_size: None,
    ) -> None:
        self.log_density, self.data = log_density, tuple(data)
        self.kernel, self.schedule = kernel, schedule
        self.checkpoint = checkpoint
        self.stopped: str | None = None
        chosen = list(range(len(starts))) if numbers is None else list(numbers)
        held = {} if checkpoint is None else checkpoint.read(chosen)
        self.compile: CompileOption = compile if checkpoint is None or not held else checkpoint.compiled
        self.lanes = [Lane(c, streams[c], metric) for c in chosen]
        self.records = recorder.records
        size = chains_per_block or len(chosen)
        total = (schedule.num_samples + schedule.warmup_steps) * kernel.expected_steps
        groups = [self.lanes[i : i + size] for i in range(0, len(chosen), size)]
        programs: dict[int, LeapfrogProgram] = {}
        self.blocks: list[Block] = []
        for group in groups:
            rows = starts.new_zeros(4, len(group), starts.shape[1])
            if len(group) not in programs:
                # Counted over all chains of the fit, so that processes which share them decide alike.
                programs[len(group)] = self._program(rows, total * (len(starts) // len(group)))
            self.blocks.append(Block(programs[len(group)], group, rows))
        self.chains = {
            lane.chain: Chain(lane, starts[lane.chain], kernel, schedule, record, observe, checkpoint is not None)
            for lane, record in zip(self.lanes, self.records, strict=True)
        }
        if checkpoint is not None:
            checkpoint.attach(self.chains, held, any(p.compiled for p in programs.values()))
            check_draws(recorder, checkpoint.directory)
        self._resumed = sum(chain.gradients for chain in self.chains.values())

    @property
    def gradients(self) -> int:
        """Gradients of all chains, those before a resumed checkpoint included."""
        return self._resumed + sum(lane.leapfrogs for lane in self.lanes)

    @torch.no_grad()
    def run(self, max_seconds: float | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Run every chain to its end, or to Ctrl-C or the time limit; ``stopped`` says which.

        Args:
            max_seconds: Time limit.
            stop: Asked before every leapfrog; True is taken for Ctrl-C.
        """
        deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        try:
            with Interrupts() as interrupts:
                self._start()
                while self.blocks:
                    if interrupts.asked or stop():
                        self.stopped = "an interrupt"
                        break
                    if time.monotonic() > deadline:
                        self.stopped = f"max_seconds={max_seconds:g}"
                        break
                    for block in list(self.blocks):
                        self._advance(block)
        except KeyboardInterrupt:
            self.stopped = "an interrupt"
        if self.checkpoint is not None:
            self.checkpoint.write_all()

    def _start(self) -> None:
        self._running = {number: chain.run() for number, chain in self.chains.items()}
        for lane in self.lanes:
            try:
                next(self._running[lane.chain])
            except StopIteration:  # it came from a checkpoint at its end
                lane.finish()
        for block in list(self.blocks):
            if all(lane.finished for lane in block.lanes):
                self.blocks.remove(block)

    def _advance(self, block: Block) -> None:
        ended = False
        for lane, scalars in block.advance():
            try:
                self._running[lane.chain].send(scalars)
            except StopIteration:
                lane.finish()
                ended = True
        if ended:
            self._regroup(block)

    def _regroup(self, block: Block) -> None:
        """Leave finished lanes behind where the others' remaining work repays recording a smaller graph."""
        running = [lane for lane in block.lanes if not lane.finished]
        if not running:
            self.blocks.remove(block)
            return
        remaining = max(self._remaining_steps(lane) for lane in running)
        # A compiled leapfrog costs less than half an eager one, so a few idle lanes are cheaper to carry along.
        few = block.program.compiled and len(running) > 0.4 * len(block.lanes)
        if self.checkpoint is not None or remaining < _REGROUP_CALLS or few:
            return
        rows = block.state[:, [lane.index for lane in running]].contiguous()
        smaller = self._program(rows, remaining)
        self.blocks[self.blocks.index(block)] = Block(smaller, running, rows)

    def _remaining_steps(self, lane: Lane) -> int:
        chain = self.chains[lane.chain]
        left = self.schedule.warmup_steps - chain.warmed_up + self.schedule.num_samples - chain.record.num_seen
        done = chain.warmed_up + chain.record.num_seen
        return int(left * (chain.gradients / done if done else self.kernel.expected_steps))

    def _program(self, rows: Tensor, num_calls: float) -> LeapfrogProgram:
        inverse_mass = torch.stack([self.lanes[0].metric.inverse_mass] * rows.shape[1])
        if isinstance(self.log_density, ShardedDensity):
            return shard_program(self.log_density, rows, inverse_mass, compile=self.compile, num_calls=num_calls)
        return leapfrog_program(
            self.log_density,
            rows,
            inverse_mass,
            data=self.data,
            num_slots=self.kernel.num_slots,
            compile=self.compile,
            num_calls=num_calls,
        )


class Interrupts:
    """Ctrl-C as a question to the loop, so that no chain is torn apart inside a stage; twice it is an error."""

    asked = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._handles = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._handles:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
