r"""Where chains live while they advance together: one lane of a block each.

A chain writes the state to continue from into its lane, yields, and finds the state one leapfrog later there, or, where
:mod:`inference.mcmc.native` follows trajectories, that of the end of a trajectory. Lanes hand out copies of what the
chain wants to keep, so the block may be overwritten in place.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inference.mcmc import native
from inference.mcmc.integrators import MOMENTUM, MOMENTUM_SUM, LeapfrogProgram
from inference.mcmc.metrics import Metric

# What a chain is sent after each leapfrog: log density, kinetic energy, U-turn bits.
Scalars = Sequence[float]
# Energy error in nats beyond which a trajectory has diverged.
DIVERGENCE = 1000.0
_UNIFORMS = 256


@dataclass
class Point:
    """State of a chain between trajectories.

    Attributes:
        row: Position, momentum, gradient and momentum sum, (4, P); owned by the chain.
        log_density: At the position, nats.
    """

    row: Tensor
    log_density: float


@dataclass(frozen=True)
class Transition:
    """What one trajectory did.

    Attributes:
        acceptance: Mean acceptance statistic along it, in [0, 1].
        num_steps: Leapfrogs taken.
        tree_depth: Completed doublings (NUTS; 0 elsewhere).
        diverging: Whether the energy error exceeded 1000 nats.
        energy: Hamiltonian of the new point, nats.
    """

    acceptance: float
    num_steps: int
    tree_depth: int
    diverging: bool
    energy: float


class Kernel(Protocol):
    """One trajectory of a chain; yields once per leapfrog."""

    @property
    def num_slots(self) -> int:
        """Stored points per chain that the U-turn checks need."""
        ...

    @property
    def expected_steps(self) -> int:
        """A guess of the leapfrogs per trajectory."""
        ...

    def transition(
        self, lane: Lane, point: Point, step_size: float
    ) -> Generator[None, Scalars, tuple[Point, Transition]]:
        """Move a chain from ``point``."""
        ...


class Block:
    """Lanes that advance together by one call.

    Args:
        program: One leapfrog of as many chains as there are lanes.
        lanes: The chains; lanes that another block holds move here with the trajectory that they are on.
        rows: Their states, (4, C, P).
    """

    def __init__(self, program: LeapfrogProgram, lanes: Sequence[Lane], rows: Tensor) -> None:
        self.program = program
        self.lanes = list(lanes)
        self.state = rows
        self.pair = torch.zeros_like(rows[:2])
        self.slots = rows.new_zeros(2, len(lanes), program.num_slots, rows.shape[2])
        self.steps = torch.zeros(len(lanes), dtype=rows.dtype)  # signed step sizes, on the CPU
        self.leapfrogs = np.zeros(len(lanes), dtype=np.int64)  # taken by each lane
        self.inverse_mass = torch.stack([lane.metric.inverse_mass for lane in lanes])
        # Where the leapfrog itself was worth compiling; a call of an eager one costs more than all the Python between.
        wanted = program.compiled or any(lane.native is not None for lane in lanes)
        library = native.load() if wanted and rows.device.type == "cpu" else None
        self.native = None if library is None else native.NativeTrajectories(self, library)
        for index, lane in enumerate(lanes):
            lane.join(self, index)

    def advance(self) -> list[tuple[Lane, Scalars]]:
        """One leapfrog of every lane; finished lanes stand still (their step size is 0).

        Returns:
            The lanes whose chains have to decide how to go on, with log density, kinetic energy and U-turn bits.
        """
        steps = self.steps.to(self.state.device)
        self.state, self.pair, scalars = self.program(self.state, steps, self.inverse_mass, self.slots)
        if self.native is not None:
            waiting = self.native.advance(self.state, self.pair, scalars)
            return [(self.lanes[index], scalars[index].tolist()) for index in waiting]
        self.leapfrogs += [not lane.finished for lane in self.lanes]
        return [(lane, own) for lane, own in zip(self.lanes, scalars.tolist(), strict=True) if not lane.finished]


class Lane:
    """One chain's place in a block, its random stream and its metric.

    Args:
        chain: Number of the chain.
        stream: The chain's own generator.
        metric: Its mass matrix.
    """

    def __init__(self, chain: int, stream: torch.Generator, metric: Metric) -> None:
        self.chain = chain
        self.stream = stream
        self.metric = metric
        self.finished = False
        self.iteration = 0
        # Uniform numbers in (0, 1], and how many are unused: the first ones. Trajectories in C++ read them too.
        self._uniforms, self._left = array("d", bytes(8 * _UNIFORMS)), array("q", [0])

    def join(self, block: Block, index: int) -> None:
        """Move into lane ``index`` of a block, with the state of the one before."""
        moved = None
        if hasattr(self, "block"):
            old, before = self.block, self.index
            block.slots[:, index] = old.slots[:, before]
            block.steps[index] = old.steps[before]
            block.leapfrogs[index] = old.leapfrogs[before]
            moved = None if old.native is None else (old.native.figures[before], old.native.held[before])
        self.block, self.index = block, index
        self.slots = [block.slots[:, index, k] for k in range(block.slots.shape[2])]  # (2, P) each
        if block.native is not None:
            block.native.join(index, self._uniforms.buffer_info()[0], self._left.buffer_info()[0], moved)

    @property
    def native(self) -> native.NativeTrajectories | None:
        """What follows whole trajectories without Python, where there is one."""
        return self.block.native if hasattr(self, "block") else None

    @property
    def leapfrogs(self) -> int:
        """Leapfrogs since the lane was made."""
        return int(self.block.leapfrogs[self.index])

    def finish(self) -> None:
        """Stand still from now on."""
        self.finished = True
        self.block.steps[self.index] = 0.0
        if self.native is not None:
            self.native.figures[self.index].mode = native.FINISHED

    def begin(self, row: Tensor, step_size: float) -> None:
        """Continue from the state ``row`` (4, P) with a signed step size at the next leapfrog."""
        self.block.state.select(1, self.index).copy_(row)
        self.block.steps[self.index] = step_size

    def state(self) -> Tensor:
        """Copy of the state after the last leapfrog, (4, P)."""
        return self.block.state.select(1, self.index).clone()

    def velocity(self) -> Tensor:
        """Copy of the velocity after the last leapfrog, (P,)."""
        return self.block.pair[0, self.index].clone()

    def momentum_sum(self) -> Tensor:
        """View of the sum of momenta since the state was set, (P,)."""
        return self.block.state[MOMENTUM_SUM, self.index]

    def store(self, slot: int) -> None:
        """Remember the last point in a slot, for later U-turn checks."""
        self.slots[slot].copy_(self.block.pair.select(1, self.index))

    def set_metric(self, metric: Metric) -> None:
        """Change the mass matrix of this chain."""
        self.metric = metric
        self.block.inverse_mass[self.index] = metric.inverse_mass

    def refresh(self, row: Tensor) -> tuple[Tensor, float]:
        """Draw a new momentum into a state and clear its sum.

        Args:
            row: State (4, P), changed in place.

        Returns:
            Velocity (P,) and kinetic energy in nats.
        """
        noise = torch.randn(row.shape[1], generator=self.stream, dtype=row.dtype, device=row.device)
        momentum = self.metric.momentum(noise)
        velocity = self.metric.velocity(momentum)
        row[MOMENTUM] = momentum
        row[MOMENTUM_SUM] = 0.0
        return velocity, 0.5 * float(torch.dot(momentum.double(), velocity.double()))

    def uniform(self) -> float:
        """A uniform number in (0, 1] from the chain's stream."""
        if not self._left[0]:
            self.refill()
        self._left[0] -= 1
        return self._uniforms[self._left[0]]

    def refill(self) -> None:
        """Draw new uniform numbers, when all are used."""
        drawn = torch.rand(_UNIFORMS, generator=self.stream, dtype=torch.float64, device=self.stream.device)
        self._keep((1.0 - drawn).tolist())

    def _keep(self, uniforms: Sequence[float]) -> None:
        self._uniforms[: len(uniforms)] = array("d", uniforms)
        self._left[0] = len(uniforms)

    def random_state(self) -> tuple[Tensor, list[float]]:
        """State of the stream and the uniforms drawn from it but not used yet."""
        return self.stream.get_state(), list(self._uniforms[: self._left[0]])

    def set_random_state(self, stream: Tensor, uniforms: list[float]) -> None:
        """Go back to what :meth:`random_state` returned."""
        self.stream.set_state(stream)
        self._keep(uniforms)
