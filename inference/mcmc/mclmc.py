r"""Microcanonical Langevin Monte Carlo: fast chains without an accept step, their bias held down by the step size.

A particle of constant speed moves through theta; its direction u is bent by the gradient of the log density (see
:mod:`inference.mcmc.isokinetic`) and partially refreshed so that it is forgotten over the decoherence length L. Started
anywhere, the exact dynamics visit theta in proportion to the posterior; the discretised ones do so up to an error that
is controlled through the energy errors E of the steps,

.. math:: \mathrm{mean}(E^2)/P = v,

to which warm-up tunes the step size of each chain (see :mod:`inference.mcmc.microcanonical`).

Wrong by design: nothing is ever rejected, so that moments are off by O(step size^2): 0 to 2 % in the variances at the
default v = 5e-4. Cost: 2 gradients a step, ``thinning`` steps a draw. Memory: 6 P a chain and the draws. Chains tune
themselves on their own, so a chain does not depend on the others. On a single parameter, where there are no directions,
an independent standard normal one is added and left out of the draws [our reconstruction].
References: robnik2023microcanonical, robnik2024fluctuation; tuning and defaults as in blackjax.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inference.backend import Run, check_positive
from inference.errors import ConvergenceWarning
from inference.mcmc.chain_backend import ChainBackend, warn_of_divergences
from inference.mcmc.lockstep import fit_in_lockstep
from inference.mcmc.microcanonical import Microcanonical, Tuning
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target

# Energy errors this many times above their goal are not what was tuned for.
_TOLERATED = 10.0


@dataclass(frozen=True, kw_only=True)
class MCLMC(ChainBackend):
    r"""Microcanonical Langevin Monte Carlo.

    Attributes:
        num_samples: Steps per chain after warm-up, of which every ``thinning``-th is kept.
        warmup_steps: Discarded steps per chain, a third for each phase of the tuning.
        thinning: Steps per draw; steps are small, so that neighbours are nearly the same.
        step_size: Length of a step, kept as it is; None to tune it.
        decoherence_length: L, the distance over which the direction is forgotten; None to tune it.
        energy_variance: Mean squared energy error per step and parameter v that the step size is tuned to.
        precondition: Scale each parameter by its standard deviation in the chain so far.
        trust: Width of the weights in the average of energy errors; larger trusts outliers more.
        window: Effective number of steps of that average, > 1.
    """

    num_samples: int = 10_000
    warmup_steps: int = 5000
    num_chains: int = 4
    thinning: int = 10
    step_size: float | None = None
    decoherence_length: float | None = None
    energy_variance: float = 5e-4
    precondition: bool = False
    trust: float = 1.5
    window: float = 150.0

    bias: ClassVar[str] = "no accept step: variances off by 0 to 2 % at the default energy error, growing with the step"
    reference: ClassVar[str] = "Robnik et al. 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "step_size", "decoherence_length", "energy_variance", "trust", "window")
        if not self.window > 1:
            raise ValueError(f"`window` must be > 1, got {self.window}")
        if self.warmup_steps == 0 and self.tunes:
            raise ValueError(
                "`warmup_steps` must be >= 1 where something is tuned, got 0; give `step_size` and "
                "`decoherence_length` and leave out `precondition` to go without"
            )

    @property
    def tunes(self) -> bool:
        """Whether warm-up has anything to find."""
        return self.step_size is None or self.decoherence_length is None or self.precondition

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Tune and run the chains.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            Draws (C, S, P), with sample statistics.
        """
        return self.sample_from(target, run, target.initial(self.num_chains, run.seed, run.init))

    def sample_from(self, target: Target, run: Run, starts: Tensor) -> DrawsPosterior:
        """Run the chains from given points.

        Args:
            target: Tempered target.
            run: This fit.
            starts: Starting points, (C, P).

        Returns:
            Draws (C, S, P), with sample statistics.
        """
        posterior = fit_in_lockstep(
            self,
            target,
            run,
            starts,
            lambda problem: Microcanonical(problem, self.tuning(problem.dim), self.num_samples, self.thinning),
        )
        warn_of_divergences(run, posterior.sample_stats, "lower `energy_variance`")
        found = statistics.fmean(run.info.extra["energy_variance"])
        if self.step_size is None and not found < _TOLERATED * self.energy_variance:
            run.warn(
                ConvergenceWarning,
                f"the energy errors have a mean square of {found:.2g} per parameter, where {self.energy_variance:g} "
                "was aimed at: the draws are biased; warm up longer, start at a MAP posterior, or lower "
                "`energy_variance`",
            )
        return posterior

    def tuning(self, dim: int) -> Tuning:
        """What warm-up does for P parameters."""
        root = math.sqrt(max(dim, 2))
        return Tuning(
            steps=self._phases(),
            step_size=self.step_size or 0.25 * root,
            length=self.decoherence_length or root,
            adapt_step_size=self.step_size is None,
            adapt_length=self.decoherence_length is None,
            precondition=self.precondition,
            first_goal=self.energy_variance,
            last_goal=self.energy_variance,
            trust=self.trust,
            window=self.window,
        )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Parts of the warm-up: step size; step size and variances; step size after preconditioning; length."""
        return (0.3, 0.3, 0.1, 0.3) if self.precondition else (1 / 3, 1 / 3, 0.0, 1 / 3)

    def _phases(self) -> tuple[int, int, int, int]:
        """Steps of each part of the warm-up; a part that finds nothing leaves its steps to the others."""
        if not self.tunes:
            return 0, 0, 0, self.warmup_steps
        _, second, third, fourth = (int(share * self.warmup_steps) for share in self.shares)
        if self.decoherence_length is not None:
            fourth = 0
            second = second if self.precondition else 0
        return self.warmup_steps - second - third - fourth, second, third, fourth
