"""What ChEES-HMC learns from all chains: the step size by acceptance, the trajectory length by the criterion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.mcmc.adaptation import DualAveraging

if TYPE_CHECKING:
    from inference.mcmc.chees import ChEESHMC

_BETA, _LARGEST_UPDATE = 0.95, 0.35


def halton(index: int) -> float:
    """Element ``index`` >= 0 of the Halton sequence of base 2: 1/2, 1/4, 3/4, 1/8, ..."""
    value, share, rest = 0.0, 0.5, index + 1
    while rest:
        value += share * (rest & 1)
        rest, share = rest >> 1, 0.5 * share
    return value


class Adaptation:
    """Step size and trajectory length of all chains during warm-up.

    Args:
        step_size: Where the step size starts.
        length: Where the trajectory length T starts.
        options: Goals and rates.
    """

    def __init__(self, step_size: float, length: float, options: ChEESHMC) -> None:
        self.options = options
        self.averaging = DualAveraging(step_size, options.target_accept)
        self.step_size, self.length = step_size, length
        self.log_step_size, self.log_length = math.log(step_size), math.log(length)
        self.count, self.square = 0, 0.0

    def update(self, acceptance: Tensor, gradient: float) -> None:
        """Take one trajectory of all chains into account.

        Args:
            acceptance: Acceptance probabilities of the chains that did not diverge, (<= C,).
            gradient: Of the criterion by the logarithm of the length; NaN where no chain has one.
        """
        self.count += 1
        harmonic = float(1.0 / (1.0 / acceptance.clamp_min(1e-20)).mean()) if len(acceptance) else 0.0
        self.step_size = self.averaging.update(harmonic)
        if math.isfinite(gradient):
            self.square = _BETA * self.square + (1.0 - _BETA) * gradient**2
            root = math.sqrt(self.square / (1.0 - _BETA**self.count))
            move = self.options.learning_rate * gradient / max(root, 1e-300)
            self.length *= math.exp(max(-_LARGEST_UPDATE, min(_LARGEST_UPDATE, move)))
        weight = self.count**-0.5
        self.log_step_size += weight * (math.log(self.step_size) - self.log_step_size)
        # By the average: dual averaging begins with far too large a step, and a length that follows it up may end in
        # a maximum of the criterion whole periods away.
        self.length = min(self.length, self.options.max_leapfrogs * math.exp(self.log_step_size))
        self.log_length += weight * (math.log(self.length) - self.log_length)


def criterion_gradient(
    start: Tensor, proposal: Tensor, velocity: Tensor, acceptance: Tensor, share: float, centres: Tensor | None = None
) -> float:
    r"""Gradient of ChEES by :math:`\log T`, from one trajectory of each chain, over T.

    Args:
        start: Positions before, (C, P).
        proposal: Positions proposed, (C, P).
        velocity: Velocities there, (C, P).
        acceptance: Acceptance probabilities, (C,).
        share: u T, how long the trajectories were.
        centres: Centre of each chain (C, P); None for the means of all chains.

    Returns:
        The gradient; NaN where nothing is accepted.
    """
    if centres is None:
        weights = (acceptance / acceptance.sum()).to(proposal.dtype)
        before, after = start - start.mean(0), proposal - weights @ proposal
    else:
        before, after = start - centres, proposal - centres
    change = (after.square() - before.square()).sum(-1, dtype=torch.float64)
    speed = (after * velocity).sum(-1, dtype=torch.float64)
    return float(share * (acceptance * change * speed).sum() / acceptance.sum())
