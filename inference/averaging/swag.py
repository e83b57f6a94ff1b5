r"""SWAG: a Gaussian from the moments of SGD's iterates at a constant step size.

After a first phase that finds a solution, SGD goes on at a constant step size. Snapshots :math:`\theta_i`, one an
epoch, give running moments; their deviations :math:`\theta_i - \bar\theta_i` from the running mean that includes them,
of which the last K are kept, are the columns of D:

.. math:: q(\theta) = N\left(\bar\theta,\; \tfrac12 \mathrm{diag}(v) + \tfrac{1}{2(K-1)} D D^\top\right), \qquad
          v = \overline{\theta^2} - \bar\theta^2

with the number of columns there actually are as K. The diagonal variant is :math:`N(\bar\theta, \mathrm{diag}(v))`,
without the half.

Wrong by design: the spread is that of SGD's iterates, set by step size, batch size and momentum (on a quadratic of
curvature a with gradient noise s^2 and no momentum, :math:`\eta s^2 / (a(2 - \eta a))`); it is the posterior's only
where those were tuned to it. Full batches have no gradient noise: at most half of the data go into a step.
Cost: ``num_steps`` minibatch gradients. Memory: (K + 5) P.
Reference: [maddox2019]; the schedule is that of [izmailov2018].
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.backend import Backend, Run, check_integer, check_positive
from inference.distributions import DiagonalGaussian, FlatGaussian, LowRankGaussian
from inference.optimisation import OPTIMISERS, OptimiserName, Recipe, check_choice, energy_per_datum, train
from inference.posterior import GaussianPosterior, Posterior
from inference.target import Target

VARIANTS = ("low_rank", "diagonal")
_SMALLEST_VARIANCE = 1e-30


@dataclass(frozen=True, kw_only=True)
class SWAG(Backend):
    """Stochastic weight averaging, Gaussian.

    The default step sizes were tried on a gap in one dimension (1-50-1, tanh and ReLU) and on UCI energy and yacht
    (8-50-1 and 6-50-1 tanh), standardised, with learnt noise.

    Attributes:
        num_steps: Steps of both phases together, >= 2.
        start: Share of the steps before the first snapshot, in (0, 1).
        step_size: Learning rate of the first phase, on the mean loss.
        averaging_step_size: Constant learning rate while snapshots are taken: it sets the width of the result.
        batch_size: Data per step, cut to half of the data (full batches have no noise). None for the loader's,
            or else 32.
        optimiser: "sgd", "adam" or "adagrad".
        momentum: Of SGD, in [0, 1).
        snapshot_every: Steps between snapshots; None for one epoch.
        max_rank: Columns K kept, >= 2.
        variant: "low_rank" or "diagonal".
    """

    num_steps: int = 4000
    start: float = 0.5
    step_size: float = 1e-2
    averaging_step_size: float = 1e-3
    batch_size: int | None = None
    optimiser: OptimiserName = "sgd"
    momentum: float = 0.9
    snapshot_every: int | None = None
    max_rank: int = 20
    variant: Literal["low_rank", "diagonal"] = "low_rank"

    family: ClassVar[str] = "averaging"
    bias: ClassVar[str] = "the spread is that of SGD's iterates: set by the step size, not by the posterior"
    reference: ClassVar[str] = "Maddox et al. 2019"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_density", "minibatches"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", "max_rank", minimum=2)
        check_integer(self, "batch_size", "snapshot_every")
        check_positive(self, "step_size", "averaging_step_size", "start")
        check_choice(self, "optimiser", OPTIMISERS)
        check_choice(self, "variant", VARIANTS)
        if self.start >= 1:
            raise ValueError(f"`start` must be a share of the steps in (0, 1), got {self.start}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum}")

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Descend, then average.

        Args:
            target: The model.
            run: This fit.

        Returns:
            A Gaussian, with a density.
        """
        size = min(self.batch_size or target.batch_size or 32, max(1, target.num_data // 2))
        every = self.snapshot_every or math.ceil(target.num_data / size)
        begin = int(self.start * self.num_steps)
        moments = SnapshotMoments(target.dim, self.max_rank)

        def collect(step: int, members: slice, theta: Tensor) -> None:
            if step > begin and (step - begin) % every == 0:
                moments.update(theta[0])

        recipe = Recipe(
            num_steps=self.num_steps,
            step_size=self.step_size,
            batch_size=size,
            optimiser=self.optimiser,
            schedule=lambda step: averaging_schedule(step / begin, self.averaging_step_size / self.step_size),
            momentum=self.momentum,
        )
        start = target.initial(1, run.seed, run.init)
        loss = energy_per_datum(target)
        trained = train(target, run, start, recipe, loss=loss, description="SWAG", callback=collect)
        run.info.extra |= {"loss": float(trained.losses[0]), "snapshots": moments.count, "rank": len(moments.columns)}
        gaussian = moments.gaussian(target.dtype, self.variant)
        return GaussianPosterior(target, gaussian, backend=self, info=run.info)


def averaging_schedule(progress: float, ratio: float) -> float:
    """Factor of the step size [izmailov2018]: 1 to half of the first phase, linear until 90 % of it, then constant.

    Args:
        progress: Steps done, as a share of the first phase (above 1 in the second).
        ratio: Final step size over initial one.

    Returns:
        The factor, from 1 to ``ratio``.
    """
    share = min(max((progress - 0.5) / 0.4, 0.0), 1.0)
    return 1.0 + share * (ratio - 1.0)


class SnapshotMoments:
    r"""Running mean and variance of snapshots, and the last K deviations; in double precision.

    The variance is updated in centred form (Welford), equal to :math:`\overline{\theta^2} - \bar\theta^2` without its
    cancellation.

    Args:
        dim: Number of parameters P.
        max_rank: Deviations kept, K.
    """

    def __init__(self, dim: int, max_rank: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(dim, dtype=torch.float64)
        self.columns: deque[Tensor] = deque(maxlen=max_rank)

    def update(self, theta: Tensor) -> None:
        """Take in one snapshot.

        Args:
            theta: (P,).
        """
        theta = theta.detach().to(torch.float64)
        if self.count == 0:
            self.mean, self.sum_of_squares = self.mean.to(theta.device), self.sum_of_squares.to(theta.device)
        self.count += 1
        before = theta - self.mean
        self.mean = self.mean + before / self.count
        column = theta - self.mean
        self.sum_of_squares += before * column
        self.columns.append(column)

    @property
    def variance(self) -> Tensor:
        """Population variance of the snapshots, floored at 1e-30, (P,)."""
        return (self.sum_of_squares / max(self.count, 1)).clamp(min=_SMALLEST_VARIANCE)

    def gaussian(self, dtype: torch.dtype, variant: str = "low_rank") -> FlatGaussian:
        """The Gaussian of Maddox et al. (2019), eq. 1 for the low-rank form.

        Args:
            dtype: Of the result.
            variant: "low_rank" or "diagonal".

        Returns:
            Gaussian over theta.

        Raises:
            ValueError: With fewer than two snapshots.
        """
        if self.count < 2:
            raise ValueError(
                f"SWAG took {self.count} snapshots and needs at least 2; raise `num_steps`, or lower `start` or "
                "`snapshot_every`"
            )
        loc, variance = self.mean.to(dtype), self.variance
        if variant == "diagonal":
            return DiagonalGaussian(loc, variance.sqrt().to(dtype))
        deviations = torch.stack(tuple(self.columns), -1)  # (P, K)
        factor = deviations / math.sqrt(2 * (deviations.shape[1] - 1))
        return LowRankGaussian(loc, (0.5 * variance).to(dtype), factor.to(dtype))
