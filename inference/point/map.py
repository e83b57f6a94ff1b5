r"""MAP: the mode of the posterior, as one point.

.. math:: \hat\theta = \arg\max_\theta \log p(\theta) + \sum_n \log p(y_n \mid x_n, \theta)

Found by Adam (or SGD) on the energy per datum and, when a step sees all the data, polished by L-BFGS. A mode depends on
the coordinates: by default the density is the one of the sites as declared, without the Jacobian of constrained
sites (``Gamma(3, 1)`` gives 2); with ``jacobian=True`` it is the density in unconstrained space (exp(mode) = 3), the
point around which Laplace approximations are made. A temperature of the whole energy leaves the mode where it is.

Wrong by design: no uncertainty about the weights; the noise of the likelihood is all that `predict` shows.
Cost: ``num_steps`` gradients. Memory: 3 P. Reference: [mackay1992], weight decay as a Gaussian prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.backend import Backend, Batches, Run, check_integer, check_positive
from inference.graph import capture
from inference.optimisation import (
    OPTIMISERS,
    SCHEDULES,
    Loss,
    OptimiserName,
    Recipe,
    ScheduleName,
    check_choice,
    energy_per_datum,
    polish,
    train,
)
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target


@dataclass(frozen=True, kw_only=True)
class MAP(Backend):
    """Maximum a posteriori estimate.

    Attributes:
        num_steps: Optimiser steps, >= 1.
        step_size: Learning rate at the start, on the mean loss. 1e-2 suits Adam on small networks; 1e-3 large ones.
        batch_size: Data per step; None for the loader's, or else all.
        optimiser: "adam", "sgd" (momentum 0.9) or "adagrad".
        schedule: "cosine" (to 0) or "constant".
        jacobian: Maximise the density in unconstrained space instead of the one of the sites as declared.
        num_restarts: Independent starts, trained side by side; the one with the lowest energy is kept.
        polish: End with L-BFGS when a step sees all the data.
    """

    num_steps: int = 2000
    step_size: float = 1e-2
    batch_size: int | None = None
    optimiser: OptimiserName = "adam"
    schedule: ScheduleName = "cosine"
    jacobian: bool = False
    num_restarts: int = 1
    polish: bool = True

    family: ClassVar[str] = "point"
    bias: ClassVar[str] = "a single point: no uncertainty about the weights"
    reference: ClassVar[str] = "MacKay 1992"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"minibatches", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", "batch_size", "num_restarts")
        check_positive(self, "step_size")
        check_choice(self, "optimiser", OPTIMISERS)
        check_choice(self, "schedule", SCHEDULES)

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Train, polish, keep the best start.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            One draw, (1, 1, P).
        """
        loss = energy_per_datum(target, jacobian=self.jacobian)
        start = target.initial(self.num_restarts, run.seed, run.init)
        recipe = Recipe(
            num_steps=self.num_steps,
            step_size=self.step_size,
            batch_size=self.batch_size,
            optimiser=self.optimiser,
            schedule=self.schedule,
        )
        theta = train(target, run, start, recipe, loss=loss, description="MAP").theta
        if self.polish and Batches(target, self.batch_size, [run.stream()]).full:
            loss_of = partial(energy_per_datum, jacobian=self.jacobian)
            theta = torch.stack([polish(target, run, t, loss_of) for t in theta])
        grads, values = _full_data(target, loss, theta)
        best = int(values.argmin())
        run.count(theta.shape[0])
        run.info.extra |= {"loss": float(values[best]), "gradient_norm": float(grads[best].norm())}
        return DrawsPosterior(target, theta[best][None, None], backend=self, info=run.info)


def _full_data(target: Target, loss: Loss, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (M, P) and losses (M,) on all the data."""
    program = capture(vmap(grad_and_value(loss), in_dims=(0, None, None)), theta, target.x, target.y)
    with torch.no_grad():
        return program(theta, target.x, target.y)
