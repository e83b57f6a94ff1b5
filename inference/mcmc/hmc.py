r"""Hamiltonian Monte Carlo with trajectories of fixed length.

Draw a momentum :math:`p \sim N(0, M)`, take L leapfrog steps, and accept the end with probability

.. math:: \min\{1, \exp(H(\theta, p) - H(\theta', p'))\}, \qquad H = -\log p(\theta|D) + \tfrac12 p^\top M^{-1} p;

on rejection the current state is repeated. L is jittered by up to 20 % so that no direction completes a whole period
every time. Exact for the target up to Monte-Carlo error; cost L gradients a draw (the gradient of the current state is
kept), memory 3 P a chain.

The protocol of large full-batch studies is ``HMC(trajectory_length="prior", mass_matrix="identity",
burn_in_without_rejection=..., num_shards=...)``: a quarter period of the prior, from a MAP start or with a burn-in that
accepts everything, in the memory of one shard of the data. Sources: neal2011mcmc; izmailov2021what, section 3
[recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.backend import Run, check_integer, check_positive
from inference.mcmc.hamiltonian import HamiltonianBackend
from inference.mcmc.lanes import DIVERGENCE, Kernel, Lane, Point, Scalars, Transition
from inference.mcmc.shards import IntegratorName, ShardedDensity
from inference.optimisation import check_choice
from inference.posterior import DrawsPosterior
from inference.target import Target

_PRIOR_DRAWS, _PRIOR_NUMBERS = 200, 2e7


@dataclass(frozen=True, kw_only=True)
class HMC(HamiltonianBackend):
    r"""Static Hamiltonian Monte Carlo.

    Attributes:
        trajectory_length: Integration time :math:`\tau`; the number of leapfrogs is :math:`\lceil\tau/\epsilon\rceil`.
            The default :math:`\pi/2` is a quarter period of a direction of unit scale, which an adapted mass matrix
            makes of all. "prior" is :math:`\pi/2` times the prior's standard deviation in unconstrained space, for
            mass "identity" (see :func:`prior_scale`), times the root of the temperature.
        num_leapfrogs: Fixed number of leapfrogs instead.
        jitter: Relative half-width of the uniform jitter of the length, in [0, 1).
        max_leapfrogs: Bound on the leapfrogs of one trajectory while the step size is still small.
        target_accept: Acceptance that warm-up adapts the step size to, in (0, 1).
        burn_in_without_rejection: First warm-up iterations, in which every proposal is accepted that did not diverge
            (by 1000 nats), so that a chain far from the posterior does not stand still; at most ``warmup_steps``.
        num_shards: Pieces M of the data that gradients are accumulated over: the same draws up to rounding, in the
            memory of one piece.
        integrator: "leapfrog", or "split": the symmetric split over shards of :mod:`inference.mcmc.shards`, exact as
            well, worth trying where it allows a larger step.
    """

    trajectory_length: float | Literal["prior"] = math.pi / 2
    num_leapfrogs: int | None = None
    jitter: float = 0.2
    max_leapfrogs: int = 1000
    target_accept: float = 0.651
    burn_in_without_rejection: int = 0
    num_shards: int = 1
    integrator: IntegratorName = "leapfrog"

    bias: ClassVar[str] = "exact in the limit; may miss modes and mix slowly in weight space"
    reference: ClassVar[str] = "Neal 2011"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.trajectory_length, str) and self.trajectory_length != "prior":
            raise ValueError(f'`trajectory_length` must be > 0 or "prior", got {self.trajectory_length!r}')
        if self.trajectory_length == "prior":
            if self.mass_matrix != "identity":
                raise ValueError(
                    '`trajectory_length="prior"` is in the units of the parameters: set `mass_matrix="identity"`, '
                    f"got {self.mass_matrix!r}"
                )
        else:
            check_positive(self, "trajectory_length")
        check_integer(self, "num_leapfrogs", "max_leapfrogs", "num_shards", minimum=1)
        check_integer(self, "burn_in_without_rejection", minimum=0)
        if self.burn_in_without_rejection > self.warmup_steps:
            raise ValueError(
                f"`burn_in_without_rejection` must be <= `warmup_steps`={self.warmup_steps}, or draws are biased, got "
                f"{self.burn_in_without_rejection}"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"`jitter` must be in [0, 1), got {self.jitter}")
        check_choice(self, "integrator", ("leapfrog", "split"))
        if self.integrator == "split" and self.num_shards < 2:
            raise ValueError(f'`num_shards` must be >= 2 for `integrator="split"`, got {self.num_shards}')

    def fit_target(self, target: Target, run: Run) -> DrawsPosterior:
        """Run the chains.

        Args:
            target: Tempered target.
            run: Seed, starting point and counters.

        Returns:
            Draws (C, S, P), with ArviZ's sample statistics.

        Raises:
            ValueError: If there are more shards than data.
        """
        if self.trajectory_length == "prior":
            length = 0.5 * math.pi * prior_scale(target) * target.temperature**0.5
            posterior = replace(self, trajectory_length=length).fit_target(target, run)
            posterior.backend = self
            return posterior
        before = run.info.gradients
        posterior = super().fit_target(target, run)
        if self.num_shards > 1:
            factor = self.sharded(target).gradients_per_step
            run.info.gradients = before + factor * (run.info.gradients - before)
        run.info.extra["trajectory_length"] = self.trajectory_length
        return posterior

    def density(self, target: Target) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The density that trajectories follow, and the tensors it reads besides theta."""
        if self.num_shards == 1:
            return super().density(target)
        sharded = self.sharded(target)
        return sharded, sharded.data

    def sharded(self, target: Target) -> ShardedDensity:
        """The target in ``num_shards`` pieces."""
        return ShardedDensity(target, self.num_shards, self.integrator)

    def kernel(self) -> Kernel:
        """The trajectories of this backend."""
        length = math.pi / 2 if isinstance(self.trajectory_length, str) else self.trajectory_length
        return HMCKernel(length, self.num_leapfrogs, self.jitter, self.max_leapfrogs, self.burn_in_without_rejection)


def prior_scale(target: Target) -> float:
    """Standard deviation of the prior, one number for all parameters of theta.

    Each parameter's is half the distance between the 16 % and the 84 % quantile of draws from the prior (infinite
    variances do no harm), and theirs is the geometric mean, so that no single wide or narrow site decides.

    Args:
        target: The target.

    Returns:
        The scale in unconstrained space, at temperature 1.
    """
    num = int(min(max(_PRIOR_NUMBERS / target.full_dim, 20), _PRIOR_DRAWS))
    draws = target.sample_prior(num, seed=0)
    ends = torch.tensor([0.1586552539, 0.8413447461], dtype=draws.dtype, device=draws.device)
    low, high = torch.quantile(draws, ends, dim=0)
    scale = 0.5 * (high - low)
    return float(scale[scale > 0].log().mean().exp()) if bool((scale > 0).any()) else 1.0


@dataclass(frozen=True)
class HMCKernel:
    """Trajectories of fixed length; fields as in :class:`HMC`."""

    trajectory_length: float
    num_leapfrogs: int | None
    jitter: float
    max_leapfrogs: int
    burn_in_without_rejection: int = 0

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
            Once per leapfrog; once in all where :mod:`inference.mcmc.native` counts the steps.

        Returns:
            The next point and what happened.
        """
        _, kinetic = lane.refresh(point.row)
        start_energy = kinetic - point.log_density
        lane.begin(point.row, step_size)
        length = self.length(step_size, lane.uniform())
        log_density, num_steps = point.log_density, 0
        # A point that is not finite stays so: the rest of the trajectory need not be computed.
        if lane.native is not None:
            lane.native.begin_steps(lane.index, length)
            log_density, kinetic, _ = yield
            num_steps = lane.native.figures[lane.index].num_steps
        else:
            while num_steps < length and math.isfinite(log_density - kinetic):
                log_density, kinetic, _ = yield
                num_steps += 1
        gain = log_density - kinetic + start_energy
        diverging = not -DIVERGENCE < gain < math.inf
        acceptance = 0.0 if diverging else min(1.0, math.exp(min(gain, 0.0)))
        # What diverged is refused even then: from states that far off no step of usable size leads back.
        keeps_all = lane.iteration < self.burn_in_without_rejection and not diverging
        if lane.uniform() > acceptance and not keeps_all:
            return point, Transition(acceptance, num_steps, 0, diverging, start_energy)
        return Point(lane.state(), log_density), Transition(acceptance, num_steps, 0, diverging, kinetic - log_density)
