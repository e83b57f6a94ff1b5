r"""Many Hamiltonian chains in one process, each at its own pace.

Every chain is a generator: it puts a state into its lane of a block, yields, and is sent the energies of the state one
leapfrog later. The :class:`Ensemble` advances all lanes by one recorded call, so chains share the cost of dispatching
but never wait for each other: a chain whose trajectory has ended starts the next one at once. A chain draws all its
randomness from its own stream, so it does not depend on its neighbours (up to the rounding of batched products).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.errors import NonFiniteError
from inference.graph import CompileOption
from inference.mcmc.adaptation import DualAveraging, stan_windows
from inference.mcmc.integrators import GRADIENT, POSITION, LeapfrogProgram, LogDensity, leapfrog_program
from inference.mcmc.lanes import Block, Kernel, Lane, Point, Scalars, Transition
from inference.mcmc.metrics import CovarianceEstimator, MassMatrix, Metric

# Recording a smaller graph takes about as long as this many leapfrogs of a small network.
_REGROUP_CALLS = 500


@dataclass(frozen=True)
class Schedule:
    """How long chains run and what they adapt.

    Attributes:
        num_samples: Kept draws S per chain.
        warmup_steps: Discarded iterations per chain.
        step_size: First step size, or None for the doubling heuristic.
        adapt_step_size: Whether warm-up changes it.
        target_accept: Acceptance that dual averaging aims at.
        mass_matrix: "diagonal", "dense" or "identity".
    """

    num_samples: int
    warmup_steps: int
    step_size: float | None
    adapt_step_size: bool
    target_accept: float
    mass_matrix: MassMatrix


@dataclass
class Record:
    """Draws of one chain, filled while it runs.

    Attributes:
        draws: (S, P).
        log_densities: Per kept draw, nats.
        transitions: Per kept draw.
        step_sizes: Per kept draw.
        warmup_divergences: Divergences before the first kept draw.
        warmed_up: Iterations of warm-up done.
    """

    draws: Tensor
    log_densities: list[float] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    warmup_divergences: int = 0
    warmed_up: int = 0

    def __len__(self) -> int:
        return len(self.log_densities)


Observer = Callable[[Transition, float], None]


def run_chain(
    lane: Lane, start: Tensor, kernel: Kernel, schedule: Schedule, record: Record, observe: Observer
) -> Generator[None, Scalars, None]:
    """One chain from its starting point to its last draw.

    Args:
        lane: Where it lives.
        start: Theta, (P,).
        kernel: Its trajectories.
        schedule: Lengths and adaptation.
        record: Receives the draws.
        observe: Called after every iteration with the transition and the step size.

    Yields:
        Once per leapfrog.
    """
    point = yield from _evaluate(lane, start)
    step_size = schedule.step_size
    if step_size is None:
        step_size = yield from find_step_size(lane, point, 0.1)
    averaging = DualAveraging(step_size, schedule.target_accept)
    windows = stan_windows(schedule.warmup_steps)
    learns = schedule.mass_matrix != "identity"
    estimator = CovarianceEstimator(schedule.mass_matrix == "dense", start) if learns else None
    for n in range(schedule.warmup_steps):
        point, transition = yield from kernel.transition(lane, point, step_size)
        record.warmed_up += 1
        record.warmup_divergences += transition.diverging
        if schedule.adapt_step_size:
            step_size = averaging.update(transition.acceptance)
        if estimator is not None and windows.start <= n < windows.stop:
            estimator.add(point.row[POSITION])
            if n + 1 in windows.ends:
                lane.set_metric(lane.metric.updated(estimator.regularised(start.dtype)))
                estimator = CovarianceEstimator(estimator.dense, start)
                if schedule.adapt_step_size:
                    step_size = yield from find_step_size(lane, point, step_size)
                    averaging.restart(step_size)
        observe(transition, step_size)
    if schedule.adapt_step_size:
        step_size = averaging.averaged
    for n in range(schedule.num_samples):
        point, transition = yield from kernel.transition(lane, point, step_size)
        record.draws[n] = point.row[POSITION]
        record.transitions.append(transition)
        record.step_sizes.append(step_size)
        record.log_densities.append(point.log_density)
        observe(transition, step_size)


def find_step_size(lane: Lane, point: Point, step_size: float) -> Generator[None, Scalars, float]:
    """Double or halve the step size until one leapfrog's acceptance crosses 0.8; the accepted side is returned.

    Source: hoffman2014nuts, algorithm 4, with Stan's threshold [recalled, not re-read]. They return the last size
    tried, which after doubling may lie far beyond stability.

    Args:
        lane: The chain.
        point: Where it is; left unchanged but for its momentum.
        step_size: Where to start.

    Yields:
        Once per leapfrog.

    Returns:
        The step size.

    Raises:
        NonFiniteError: If no step size is small enough, or none is too large (an improper posterior).
    """
    direction = 0
    while True:
        _, kinetic = lane.refresh(point.row)
        lane.begin(point.row, step_size)
        log_density, new_kinetic, _ = yield
        gain = log_density - new_kinetic - point.log_density + kinetic
        # Not a number counts as too large a step.
        crossed = 1 if gain > math.log(0.8) and gain < math.inf else -1
        if direction not in (0, crossed):
            return step_size if crossed > 0 else 0.5 * step_size
        direction = crossed
        step_size *= 2.0**direction
        if not 1e-30 < step_size < 1e7:
            raise NonFiniteError(
                f"chain {lane.chain}: no usable step size (reached {step_size:.1g}); the log density is "
                + (
                    "flat: is the posterior proper?"
                    if direction > 0
                    else "not smooth at the starting point: pass `init`"
                )
            )


def _evaluate(lane: Lane, start: Tensor) -> Generator[None, Scalars, Point]:
    row = start.new_zeros(4, start.shape[0])
    row[POSITION] = start
    lane.begin(row, 0.0)
    log_density, _, _ = yield
    row = lane.state()
    if not math.isfinite(log_density) or not bool(torch.isfinite(row[GRADIENT]).all()):
        raise NonFiniteError(f"chain {lane.chain}, step 0: log density {log_density} or its gradient is not finite")
    return Point(row, log_density)


class Ensemble:
    """All chains of one fit and the loop that advances them.

    Args:
        log_density: Function of theta (P,) and ``data``, () nats.
        starts: Starting points, (C, P).
        streams: One random stream per chain.
        kernel: Trajectories.
        schedule: Lengths and adaptation.
        data: Tensors handed to ``log_density``.
        compile: See :func:`inference.graph.hot`.
        together: Advance all chains in one call, or each in its own (large networks).
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
        data: Sequence[Tensor] = (),
        compile: CompileOption = False,
        together: bool = True,
        observe: Observer = lambda transition, step_size: None,
    ) -> None:
        self.log_density, self.data = log_density, tuple(data)
        self.compile: CompileOption = compile
        self.kernel, self.schedule = kernel, schedule
        self.gradients = 0
        self.stopped: str | None = None
        num, dim = starts.shape
        metric = Metric.identity(schedule.mass_matrix, starts[0])
        self.lanes = [Lane(c, streams[c], metric) for c in range(num)]
        self.records = [Record(starts.new_zeros(schedule.num_samples, dim)) for _ in range(num)]
        total = schedule.num_samples + schedule.warmup_steps
        size = num if together else 1
        program = self._program(starts.new_zeros(4, size, dim), total * kernel.expected_steps * (num // size))
        groups = [self.lanes[i : i + size] for i in range(0, num, size)]
        self.blocks = [Block(program, group, starts.new_zeros(4, size, dim)) for group in groups]
        self.chains = [
            run_chain(lane, starts[lane.chain], kernel, schedule, self.records[lane.chain], observe)
            for lane in self.lanes
        ]

    @torch.no_grad()
    def run(self, max_seconds: float | None = None) -> None:
        """Run every chain to its end, or to Ctrl-C or the time limit; ``stopped`` says which."""
        deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        try:
            for chain in self.chains:
                next(chain)
            while self.blocks:
                if time.monotonic() > deadline:
                    self.stopped = f"max_seconds={max_seconds:g}"
                    return
                for block in list(self.blocks):
                    self._advance(block)
        except KeyboardInterrupt:
            self.stopped = "an interrupt"

    def _advance(self, block: Block) -> None:
        ended = False
        for lane, scalars in zip(block.lanes, block.advance(), strict=True):
            if lane.finished:
                continue
            self.gradients += 1
            try:
                self.chains[lane.chain].send(scalars)
            except StopIteration:
                lane.finished = ended = True
                block.steps[lane.index] = 0.0
                block.steps_changed = True
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
        if remaining < _REGROUP_CALLS or (block.program.compiled and len(running) > 0.4 * len(block.lanes)):
            return
        rows = block.state[:, [lane.index for lane in running]].contiguous()
        smaller = self._program(rows, remaining)
        old = [(block.slots[:, lane.index], block.steps[lane.index]) for lane in running]
        replacement = Block(smaller, running, rows)
        for lane, (slots, step_size) in zip(running, old, strict=True):
            replacement.slots[:, lane.index] = slots
            replacement.steps[lane.index] = step_size
        self.blocks[self.blocks.index(block)] = replacement

    def _remaining_steps(self, lane: Lane) -> int:
        record = self.records[lane.chain]
        steps = [t.num_steps for t in record.transitions[-100:]]
        mean = sum(steps) / len(steps) if steps else self.kernel.expected_steps
        left = self.schedule.warmup_steps - record.warmed_up + self.schedule.num_samples - len(record)
        return int(left * mean)

    def _program(self, rows: Tensor, num_calls: float) -> LeapfrogProgram:
        inverse_mass = torch.stack([self.lanes[0].metric.inverse_mass] * rows.shape[1])
        return leapfrog_program(
            self.log_density,
            rows,
            inverse_mass,
            data=self.data,
            num_slots=self.kernel.num_slots,
            compile=self.compile,
            num_calls=num_calls,
        )
