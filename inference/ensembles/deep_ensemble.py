r"""Deep ensembles: M networks trained alike from independent starts, predicting as an equal-weight mixture.

.. math:: \theta_m = \arg\min_\theta -\tfrac1N \log p(\theta, y \mid x) \text{ from } \theta_m^0, \qquad
          p(y \mid x) \approx \tfrac1M \sum_m p(y \mid x, \theta_m)

Every member sees all the data in its own order (no bootstrap). Whether the noise is shared or depends on the input is
the declared likelihood's affair. Lakshminarayanan et al. train without a prior; here the model's prior, without the
Jacobians of constrained sites, is in the loss by default and shared by all members (``prior=False`` leaves it out), so
that each one is a MAP estimate of the declared model. ``weight_decay`` is AdamW's, which is no prior (where it stops
depends on the preconditioner): together with a prior it shrinks twice. With ``validation_fraction`` members stop early,
each at its best loss on data that none of them is trained on [not in the paper].

Wrong by design: members are modes found, not draws; on a convex problem all of them coincide with the MAP and the
epistemic variance is zero. Cost: M times a MAP. Memory: 4 M P. Members advance in one call where that is faster.
Reference: [lakshminarayanan2017].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from inference.backend import Backend, Run, check_integer, check_positive
from inference.data import Tree
from inference.early_stopping import EarlyStopping, hold_out
from inference.optimisation import (
    OPTIMISERS,
    SCHEDULES,
    SHUFFLING_STREAM,
    Loss,
    OptimiserName,
    Recipe,
    ScheduleName,
    check_choice,
    energy_per_datum,
    train,
)
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target

_SPLIT_STREAM = SHUFFLING_STREAM - 1


@dataclass(frozen=True, kw_only=True)
class DeepEnsemble(Backend):
    """Ensemble of independently trained networks.

    Attributes:
        num_members: Networks M, >= 1.
        num_steps: Optimiser steps of each member, >= 1; at most, where they stop early.
        step_size: Learning rate at the start, on the mean loss.
        batch_size: Data per step and member; None for the loader's, or else 100.
        optimiser: "adam", "sgd" (momentum 0.9) or "adagrad".
        schedule: "cosine" (to 0 at ``num_steps``) or "constant", which is the one to stop early with.
        weight_decay: Decoupled weight decay, >= 0, of every entry of theta; for Adam (then AdamW) alone.
        prior: Keep the model's prior in the loss.
        adversarial_epsilon: Half the loss is taken at inputs moved by this fraction of each input's range, by the sign
            of the loss's gradient (0.01 in the paper). None trains on the data alone. Needs one float tensor x.
        validation_fraction: Share of the data, between 0 and 1, that is drawn by the seed, the same for all members,
            and not trained on: a member stops when its mean log-likelihood there stops rising, and keeps the weights
            that it was highest at. None trains on all data for all steps.
        patience: Epochs without a new best after which a member stops, >= 1.
    """

    num_members: int = 5
    num_steps: int = 2000
    step_size: float = 1e-2
    batch_size: int | None = None
    optimiser: OptimiserName = "adam"
    schedule: ScheduleName = "cosine"
    prior: bool = True
    adversarial_epsilon: float | None = None
    weight_decay: float = 0.0
    validation_fraction: float | None = None
    patience: int = 10

    family: ClassVar[str] = "ensembles"
    bias: ClassVar[str] = "members are separate modes: no spread within a mode, none at all on convex problems"
    reference: ClassVar[str] = "Lakshminarayanan et al. 2017"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"minibatches", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_members", "num_steps", "batch_size", "patience")
        check_positive(self, "step_size", "adversarial_epsilon")
        check_choice(self, "optimiser", OPTIMISERS)
        check_choice(self, "schedule", SCHEDULES)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"`weight_decay` must be >= 0, got {self.weight_decay!r}")
        if self.weight_decay and self.optimiser != "adam":
            raise ValueError(
                f'`weight_decay` is decoupled, for optimiser="adam"; with "{self.optimiser}" leave it at 0, and let '
                "the prior of the model shrink the weights"
            )
        fraction = self.validation_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"`validation_fraction` must be between 0 and 1, or None, got {fraction!r}")

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Train all members.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            One draw per member, (1, M, P).
        """
        trained_on, stopping = target, None
        if self.validation_fraction is not None:
            trained_on, held_out = hold_out(target, self.validation_fraction, run.stream(_SPLIT_STREAM))
            stopping = EarlyStopping(held_out, self.patience)
        loss = energy_per_datum(trained_on, jacobian=False, prior=self.prior)
        if self.adversarial_epsilon is not None:
            loss = _adversarial(trained_on, loss, self.adversarial_epsilon)
        recipe = Recipe(
            num_steps=self.num_steps,
            step_size=self.step_size,
            batch_size=self.batch_size or target.batch_size or 100,
            optimiser=self.optimiser,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
        )
        start = target.initial(self.num_members, run.seed, run.init)
        trained = train(trained_on, run, start, recipe, loss=loss, description="deep ensemble", stopping=stopping)
        run.info.extra |= {"losses": trained.losses.tolist(), "steps": trained.steps.tolist()}
        return DrawsPosterior(target, trained.theta[None], backend=self, info=run.info)


def _adversarial(target: Target, loss: Loss, epsilon: float) -> Loss:
    r"""Mean of the loss at x and at :math:`x + \epsilon\,\mathrm{range}(x)\,\mathrm{sign}(\nabla_x \text{loss})`.

    The paper adds the two; the mean counts the prior once.

    Args:
        target: Supplies the range of each input.
        loss: Loss of one member.
        epsilon: Fraction of the range.

    Returns:
        The new loss.

    Raises:
        TypeError: If the inputs are not one float tensor.
    """
    x = target.x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            "`adversarial_epsilon` needs one float tensor x; set it to None for dict, tuple or integer inputs"
        )
    reach = epsilon * (x.amax(0) - x.amin(0))

    def both(theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        direction = grad(lambda inputs: -target.log_likelihood(theta, inputs, y).sum())(x).sign()
        moved = x + reach * direction.detach()
        return torch.stack([loss(theta, x, y), loss(theta, moved, y)]).mean()

    return both
