r"""SVGD: n particles that climb the log posterior together and push one another apart.

.. math:: \theta_i \mathrel{+}= \epsilon\,\phi(\theta_i), \qquad
          \phi(\theta_i) = \frac1n \sum_j \left[k(\theta_j, \theta_i) \nabla \log p(\theta_j \mid D)
          + \nabla_{\theta_j} k(\theta_j, \theta_i)\right], \qquad k(\theta, \theta') = e^{-|\theta - \theta'|^2 / h}

with :math:`h = \mathrm{median}_{i<j} |\theta_i - \theta_j|^2 / \log n`, recomputed at every step and not
differentiated. The driving term is the gradient of the summed log posterior, the repulsion counts once, and all
gradients belong to the same step. The density is the one in unconstrained space; one particle is exactly MAP with
``jacobian=True``. A minibatch is shared by all particles.

Wrong by design: the variance collapses once the parameters outnumber the particles: on N(0, I) in P dimensions the
marginal variance of n particles is .92 at (n, P) = (100, 2), .15 at (20, 20) and .04 at (50, 100). The mean of
symmetric targets is exact.
Cost: n gradients a step, and n^2 P for the kernel. Memory: 4 n P. Reference: [liu2016].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.backend import Backend, Batches, Run, check_integer, check_positive, stacked
from inference.data import Tree, map_tree
from inference.graph import hot
from inference.optimisation import (
    OPTIMISERS,
    SCHEDULES,
    SHUFFLING_STREAM,
    OptimiserName,
    Program,
    Recipe,
    ScheduleName,
    check_choice,
    descend,
)
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target

# Particles that coincide have no median distance; any positive bandwidth then gives the same step.
_SMALLEST_BANDWIDTH = 1e-12


@dataclass(frozen=True, kw_only=True)
class SVGD(Backend):
    """Stein variational gradient descent.

    Attributes:
        num_particles: Particles n, >= 1.
        num_steps: Optimiser steps, >= 1.
        step_size: Learning rate at the start.
        batch_size: Data per step, the same for all particles; None for all (or the loader's).
        bandwidth: "median", or a fixed h > 0.
        optimiser: "adam", "adagrad", or "sgd" (momentum 0.9), on minus phi / N.
        schedule: "cosine" (to 0) or "constant".
    """

    num_particles: int = 20
    num_steps: int = 2000
    step_size: float = 1e-2
    batch_size: int | None = None
    bandwidth: float | Literal["median"] = "median"
    optimiser: OptimiserName = "adam"
    schedule: ScheduleName = "cosine"

    family: ClassVar[str] = "particles"
    bias: ClassVar[str] = "variance collapses once parameters outnumber particles; means of symmetric targets are exact"
    reference: ClassVar[str] = "Liu and Wang 2016"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"minibatches", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_particles", "num_steps", "batch_size")
        check_positive(self, "step_size")
        if self.bandwidth != "median":
            check_positive(self, "bandwidth")
        check_choice(self, "optimiser", OPTIMISERS)
        check_choice(self, "schedule", SCHEDULES)

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Move all particles together.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            One draw per particle, (1, n, P).
        """
        start = target.initial(self.num_particles, run.seed, run.init)
        batches = Batches(target, self.batch_size, [run.stream(SHUFFLING_STREAM)])
        recipe = Recipe(
            num_steps=self.num_steps, step_size=self.step_size, optimiser=self.optimiser, schedule=self.schedule
        )
        bandwidth = None if self.bandwidth == "median" else self.bandwidth
        program = stein_program(target, run, batches, start, bandwidth, self.num_steps)
        everyone = slice(0, self.num_particles)
        with run.bar(self.num_steps, "SVGD") as bar:
            trained = descend(target, run, program, start, recipe, batches, bar, everyone)
        run.info.extra |= {"loss": float(trained.losses.mean())}
        return DrawsPosterior(target, trained.theta[None], backend=self, info=run.info)


def stein_direction(theta: Tensor, grads: Tensor, bandwidth: float | None = None) -> Tensor:
    r"""The direction :math:`\phi` in which each particle moves.

    Args:
        theta: Particles, (n, P).
        grads: Gradients of the log density at them, (n, P).
        bandwidth: h of the kernel :math:`e^{-|\theta-\theta'|^2/h}`; None for the median rule.

    Returns:
        (n, P).
    """
    num = theta.shape[0]
    if num == 1:
        return grads
    centred = theta - theta.mean(0)  # against cancellation in the Gram matrix
    gram = centred @ centred.mT
    norms = gram.diagonal()
    distances = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)  # (n, n), squared
    if bandwidth is None:
        rows, columns = torch.triu_indices(num, num, 1, device=theta.device)
        pairs = distances[rows, columns].sort().values
        median = 0.5 * (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2])
        width = (median / math.log(num)).clamp(min=_SMALLEST_BANDWIDTH)
    else:
        width = torch.as_tensor(bandwidth, dtype=theta.dtype, device=theta.device)
    kernel = torch.exp(-distances / width)
    repulsion = (2 / width) * (kernel.sum(-1, keepdim=True) * centred - kernel @ centred)
    return (kernel @ grads + repulsion) / num


def stein_program(
    target: Target, run: Run, batches: Batches, start: Tensor, bandwidth: float | None, num_calls: int
) -> Program:
    """Record what the optimiser descends: minus phi / N of all particles, kernel included, as one graph.

    Where one particle's matrix products fill a core, their gradients are taken one after another instead.

    Args:
        target: The model.
        run: Says whether to compile.
        batches: One stream, shared by all particles.
        start: Particles, (n, P).
        bandwidth: See :func:`stein_direction`.
        num_calls: Expected number of calls.

    Returns:
        Function of particles (n, P), x and y to descent directions (n, P) and energies per datum (n,).
    """
    # With the temperature: here it changes the balance of the two terms.
    one = grad_and_value(lambda theta, x, y: target.log_density_estimate(theta, x, y))
    scale = -1.0 / target.num_data

    def shared(x: Tree, y: Tensor) -> tuple[Tree, Tensor]:
        return (x, y) if batches.full else (map_tree(lambda leaf: leaf[0], x), y[0])

    def together(theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        grads, values = vmap(one, in_dims=(0, None, None))(theta, *shared(x, y))
        return scale * stein_direction(theta, grads, bandwidth), scale * values

    compile = run.backend.compile
    if stacked(target, start.shape[0], batches.size):
        return hot(together, start, *batches.example(), compile=compile, num_calls=num_calls)

    single = hot(one, start[0], *shared(*batches.example()), compile=compile, num_calls=num_calls * len(start))

    def in_turn(theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        found = [single(particle, *shared(x, y)) for particle in theta]
        grads, values = torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])
        return scale * stein_direction(theta, grads, bandwidth), scale * values

    return in_turn
