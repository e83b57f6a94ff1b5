r"""The No-U-Turn sampler with multinomial trajectories.

A trajectory doubles forwards or backwards in time until it turns back on itself; the next state is drawn from all its
points with weights :math:`e^{-H}`, biased towards the newer half. A (sub)trajectory from point a to point b has turned
when

.. math:: v_a \cdot \rho \le 0 \quad\text{or}\quad v_b \cdot \rho \le 0, \qquad \rho = \sum_{i=a}^b p_i,\; v = M^{-1}p,

and, as in Stan since 2.21, also when this holds from the far end of one half to the first point of the other. Instead
of a recursion, every new point is checked inside the recorded leapfrog against the stored points (at most two per
level) that end a subtrajectory with it: see :func:`plan`.

Exact for the target up to Monte-Carlo error. Cost: about 2^depth gradients a draw; memory 4 P max_tree_depth a chain.
Sources: hoffman2014nuts; betancourt2017conceptual, appendix A [recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from inference.backend import Run, check_integer
from inference.errors import ConvergenceWarning
from inference.mcmc.hamiltonian import HamiltonianBackend
from inference.mcmc.integrators import MOMENTUM, MOMENTUM_SUM
from inference.mcmc.lanes import DIVERGENCE, Kernel, Lane, Point, Scalars, Transition


@dataclass(frozen=True, kw_only=True)
class NUTS(HamiltonianBackend):
    """No-U-Turn sampler: Hamiltonian Monte Carlo that chooses its trajectory lengths.

    Attributes:
        max_tree_depth: Doublings after which a trajectory ends; 10 allows 1023 gradients a draw.
        target_accept: Mean acceptance statistic that warm-up adapts the step size to, in (0, 1).
    """

    max_tree_depth: int = 10
    target_accept: float = 0.8

    bias: ClassVar[str] = "exact in the limit; may miss modes and mix slowly in weight space"
    reference: ClassVar[str] = "Hoffman and Gelman 2014"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "max_tree_depth", minimum=1)
        if self.max_tree_depth > 20:
            raise ValueError(f"`max_tree_depth` must be <= 20 (a million gradients a draw), got {self.max_tree_depth}")

    def kernel(self) -> Kernel:
        """The trajectories of this backend."""
        return NUTSKernel(self.max_tree_depth)

    def _warn(self, run: Run, stats: dict[str, Tensor]) -> None:
        super()._warn(run, stats)
        share = float((stats["tree_depth"] >= self.max_tree_depth).double().mean())
        if share > 0.1:
            run.warn(
                ConvergenceWarning,
                f"{100 * share:.0f} % of the trajectories reached max_tree_depth={self.max_tree_depth} "
                f"({2**self.max_tree_depth - 1} leapfrogs) without turning: draws are correlated; raise it or "
                "warm up longer",
            )


@dataclass(frozen=True)
class NUTSKernel:
    """Multinomial NUTS trajectories.

    Attributes:
        max_tree_depth: Largest number of doublings.
    """

    max_tree_depth: int

    @property
    def num_slots(self) -> int:
        """Two stored points per level, and the two ends of the trajectory that is being doubled."""
        return 2 * self.max_tree_depth

    @property
    def expected_steps(self) -> int:
        """A guess of the leapfrogs per trajectory: posteriors of networks saturate early depths."""
        return min(2**self.max_tree_depth - 1, 63)

    def transition(
        self, lane: Lane, point: Point, step_size: float
    ) -> Generator[None, Scalars, tuple[Point, Transition]]:
        """One trajectory.

        Args:
            lane: The chain's lane.
            point: Where it starts; its row is reused.
            step_size: Leapfrog step.

        Yields:
            Once per leapfrog; once in all where :mod:`inference.mcmc.native` follows the tree.

        Returns:
            The next point and what happened.
        """
        levels = self.max_tree_depth - 1
        far_slot, near_slot = 2 * levels, 2 * levels + 1
        first_bit, both_bits = 1 << far_slot, 3 << far_slot
        velocity, kinetic = lane.refresh(point.row)
        start_energy = kinetic - point.log_density
        if lane.native is not None:
            figures = {"max_depth": self.max_tree_depth, "step_size": step_size, "start_energy": start_energy}
            lane.native.begin_tree(lane.index, point.row, velocity, figures | {"log_density": point.log_density})
            yield
            row, end = lane.native.chosen(lane.index)  # of the block that the lane is in by now
            transition = Transition(
                end.acceptance / end.num_steps, end.num_steps, end.depth, bool(end.diverging), end.energy
            )
            return Point(row, end.log_density), transition
        rho = point.row[MOMENTUM].clone()
        ends = [(point.row, velocity), (point.row, velocity)]  # backward, forward
        chosen, energy = point, start_energy
        log_weight, acceptance, num_steps, depth = 0.0, 0.0, 0, 0
        while depth < self.max_tree_depth:
            forward = lane.uniform() < 0.5
            near, far = ends[forward], ends[not forward]
            torch.neg(rho, out=lane.slots[far_slot][1])
            lane.slots[far_slot][0].copy_(far[1])
            torch.neg(near[0][MOMENTUM], out=lane.slots[near_slot][1])
            lane.slots[near_slot][0].copy_(near[1])
            lane.begin(near[0], step_size if forward else -step_size)

            # The new half, one point at a time.
            last, new_weight, turned = 2**depth - 1, -math.inf, False
            candidate, candidate_energy = point, start_energy
            for leaf in range(last + 1):
                log_density, kinetic, bits = yield
                num_steps += 1
                gain = log_density - kinetic + start_energy
                if not -DIVERGENCE < gain < math.inf:
                    return chosen, Transition(acceptance / num_steps, num_steps, depth, True, energy)
                acceptance += 1.0 if gain > 0.0 else math.exp(gain)
                new_weight = _log_add(new_weight, gain)
                if math.log(lane.uniform()) <= gain - new_weight:
                    candidate, candidate_energy = Point(lane.state(), log_density), kinetic - log_density
                checked, slot = plan(leaf, levels)
                flags = int(bits)
                if flags & checked:
                    return chosen, Transition(acceptance / num_steps, num_steps, depth, False, energy)
                if leaf == 0:
                    turned = bool(flags & first_bit)
                if leaf < last:
                    lane.store(slot)
            depth += 1
            if math.log(lane.uniform()) <= new_weight - log_weight:
                chosen, energy = candidate, candidate_energy
            if turned or flags & both_bits or depth == self.max_tree_depth:
                break
            log_weight = _log_add(log_weight, new_weight)
            rho += lane.momentum_sum()
            end = lane.state()
            end[MOMENTUM_SUM] = 0.0
            ends[forward] = (end, lane.velocity())
        return chosen, Transition(acceptance / num_steps, num_steps, depth, False, energy)


@cache
def plan(leaf: int, levels: int) -> tuple[int, int]:
    """Which stored points a new point of a doubling is checked against, and where it is stored itself.

    Leaf b ends one subtrajectory a..b of 2^j points for each j up to the number of its trailing one bits. Point a lives
    in the slot given by the number of one bits of a/2: the starts still in use have distinct numbers. The last point of
    each left half lives in a slot of its own level, for the check from there to b; the check from a to the first point
    of the right half happens when that point arrives.

    Args:
        leaf: Number of the new point within the doubling, from 0.
        levels: Number of slots for starts; as many follow for ends of left halves.

    Returns:
        Bits of the slots to check against, and the slot to store the new point in.
    """
    if leaf % 2 == 0:
        checked = 0
        if leaf:
            start = leaf & (leaf - 1)  # the left half began where the lowest set bit is cleared
            checked = 1 << (start >> 1).bit_count()
        return checked, (leaf >> 1).bit_count()
    trailing = ((leaf + 1) & -(leaf + 1)).bit_length() - 1
    highest = (leaf >> 1).bit_count()
    checked = sum(1 << slot for slot in range(highest - trailing + 1, highest + 1))
    checked |= sum(1 << (levels + level) for level in range(1, trailing))
    return checked, levels + trailing


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a))
