r"""Isokinetic (microcanonical) dynamics: the speed is constant, only the direction u of the motion changes.

With :math:`g = \nabla\log p(\theta)`, :math:`\hat g = g/|g|`, step size :math:`\epsilon` and
:math:`\delta = c\,\epsilon|g|/(P-1)`, :math:`z = e^{-\delta}`,

.. math::
    A(a)&: \theta \leftarrow \theta + a\,\epsilon u, \\
    B(c)&: u \leftarrow \mathrm{normalise}\big(\hat g(1-z)(1+z+(u\cdot\hat g)(1-z)) + 2zu\big), \quad
    \Delta K = (P-1)\big[\delta - \log 2 + \log(1+u\cdot\hat g+(1-u\cdot\hat g)z^2)\big].

One step is the minimal-norm splitting :math:`B(b)A(\tfrac12)B(1-2b)A(\tfrac12)B(b)` with b = 0.1931833275, between two
half refreshments :math:`u \leftarrow \mathrm{normalise}(u + \nu\xi)`. The exact flow conserves
:math:`K - \log p(\theta)`; what a step changes of it is its energy error. Source: robnik2023microcanonical; the step as
in blackjax's ``isokinetic_mclachlan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MCLACHLAN = 0.1931833275037836
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Moving:
    """State of chains in motion.

    Attributes:
        position: Theta, (C, P).
        direction: Unit vectors u, (C, P), in the preconditioned space.
        gradient: Of the log density at ``position``, (C, P).
        log_density: (C,) nats, float64.
    """

    position: Tensor
    direction: Tensor
    gradient: Tensor
    log_density: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in the order of the constructor."""
        return self.position, self.direction, self.gradient, self.log_density


def normalised(vector: Tensor) -> Tensor:
    """Vectors of length 1, (..., P)."""
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


def turn(direction: Tensor, gradient: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    r"""The flow B: the gradient turns the direction.

    Args:
        direction: Unit vectors, (C, P).
        gradient: Of the log density in the preconditioned space, (C, P).
        time: :math:`c\epsilon`, (C,).

    Returns:
        New unit vectors (C, P), and the change of kinetic energy (C,) in float64 nats.
    """
    degrees = direction.shape[-1] - 1
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    unit = gradient / norm.clamp_min(torch.finfo(gradient.dtype).tiny)
    # Float64: energy errors are small differences, and there are P - 1 times this logarithm in them.
    cosine = (direction * unit).sum(-1, dtype=torch.float64).clamp(-1.0, 1.0)
    delta = time.double() * norm.squeeze(-1).double() / degrees
    z = torch.exp(-delta)
    kinetic = degrees * (delta - math.log(2.0) + torch.log(1.0 + cosine + (1.0 - cosine) * z * z))
    along = (1.0 - z) * (1.0 + z + cosine * (1.0 - z))
    turned = unit * along.to(unit.dtype).unsqueeze(-1) + direction * (2.0 * z).to(unit.dtype).unsqueeze(-1)
    return normalised(turned), kinetic


def mclachlan(state: Moving, step_size: Tensor, scale: Tensor, value_and_grad: ValueAndGrad) -> tuple[Moving, Tensor]:
    """One deterministic step, reversible by turning the direction round.

    Args:
        state: Where the chains are.
        step_size: (C,), in the preconditioned space.
        scale: Standard deviations that precondition, (C, P): theta = scale * z.
        value_and_grad: Log densities (C,) and gradients (C, P) at positions (C, P).

    Returns:
        The new state and the energy error of the step, (C,) float64 nats.
    """
    half = 0.5 * step_size.unsqueeze(-1) * scale
    direction, first = turn(state.direction, state.gradient * scale, MCLACHLAN * step_size)
    position = state.position + half * direction
    _, gradient = value_and_grad(position)
    direction, second = turn(direction, gradient * scale, (1.0 - 2.0 * MCLACHLAN) * step_size)
    position = position + half * direction
    log_density, gradient = value_and_grad(position)
    direction, third = turn(direction, gradient * scale, MCLACHLAN * step_size)
    error = first + second + third - (log_density - state.log_density)
    return Moving(position, direction, gradient, log_density), error


def refreshment(time: Tensor, length: Tensor, dim: int) -> Tensor:
    r"""Size of a partial refreshment, :math:`\nu = \sqrt{(e^{2t/L} - 1)/P}`.

    Args:
        time: t, half a step size, (C,).
        length: Decoherence length L, (C,).
        dim: Number P of parameters.

    Returns:
        :math:`\nu`, (C, 1): the direction u becomes :math:`\mathrm{normalise}(u + \nu\xi)`.
    """
    return (torch.expm1(2.0 * time / length) / dim).sqrt().unsqueeze(-1)


def largest_error(dim: int) -> float:
    """Energy error in nats at which a step counts as diverged: 1000, growing as the root of P above 1000 parameters."""
    return 1000.0 * max(1.0, math.sqrt(dim / 1000.0))


def isokinetic_step(
    state: Moving,
    step_size: Tensor,
    length: Tensor,
    scale: Tensor,
    noise: Tensor,
    value_and_grad: ValueAndGrad,
) -> tuple[Moving, Tensor, Tensor]:
    """Refresh for half a step, move, refresh for half a step; a step that diverges is not taken.

    Args:
        state: Where the chains are.
        step_size: (C,).
        length: Decoherence length L, (C,).
        scale: See :func:`mclachlan`.
        noise: Standard normal numbers of both refreshments, (C, 2, P).
        value_and_grad: See :func:`mclachlan`.

    Returns:
        The new state; the energy error (C,), 0 where the step was not finite; and whether it was taken (C,).
        A chain that stays where it is sets off in a new direction.
    """
    dim = state.direction.shape[-1]
    nu = refreshment(0.5 * step_size, length, dim)
    before = normalised(state.direction + nu * noise[:, 0])
    begun = Moving(state.position, before, state.gradient, state.log_density)
    moved, error = mclachlan(begun, step_size, scale, value_and_grad)
    after = normalised(moved.direction + nu * noise[:, 1])
    # Log density and gradient of the new position are in the error, which is finite only if they are.
    finite = torch.isfinite(error)
    taken = finite & (error.abs() < largest_error(dim))
    rows = taken.unsqueeze(-1)
    new = Moving(
        torch.where(rows, moved.position, state.position),
        torch.where(rows, after, normalised(noise[:, 0])),
        torch.where(rows, moved.gradient, state.gradient),
        torch.where(taken, moved.log_density, state.log_density),
    )
    return new, torch.where(finite, error, 0.0), taken
