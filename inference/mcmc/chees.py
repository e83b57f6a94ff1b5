r"""ChEES-HMC: many Hamiltonian chains in lock step that learn one step size and one trajectory length from each other.

Every iteration all C chains take :math:`\lceil uT/\epsilon\rceil` leapfrogs, u from a Halton sequence, and accept or
reject as in :mod:`inference.mcmc.hmc`. Warm-up climbs the change in the estimator of the expected square,

.. math:: \mathrm{ChEES} = \tfrac14 \mathrm{E}\big[(|\theta'-\mathrm{E}\theta'|^2 - |\theta-\mathrm{E}\theta|^2)^2\big],

by Adam on :math:`\log T` with the gradient
:math:`uT(|\theta'-\bar\theta'|^2-|\theta-\bar\theta|^2)(\theta'-\bar\theta')^\top p'`, averaged over the chains with
their acceptance probabilities as weights (the mean of the proposals has them as well; divergent chains are left out).
The step size follows the harmonic mean of the acceptance probabilities by dual averaging. What is kept are averages of
:math:`\log\epsilon` and :math:`\log T` over the iterations t with weights :math:`t^{-1/2}`.

Exact for the target once warm-up is over. Cost: C times the leapfrogs, all in one call; memory 6 C P. All chains start
from one mode: chains in different modes inflate the expected square, and with it the length. Where that cannot be
had, ``centre="chain"`` measures each chain from its own running mean.
References: hoffman2021chees [step size, length and averages as in the authors' and blackjax's code; Adam's constants
recalled from the paper, not re-read].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference.backend import Backend, Run, check_integer, check_positive
from inference.errors import ConvergenceWarning
from inference.mcmc.chain_backend import ChainBackend, warn_of_divergences
from inference.mcmc.chees_chains import ChEESChains
from inference.mcmc.lockstep import fit_in_lockstep
from inference.optimisation import check_choice
from inference.point import MAP
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target

_START_STREAM = 300_000


@dataclass(frozen=True, kw_only=True)
class ChEESHMC(ChainBackend):
    r"""Hamiltonian Monte Carlo with a step size and a trajectory length learnt across chains.

    Attributes:
        warmup_steps: Discarded iterations, in which step size, length and mass matrix adapt.
        num_chains: Chains C, at least 2 where something adapts; the authors advise 64, of which a CPU of two cores
            runs 16 of a small network in little more time than 4.
        step_size: First leapfrog step, or None to find one by doubling.
        trajectory_length: First integration time T, or None for a single leapfrog.
        adapt: Whether warm-up adapts step size and length.
        target_accept: Harmonic mean of the acceptance probabilities to adapt to, in (0, 1).
        learning_rate: Of Adam on the logarithm of the length.
        jitter: Part of the length that u jitters: trajectories last from 1 - jitter to 1 times T; in [0, 1].
        max_leapfrogs: Bound on the leapfrogs of one trajectory.
        mass_matrix: "identity", as in the paper, or "diagonal": after a tenth, a quarter and a half of the warm-up,
            the variances of the draws of all chains since the last time (at least half of the warm-up then tunes the
            rest again, measured in units of these standard deviations).
        centre: What distances are measured from: the mean of all chains ("pooled"), or of each one ("chain").
        start: Finds the mode that all chains start from; None starts them where ``init`` says.
        start_jitter: Standard deviation of the noise that parts the chains at the mode, per unconstrained parameter.
    """

    num_samples: int = 500
    warmup_steps: int = 500
    num_chains: int = 16
    step_size: float | None = None
    trajectory_length: float | None = None
    adapt: bool = True
    target_accept: float = 0.651
    learning_rate: float = 0.025
    jitter: float = 1.0
    max_leapfrogs: int = 1000
    mass_matrix: Literal["identity", "diagonal"] = "identity"
    centre: Literal["pooled", "chain"] = "pooled"
    start: Backend | None = MAP()
    start_jitter: float = 0.01

    bias: ClassVar[str] = "exact in the limit; its chains explore the one mode they start from"
    reference: ClassVar[str] = "Hoffman et al. 2021"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "step_size", "trajectory_length", "target_accept", "learning_rate", "start_jitter")
        check_integer(self, "max_leapfrogs", minimum=1)
        if not self.target_accept < 1:
            raise ValueError(f"`target_accept` must be between 0 and 1, got {self.target_accept}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"`jitter` must be in [0, 1], got {self.jitter}")
        check_choice(self, "mass_matrix", ("identity", "diagonal"))
        check_choice(self, "centre", ("pooled", "chain"))
        if self.adapt and self.warmup_steps == 0:
            raise ValueError(
                "`warmup_steps` must be >= 1 where step size and length are learnt, got 0; to go without, set "
                "`adapt=False`, `step_size` and `trajectory_length`"
            )
        if self.adapt and self.num_chains == 1:
            raise ValueError(
                "`num_chains` must be >= 2 where the length is learnt across chains, got 1; use NUTS for a single one"
            )
        if not self.adapt and None in (self.step_size, self.trajectory_length):
            raise ValueError(
                "`adapt=False` keeps `step_size` and `trajectory_length`: give both, got "
                f"{self.step_size} and {self.trajectory_length}"
            )

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Find the mode, tune and run the chains.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            Draws (C, S, P), with sample statistics.
        """
        posterior = fit_in_lockstep(self, target, run, self._starts(target, run), lambda p: ChEESChains(self, p))
        self._warn(run, posterior)
        return posterior

    def _starts(self, target: Target, run: Run) -> Tensor:
        if self.start is None:
            return target.initial(self.num_chains, run.seed, run.init)
        found = self.start.fit_target(target, run.sub(self.start, run.init))
        mode = target.initial(1, run.seed, found)
        noise = [
            torch.randn(
                target.dim,
                generator=run.stream(_START_STREAM + c),
                dtype=mode.dtype,
                device=mode.device,
            )
            for c in range(self.num_chains)
        ]
        return mode + self.start_jitter * torch.stack(noise)

    def _warn(self, run: Run, posterior: DrawsPosterior) -> None:
        stats = posterior.sample_stats
        warn_of_divergences(run, stats, "raise `target_accept` or reparametrise the model")
        mean = float(stats["acceptance_rate"].mean())
        if self.adapt and mean < 0.5 * self.target_accept:
            run.warn(
                ConvergenceWarning,
                f"the mean acceptance is {mean:.2f}, where a harmonic mean of {self.target_accept} was aimed at: "
                "raise `warmup_steps`",
            )
        share = float((stats["n_steps"] >= self.max_leapfrogs).double().mean())
        if share > 0.1:
            run.warn(
                ConvergenceWarning,
                f"{100 * share:.0f} % of the trajectories had max_leapfrogs={self.max_leapfrogs}: they are shorter "
                "than they should be; raise it",
            )
