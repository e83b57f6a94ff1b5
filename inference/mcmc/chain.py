r"""One Hamiltonian chain: a generator that moves from stage to stage and can be stopped and continued between them.

A stage is the first evaluation, a search for a step size, or one trajectory. While it runs, only the lane's random
stream, its unused uniforms and the momentum of the present point change; everything else changes at once at its end,
without yielding. So the state after the last complete stage can be written down at any time, and a chain restored from
it repeats the interrupted stage to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.errors import NonFiniteError
from inference.mcmc.adaptation import DualAveraging, stan_windows
from inference.mcmc.integrators import GRADIENT, POSITION
from inference.mcmc.lanes import Kernel, Lane, Point, Scalars, Transition
from inference.mcmc.recording import Record

Observer = Callable[[Transition, float], None]


@dataclass(frozen=True)
class Schedule:
    """How long chains run and what they adapt.

    Attributes:
        num_samples: Iterations after warm-up.
        warmup_steps: Discarded iterations per chain.
        step_size: First step size, or None for the doubling heuristic.
        adapt_step_size: Whether warm-up changes it.
        target_accept: Acceptance that dual averaging aims at.
    """

    num_samples: int
    warmup_steps: int
    step_size: float | None
    adapt_step_size: bool
    target_accept: float


class Chain:
    """One chain from its starting point to its last draw.

    Attributes:
        warmed_up: Iterations of warm-up done.
        warmup_divergences: Divergences in them.
        gradients: Leapfrogs of all complete stages, so of this chain's whole life.

    Args:
        lane: Where it lives.
        start: Theta, (P,).
        kernel: Its trajectories.
        schedule: Lengths and adaptation.
        record: Receives the draws.
        observe: Called after every iteration with the transition and the step size.
        resumable: Remember the random state after every stage, for :meth:`state`.
    """

    def __init__(
        self,
        lane: Lane,
        start: Tensor,
        kernel: Kernel,
        schedule: Schedule,
        record: Record,
        observe: Observer,
        resumable: bool = False,
    ) -> None:
        self.lane, self.start, self.kernel, self.schedule = lane, start, kernel, schedule
        self.record, self.observe, self.resumable = record, observe, resumable
        self.point: Point | None = None
        self.step_size = 0.1 if schedule.step_size is None else schedule.step_size
        self.searching = schedule.step_size is None
        self.averaging = DualAveraging(self.step_size, schedule.target_accept)
        self.windows = stan_windows(schedule.warmup_steps)
        self.estimator = lane.metric.estimator(start)
        self.warmed_up = self.warmup_divergences = self.gradients = 0
        self.after_stage: Callable[[], None] = lambda: None
        self._remember()

    @property
    def done(self) -> bool:
        """Whether the last draw was taken."""
        return self.warmed_up >= self.schedule.warmup_steps and self.record.num_seen >= self.schedule.num_samples

    @property
    def iterations(self) -> int:
        """Iterations done, warm-up included."""
        return self.warmed_up + self.record.num_seen

    def flush(self) -> None:
        """Have the draws so far on the disk."""
        self.record.flush()

    def run(self) -> Generator[None, Scalars, None]:
        """Go on to the last draw.

        Yields:
            Once per leapfrog.
        """
        lane = self.lane
        if self.point is None:
            self.point = yield from _evaluate(lane, self.start)
            self._end_stage(1)
        while not self.done:
            before = lane.leapfrogs
            if self.searching:
                self.step_size = yield from find_step_size(lane, self.point, self.step_size)
                self.averaging.restart(self.step_size)
                self.searching = False
                self._end_stage(lane.leapfrogs - before)
                continue
            lane.iteration = self.iterations
            self.point, transition = yield from self.kernel.transition(lane, self.point, self.step_size)
            warming = self.warmed_up < self.schedule.warmup_steps
            used = self.step_size
            if warming:
                self._warm_up(self.point, transition)
            else:
                self._draw(self.point, transition)
            self._end_stage(lane.leapfrogs - before)
            self.observe(transition, self.step_size if warming else used)

    def _warm_up(self, point: Point, transition: Transition) -> None:
        n = self.warmed_up
        self.warmup_divergences += transition.diverging
        if self.schedule.adapt_step_size:
            self.step_size = self.averaging.update(transition.acceptance)
        if self.estimator is not None and self.windows.start <= n < self.windows.stop:
            self.estimator.add(point.row[POSITION], point.row[GRADIENT])
            if n + 1 in self.windows.ends:
                self.lane.set_metric(self.lane.metric.updated(self.estimator.regularised(self.start.dtype)))
                self.estimator = self.lane.metric.estimator(self.start)
                self.searching = self.schedule.adapt_step_size
        self.warmed_up += 1
        if self.warmed_up == self.schedule.warmup_steps and self.schedule.adapt_step_size:
            self.step_size = self.averaging.averaged

    def _draw(self, point: Point, transition: Transition) -> None:
        self.record.add(
            point.row[POSITION],
            {
                "diverging": transition.diverging,
                "tree_depth": transition.tree_depth,
                "n_steps": transition.num_steps,
                "acceptance_rate": transition.acceptance,
                "energy": transition.energy,
                "lp": point.log_density,
                "step_size": self.step_size,
            },
        )

    def _end_stage(self, leapfrogs: int) -> None:
        self.gradients += leapfrogs
        if self.resumable:
            self._remember()
            self.after_stage()

    def _remember(self) -> None:
        if self.resumable:
            self._random = self.lane.random_state()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything the chain needs to go on from its last complete stage: figures for JSON, and tensors."""
        stream, uniforms = self._random
        figures: dict[str, Any] = {
            "warmed_up": self.warmed_up,
            "warmup_divergences": self.warmup_divergences,
            "gradients": self.gradients,
            "step_size": self.step_size,
            "searching": self.searching,
            "averaging": vars(self.averaging),
            "log_density": None if self.point is None else self.point.log_density,
        }
        tensors = {"stream": stream, "uniforms": torch.tensor(uniforms, dtype=torch.float64)}
        if self.point is not None:
            tensors["position"], tensors["gradient"] = self.point.row[POSITION], self.point.row[GRADIENT]
        tensors.update({f"metric.{k}": v for k, v in self.lane.metric.tensors().items()})
        if self.estimator is not None:
            tensors.update({f"estimator.{k}": v for k, v in self.estimator.tensors().items()})
        figures["record"], held = self.record.state()
        tensors.update({f"record.{k}": v for k, v in held.items()})
        return figures, tensors

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        self.warmed_up, self.warmup_divergences = figures["warmed_up"], figures["warmup_divergences"]
        self.gradients, self.step_size = figures["gradients"], figures["step_size"]
        self.searching = figures["searching"]
        vars(self.averaging).update(figures["averaging"])
        if "position" in tensors:
            row = self.start.new_zeros(4, self.start.shape[0])
            row[POSITION], row[GRADIENT] = tensors["position"], tensors["gradient"]
            self.point = Point(row, figures["log_density"])
        self.lane.set_metric(self.lane.metric.with_tensors(_under("metric.", tensors)))
        if self.estimator is not None:
            self.estimator.restore(_under("estimator.", tensors))
        self.lane.set_random_state(tensors["stream"], tensors["uniforms"].tolist())
        self.record.restore(figures["record"], _under("record.", tensors))
        self._remember()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
