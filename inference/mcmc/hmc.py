r"""Hamiltonian Monte Carlo with trajectories of fixed length.

Draw a momentum :math:`p \sim N(0, M)`, take L leapfrog steps, and accept the end with probability

.. math:: \min\{1, \exp(H(\theta, p) - H(\theta', p'))\}, \qquad H = -\log p(\theta|D) + \tfrac12 p^\top M^{-1} p;

on rejection the current state is repeated. L is jittered by up to 20 % so that no direction completes a whole period
every time. Exact for the target up to Monte-Carlo error; cost L gradients a draw (the gradient of the current state is
kept), memory 3 P a chain. Sources: neal2011mcmc; izmailov2021what, section 3 [recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from inference.backend import check_integer, check_positive
from inference.mcmc.hamiltonian import HamiltonianBackend
from inference.mcmc.lanes import DIVERGENCE, Kernel, Lane, Point, Scalars, Transition


@dataclass(frozen=True, kw_only=True)
class HMC(HamiltonianBackend):
    r"""Static Hamiltonian Monte Carlo.

    Attributes:
        trajectory_length: Integration time :math:`\tau`; the number of leapfrogs is :math:`\lceil\tau/\epsilon\rceil`.
            The default :math:`\pi/2` is a quarter period of a direction of unit scale, which an adapted mass matrix
            makes of all; with mass "identity" choose :math:`\pi/2` times the prior's standard deviation.
        num_leapfrogs: Fixed number of leapfrogs instead.
        jitter: Relative half-width of the uniform jitter of the length, in [0, 1).
        max_leapfrogs: Bound on the leapfrogs of one trajectory while the step size is still small.
        target_accept: Acceptance that warm-up adapts the step size to, in (0, 1).
    """

    trajectory_length: float = math.pi / 2
    num_leapfrogs: int | None = None
    jitter: float = 0.2
    max_leapfrogs: int = 1000
    target_accept: float = 0.651

    bias: ClassVar[str] = "exact in the limit; may miss modes and mix slowly in weight space"
    reference: ClassVar[str] = "Neal 2011"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "trajectory_length")
        check_integer(self, "num_leapfrogs", "max_leapfrogs", minimum=1)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"`jitter` must be in [0, 1), got {self.jitter}")

    def kernel(self) -> Kernel:
        """The trajectories of this backend."""
        return HMCKernel(self.trajectory_length, self.num_leapfrogs, self.jitter, self.max_leapfrogs)


@dataclass(frozen=True)
class HMCKernel:
    """Trajectories of fixed length; fields as in :class:`HMC`."""

    trajectory_length: float
    num_leapfrogs: int | None
    jitter: float
    max_leapfrogs: int

    @property
    def num_slots(self) -> int:
        """No stored points: the length is fixed."""
        return 0

    @property
    def expected_steps(self) -> int:
        """A guess of the leapfrogs per trajectory."""
        return self.num_leapfrogs or min(self.max_leapfrogs, 20)

    def length(self, step_size: float, uniform: float) -> int:
        """Leapfrogs of one trajectory, jittered by a uniform number in (0, 1]."""
        factor = 1.0 + self.jitter * (2.0 * uniform - 1.0)
        if self.num_leapfrogs is not None:
            return max(1, round(self.num_leapfrogs * factor))
        return max(1, math.ceil(min(self.trajectory_length * factor / step_size, self.max_leapfrogs)))

    def transition(
        self, lane: Lane, point: Point, step_size: float
    ) -> Generator[None, Scalars, tuple[Point, Transition]]:
        """One trajectory.

        Args:
            lane: The chain's lane.
            point: Where it starts; its row is reused.
            step_size: Leapfrog step.

        Yields:
            Once per leapfrog.

        Returns:
            The next point and what happened.
        """
        _, kinetic = lane.refresh(point.row)
        start_energy = kinetic - point.log_density
        lane.begin(point.row, step_size)
        length = self.length(step_size, lane.uniform())
        log_density, num_steps = point.log_density, 0
        # A point that is not finite stays so: the rest of the trajectory need not be computed.
        while num_steps < length and math.isfinite(log_density - kinetic):
            log_density, kinetic, _ = yield
            num_steps += 1
        gain = log_density - kinetic + start_energy
        diverging = not -DIVERGENCE < gain < math.inf
        acceptance = 0.0 if diverging else min(1.0, math.exp(min(gain, 0.0)))
        if lane.uniform() > acceptance:
            return point, Transition(acceptance, num_steps, 0, diverging, start_energy)
        return Point(lane.state(), log_density), Transition(acceptance, num_steps, 0, diverging, kinetic - log_density)
