r"""Leapfrog integration of Hamiltonian dynamics, for one chain or many in one recorded call.

With log density :math:`\ell(\theta)`, momentum p and inverse mass :math:`M^{-1}`, one step of size :math:`\epsilon` is

.. math::
    p \leftarrow p + \tfrac{\epsilon}{2}\nabla\ell(\theta), \qquad
    \theta \leftarrow \theta + \epsilon M^{-1} p, \qquad
    p \leftarrow p + \tfrac{\epsilon}{2}\nabla\ell(\theta).

The gradient at the end of a step is handed to the next one, so L steps cost L gradients. Going backwards in time is a
negative step size. Source: neal2011mcmc, equations 2.28-2.30 [recalled from the paper, not re-read].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.graph import Captured, CompileOption, hot

# Rows of a block (4, C, P).
POSITION, MOMENTUM, GRADIENT, MOMENTUM_SUM = range(4)

LogDensity = Callable[..., Tensor]


def velocity(inverse_mass: Tensor, momentum: Tensor) -> Tensor:
    r"""Velocity, :math:`M^{-1} p`.

    Args:
        inverse_mass: Diagonal (..., P), dense (..., P, P), or a diagonal d above factors A and B of R rows each,
            (..., 1 + 2 R, P) for :math:`\mathrm{diag}(d) + A^\top B`; the number of rows tells them apart.
        momentum: (..., P).

    Returns:
        (..., P).
    """
    if inverse_mass.dim() == momentum.dim():
        return inverse_mass * momentum
    if inverse_mass.shape[-1] == inverse_mass.shape[-2]:
        return (inverse_mass @ momentum.unsqueeze(-1)).squeeze(-1)
    rank = inverse_mass.shape[-2] // 2
    diagonal, left, right = inverse_mass.split([1, rank, rank], -2)
    # Factors lie row by row: as columns the same products took a third of a whole leapfrog of a small network.
    row = momentum.unsqueeze(-2)
    return (diagonal * row + (row @ right.mT) @ left).squeeze(-2)


def leapfrog(
    position: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    inverse_mass: Tensor,
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One leapfrog step, reversible and volume preserving.

    Args:
        position: Theta, (..., P).
        momentum: (..., P).
        gradient: Gradient of the log density at ``position``, (..., P).
        step_size: Signed step size, broadcastable to (..., P).
        inverse_mass: See :func:`velocity`.
        value_and_grad: Log density (...,) in nats and gradient (..., P) at a position.

    Returns:
        New position, momentum, gradient (..., P) and log density (...,).
    """
    momentum = momentum + 0.5 * step_size * gradient
    position = position + step_size * velocity(inverse_mass, momentum)
    value, gradient = value_and_grad(position)
    momentum = momentum + 0.5 * step_size * gradient
    return position, momentum, gradient, value


@dataclass(frozen=True)
class LeapfrogProgram:
    """One leapfrog of C chains as a recorded graph, with the U-turn checks that a trajectory may ask for.

    Attributes:
        captured: The graph.
        data: Tensors the log density reads besides theta.
        num_slots: Number K of stored points that every new point is checked against; at most 50.
    """

    captured: Captured
    data: tuple[Tensor, ...]
    num_slots: int

    def __call__(
        self, block: Tensor, step_size: Tensor, inverse_mass: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Advance every chain by one step.

        Args:
            block: Position, momentum, gradient and sum of momenta before this step, (4, C, P).
            step_size: Signed step size of each chain, (C,).
            inverse_mass: As :func:`velocity` takes it, (C, ...).
            slots: Velocity :math:`v_k` of stored points and sum of momenta before them :math:`s_k`, (2, C, K, P).

        Returns:
            The new block (4, C, P); what a slot would store of the new point (2, C, P); and in float64 (C, 3) its log
            density, its kinetic energy (nats) and a number whose bit k says that the path from stored point k to here
            has turned: :math:`v_k \cdot \rho \le 0` or :math:`v \cdot \rho \le 0` for :math:`\rho = s - s_k`.
        """
        block, pair, scalars = self.captured.call(block, step_size, inverse_mass, slots, *self.data)
        return block, pair, scalars

    @property
    def compiled(self) -> bool:
        """Whether the graph went through Inductor."""
        return self.captured.compiled


def leapfrog_program(
    log_density: LogDensity,
    block: Tensor,
    inverse_mass: Tensor,
    *,
    data: Sequence[Tensor] = (),
    num_slots: int = 0,
    compile: CompileOption = False,
    num_calls: float = 0,
) -> LeapfrogProgram:
    """Record one leapfrog of all chains.

    Args:
        log_density: Function of theta (P,) and ``data``, giving () nats; float64 if energies need it. If it has a dict
            ``recorded``, programs are looked for and left there.
        block: Example of the chains' state, (4, C, P).
        inverse_mass: Example, as :func:`velocity` takes it, (C, ...).
        data: Tensors handed to ``log_density``.
        num_slots: Number K of stored points to check U-turns against.
        compile: See :func:`inference.graph.hot`.
        num_calls: Expected number of steps.

    Returns:
        The program.
    """
    data = tuple(data)
    single = grad_and_value(log_density)
    batched = vmap(single, in_dims=(0, *(None for _ in data)))
    bits = 2.0 ** torch.arange(num_slots, dtype=torch.float64, device=block.device)

    def step(block: Tensor, step_size: Tensor, inverse_mass: Tensor, slots: Tensor, *data: Tensor) -> list[Tensor]:
        def value_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
            if theta.shape[0] > 1:
                grad, value = batched(theta, *data)
                return value, grad
            grad, value = single(theta[0], *data)  # plain matrix products are faster than batched ones of one
            return value.unsqueeze(0), grad.unsqueeze(0)

        before = block[MOMENTUM_SUM]
        position, momentum, gradient, value = leapfrog(
            block[POSITION], block[MOMENTUM], block[GRADIENT], step_size.unsqueeze(-1), inverse_mass, value_and_grad
        )
        speed = velocity(inverse_mass, momentum)
        total = before + momentum
        # Float64: acceptance needs differences of energies far smaller than the energies.
        kinetic = 0.5 * (momentum.double() * speed.double()).sum(-1)
        rho = total.unsqueeze(1) - slots[1]  # (C, K, P)
        going = ((slots[0] * rho).sum(-1) > 0) & ((speed.unsqueeze(1) * rho).sum(-1) > 0)
        turned = torch.where(going, 0.0, bits).sum(-1)
        scalars = torch.stack([value.double(), kinetic, turned], -1)
        return [
            torch.stack([position, momentum, gradient, total]),
            torch.stack([speed, before]),
            scalars,
        ]

    slots = block.new_zeros(2, block.shape[1], num_slots, block.shape[2])
    steps = block.new_zeros(block.shape[1])
    options = {"compile": compile, "num_calls": num_calls, "recorded": getattr(log_density, "recorded", None)}
    captured = hot(step, block, steps, inverse_mass, slots, *data, **options)
    return LeapfrogProgram(captured, data, num_slots)
