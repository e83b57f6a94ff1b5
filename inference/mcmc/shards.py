r"""Leapfrogs over data in shards: the memory of one shard at a time, exact for all the data.

The energy is a sum over M shards, :math:`U = \sum_m U_m`, each with its share of the data and 1/M of the prior.
*Accumulation* adds up the gradients of all shards at one position: the same leapfrog, in less memory. The *symmetric
split* moves between the shards,

.. math:: K_1 D K_2 D \cdots D K_M K_M D \cdots D K_2 D K_1, \qquad
    K_m: p \leftarrow p - \tfrac{\epsilon}{2}\nabla U_m(\theta), \quad
    D: \theta \leftarrow \theta + \tfrac{\epsilon}{2(M-1)} M^{-1}p,

a palindrome, so reversible and volume preserving, which the Metropolis step with the whole U makes exact. It costs
2M - 2 gradients of shards a step (neighbouring kicks share one), where a leapfrog costs M, and the density of the other
M - 1 shards at its end. Source: cobb2021scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, fx
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from inference.data import Tree, index
from inference.double import with_precise_prior
from inference.graph import CompileOption, hot
from inference.mcmc.integrators import (
    GRADIENT,
    MOMENTUM,
    MOMENTUM_SUM,
    POSITION,
    LeapfrogProgram,
    leapfrog,
    velocity,
)
from inference.target import Target

IntegratorName = Literal["leapfrog", "split"]
# Positions (C, P) to log densities (C,) of one shard and gradients (C, P).
ShardGradients = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ShardedDensity:
    """Tempered log density of a target as a sum over shards of its data.

    Attributes:
        target: The target.
        num_shards: M, at most N.
        integrator: "leapfrog" (gradients are accumulated) or "split".
    """

    target: Target
    num_shards: int
    integrator: IntegratorName = "leapfrog"

    def __post_init__(self) -> None:
        if self.num_shards > self.target.num_data:
            raise ValueError(
                f"`num_shards` must be <= the number of data {self.target.num_data}, got {self.num_shards}"
            )

    @property
    def data(self) -> tuple[Tensor, ...]:
        """Tensors the density reads besides theta."""
        return tuple(pytree.tree_leaves((self.target.x, self.target.y)))

    @property
    def gradients_per_step(self) -> float:
        """Gradients of all the data that one step costs."""
        return (2 * self.num_shards - 2) / self.num_shards if self.integrator == "split" else 1.0

    def __call__(self, theta: Tensor, *data: Tensor) -> Tensor:
        """Log density of all the data, theta (P,) to () nats in float64."""
        x, y = self.unflatten(data)
        return torch.stack([self.density(shard)(theta, x, y) for shard in range(self.num_shards)]).sum()

    def unflatten(self, data: Sequence[Tensor]) -> tuple[Tree, Tensor]:
        """Inputs and targets from :attr:`data`."""
        spec = pytree.tree_structure((self.target.x, self.target.y))
        return pytree.tree_unflatten(list(data), spec)

    def rows(self, shard: int) -> slice:
        """Data of one shard: nearly equal, consecutive pieces."""
        num = self.target.num_data
        return slice(shard * num // self.num_shards, (shard + 1) * num // self.num_shards)

    def density(self, shard: int) -> Callable[..., Tensor]:
        """Log density of one shard: theta (P,), x and y of all data, to () nats in float64 with its sums."""
        target, rows = self.target, self.rows(shard)
        joint = self._joints[rows.stop - rows.start]

        def log_density(theta: Tensor, x: Tree, y: Tensor) -> Tensor:
            leaves = [leaf.contiguous() for leaf in pytree.tree_leaves((index(x, rows), y[rows]))]
            prior, likelihood = joint(target.expand(theta).contiguous(), *leaves)
            tempered = likelihood.double().sum() / target.likelihood_temperature
            return (prior.double() / self.num_shards + tempered) / target.temperature

        return log_density

    @cached_property
    def _joints(self) -> dict[int, fx.GraphModule]:
        """Log prior and log-likelihood with float64 sums, by number of data; a prior is summed once per shard."""
        sizes = {rows.stop - rows.start for rows in map(self.rows, range(self.num_shards))}
        return {size: with_precise_prior(self.target.recorded(size)) for size in sizes}


def shard_gradients(density: ShardedDensity, num_chains: int, x: Tree, y: Tensor) -> list[ShardGradients]:
    """Gradients of every shard for several chains.

    Args:
        density: The shards.
        num_chains: C.
        x: All inputs.
        y: All targets.

    Returns:
        One function per shard.
    """

    def of(shard: int) -> ShardGradients:
        one = grad_and_value(density.density(shard))

        def gradients(position: Tensor) -> tuple[Tensor, Tensor]:
            if num_chains == 1:
                grad, value = one(position[0], x, y)
                return value[None], grad[None]
            grad, value = vmap(one, in_dims=(0, None, None))(position, x, y)
            return value, grad

        return gradients

    return [of(shard) for shard in range(density.num_shards)]


def accumulated(shards: list[ShardGradients]) -> ShardGradients:
    """Sums of the shards' log densities and gradients, one shard after another."""

    def total(position: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = shards[0](position)
        for shard in shards[1:]:
            more, slope = shard(position)
            value, grad = value + more, grad + slope
        return value, grad

    return total


def split_step(
    position: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    inverse_mass: Tensor,
    shards: list[ShardGradients],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the symmetric split.

    Args:
        position: Theta, (C, P).
        momentum: (C, P).
        gradient: Gradient of the first shard's log density at ``position``, (C, P).
        step_size: Signed step size, broadcastable to (C, P).
        inverse_mass: See :func:`inference.mcmc.integrators.velocity`.
        shards: Gradients of M >= 2 shards.

    Returns:
        New position, momentum, gradient of the first shard (C, P), and log density of all shards (C,).
    """
    drift = step_size / (2.0 * (len(shards) - 1))
    half = 0.5 * step_size
    momentum = momentum + half * gradient
    for shard in shards[1:-1]:
        position = position + drift * velocity(inverse_mass, momentum)
        momentum = momentum + half * shard(position)[1]
    position = position + drift * velocity(inverse_mass, momentum)
    momentum = momentum + step_size * shards[-1](position)[1]
    for shard in reversed(shards[1:-1]):
        position = position + drift * velocity(inverse_mass, momentum)
        momentum = momentum + half * shard(position)[1]
    position = position + drift * velocity(inverse_mass, momentum)
    value, gradient = shards[0](position)
    momentum = momentum + half * gradient
    for shard in shards[1:]:
        value = value + shard(position)[0]
    return position, momentum, gradient, value


def shard_program(
    density: ShardedDensity,
    block: Tensor,
    inverse_mass: Tensor,
    *,
    compile: CompileOption = False,
    num_calls: float = 0,
) -> LeapfrogProgram:
    """Record one step of all chains, with the signature of a leapfrog of HMC.

    Args:
        density: The shards and the integrator.
        block: Example of the chains' state, (4, C, P).
        inverse_mass: Example, (C, P) or (C, P, P).
        compile: See :func:`inference.graph.hot`.
        num_calls: Expected number of steps.

    Returns:
        The program; it stores no points.
    """
    num = block.shape[1]

    def step(block: Tensor, step_size: Tensor, inverse_mass: Tensor, slots: Tensor, *data: Tensor) -> list[Tensor]:
        shards = shard_gradients(density, num, *density.unflatten(data))
        state = block[POSITION], block[MOMENTUM], block[GRADIENT], step_size.unsqueeze(-1), inverse_mass
        if density.integrator == "split":
            position, momentum, gradient, value = split_step(*state, shards)
        else:
            position, momentum, gradient, value = leapfrog(*state, accumulated(shards))
        before = block[MOMENTUM_SUM]
        speed = velocity(inverse_mass, momentum)
        kinetic = 0.5 * (momentum.double() * speed.double()).sum(-1)
        scalars = torch.stack([value.double(), kinetic, torch.zeros_like(kinetic)], -1)
        rows = torch.stack([position, momentum, gradient, before + momentum])
        return [rows, torch.stack([speed, before]), scalars]

    slots = block.new_zeros(2, num, 0, block.shape[2])
    example = (block, block.new_zeros(num), inverse_mass, slots, *density.data)
    return LeapfrogProgram(hot(step, *example, compile=compile, num_calls=num_calls), density.data, 0)
