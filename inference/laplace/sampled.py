r"""Laplace by samples alone: k draws from the linearised posterior, and prior precisions from them, at any size.

.. math:: z_j \sim N\left(0, T (H / T_l + A)^{-1}\right), \qquad f(x) = f(x, \theta^*) \pm J(x) z_j

Each draw is the solution of one linear system (:mod:`inference.laplace.sample_then_optimise`), found by products with
the Jacobian: no determinant, no P x P and no N x N matrix. Memory is a few times k P. With ``em_rounds`` the prior
precisions, and the noise, are learnt from the draws themselves (:mod:`inference.laplace.em`).

What it gets wrong: nothing on linear-Gaussian models but Monte-Carlo error (relative :math:`\sqrt{2/k}` of a variance);
elsewhere what the dense Laplace with a GGN gets wrong. There is no density and no log evidence. Cost: two gradients per
draw and step. Reference: Antoran et al. (2023), "Sampling-based inference for large linear models, with application to
linearised Laplace" [recalled from the paper, not re-read].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from inference.backend import Backend, Batches, Run, check_integer, check_positive
from inference.curvature import ggn_diagonal
from inference.errors import ApproximationWarning, ConvergenceWarning
from inference.hessians import prior_diagonal
from inference.kronecker import require_curved
from inference.laplace.base import site_of
from inference.laplace.em import Learnt, learn
from inference.laplace.mode import energy_of, find_mode, report_mode
from inference.laplace.prior_groups import Groups, Scaling, declared_prior, group_weights
from inference.laplace.sample_then_optimise import SampleThenOptimise, SolverOptions
from inference.linear_model import LinearModel
from inference.linearised_draws import LinearisedDrawsPosterior
from inference.optimisation import check_choice
from inference.point import MAP
from inference.posterior import Posterior
from inference.taps import num_outputs
from inference.target import Target

_SAMPLE_GROUPS, _SCALINGS = ("all", "site"), ("declared", "g_prior")
# The relative residual at which draws are no longer called draws.
_LOOSE = 0.1
# Standard errors by which draws may seem to spread farther than the prior.
_MAX_ERRORS = 5.0


@dataclass(frozen=True, kw_only=True)
class SampledLaplace(Backend):
    """Posterior draws of the network linearised at its mode, by optimisation.

    With full data the systems are solved by conjugate gradients; with ``batch_size`` (or a DataLoader) by stochastic
    gradient descent. The prior is the declared one unless ``em_rounds`` is given.

    Attributes:
        num_samples: Number k of draws; each is used with both signs.
        em_rounds: Most rounds of expectation-maximisation for prior precisions; 0 keeps the declared prior.
        groups: What shares one learnt precision: "site" (every tensor its own) or "all".
        scaling: Relative precisions in a group: "declared", or "g_prior" (the curvature's diagonal, which makes
            predictions independent of how each weight is scaled).
        sites: Name pattern(s) of the sites whose precision is learnt; None for all, which must be Gaussian.
        learn_noise: Also learn the noise variance, as one factor of the declared one; for a Normal likelihood with a
            known scale. A latent scale is part of theta and needs no such factor.
        num_steps: Most steps of conjugate gradients, or steps of stochastic descent, for each set of systems.
        tolerance: Relative residual that ends conjugate gradients, and change of a log precision that ends the rounds.
        batch_size: Data per step; None for the loader's, or else all.
        step_size: Of stochastic descent, in units of the inverse of the largest eigenvalue, in (0, 1).
        momentum: Of stochastic descent (Nesterov's), in [0, 1).
        start: How the mode is reached from the starting point, by default in the same minibatches; None takes `init`
            itself as the mode.
        polish_steps: Full-data L-BFGS steps after `start`; 0 for none. Left out with minibatches.
    """

    num_samples: int = 16
    em_rounds: int = 0
    groups: Groups = "site"
    scaling: Scaling = "declared"
    sites: str | tuple[str, ...] | None = None
    learn_noise: bool = False
    num_steps: int = 1000
    tolerance: float = 1e-2
    batch_size: int | None = None
    step_size: float = 0.5
    momentum: float = 0.9
    start: MAP | None = field(default_factory=MAP)
    polish_steps: int = 200

    family: ClassVar[str] = "laplace"
    bias: ClassVar[str] = "exact on linear-Gaussian models but for Monte-Carlo error; variances within sqrt(2/k)"
    reference: ClassVar[str] = "Antoran et al. 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"minibatches", "temperature"})

    def __post_init__(self) -> None:
        """Check choices, counts and ranges.

        Raises:
            ValueError: If a field is out of its range, or asks for what no round of EM would do.
        """
        super().__post_init__()
        check_integer(self, "num_samples", "num_steps", "batch_size", minimum=1)
        check_integer(self, "em_rounds", "polish_steps", minimum=0)
        check_positive(self, "tolerance", "step_size")
        check_choice(self, "groups", _SAMPLE_GROUPS)
        check_choice(self, "scaling", _SCALINGS)
        if not self.step_size < 1:
            raise ValueError(
                f"`step_size` must be < 1, in units of the inverse of the largest eigenvalue, got {self.step_size!r}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}")
        if self.start is not None and not isinstance(self.start, MAP):
            raise ValueError(f"`start` must be a MAP backend or None, got {self.start!r}")
        if isinstance(self.sites, list):
            object.__setattr__(self, "sites", tuple(self.sites))
        patterns = self.sites if isinstance(self.sites, tuple) else (self.sites,)
        if self.sites is not None and not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"`sites` must be None, or one or more site name patterns, got {self.sites!r}")
        asked = {
            "scaling": self.scaling != "declared",
            "sites": self.sites is not None,
            "learn_noise": self.learn_noise,
        }
        for name, given in asked.items():
            if given and self.em_rounds == 0:
                raise ValueError(
                    f"`{name}` is for learning the prior, but `em_rounds` is 0, which keeps the declared "
                    "one; set em_rounds=5, say"
                )

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Find the mode, then draw around it.

        Args:
            target: The tempered target.
            run: The fit in progress.

        Returns:
            The mode and the draws, which predict with the linearised network.
        """
        self._check_target(target)
        batches = Batches(target, self.batch_size, [run.stream()])
        mode = self._find_mode(target, batches, run)
        prior, exact = prior_diagonal(target, mode)
        require_curved(prior, site_of(target, int(prior.argmin())))
        if not exact:
            run.warn(ApproximationWarning, "the prior couples entries of theta: its curvature between them is left out")
        sampler = self._sampler(target, mode, batches, run)
        self._check_mode(target, sampler, prior.to(mode), run)
        if self.em_rounds == 0:
            noise_factor, learnt, precision = 1.0, (), prior.to(mode)
            z = sampler.draws(precision)
        else:
            found, learnt = self._learn(target, mode, sampler, run)
            noise_factor, precision, z = found.noise_factor, found.precision, found.z
        self._report(target, sampler, precision, run)
        posterior = LinearisedDrawsPosterior(
            target,
            mode,
            z * target.temperature**0.5,
            backend=self,
            info=run.info,
            prior_precision=precision,
            noise_factor=noise_factor,
            learnt=learnt,
        )
        self._check_spread(posterior, run)
        return posterior

    def _find_mode(self, target: Target, batches: Batches, run: Run) -> Tensor:
        start = self.start
        if batches.full:
            return find_mode(target, run, start, self.polish_steps)
        if start is not None and start.batch_size is None:
            start = replace(start, batch_size=batches.size)
        return find_mode(target, run, start, 0)

    def _check_target(self, target: Target) -> None:
        family = target.family()
        _ = family.eta_names  # a likelihood without a closed form is refused before the work, not after
        if self.learn_noise and (family.kind != "normal" or "scale" in family.varying):
            what = (
                "a latent scale, which is learnt as part of theta" if family.kind == "normal" else family.cls.__name__
            )
            raise ValueError(f"`learn_noise` needs a Normal likelihood with a known scale, got {what}; leave it False")
        if self.em_rounds and (target.temperature != 1 or target.likelihood_temperature != 1):
            raise ValueError(
                "a prior is learnt from the evidence of the untempered model; leave both temperatures at "
                "1, or set em_rounds=0"
            )

    def _sampler(self, target: Target, mode: Tensor, batches: Batches, run: Run) -> SampleThenOptimise:
        calls = self.num_steps * (1 + self.em_rounds) / 10  # conjugate gradients end early
        model = LinearModel(target, mode, self.num_samples, compile=self.compile, num_calls=calls)
        size = None if batches.full else batches.size
        options = SolverOptions(self.num_steps, self.tolerance, self.step_size, self.momentum, size)
        return SampleThenOptimise(model, self.num_samples, options, run)

    def _check_mode(self, target: Target, sampler: SampleThenOptimise, prior: Tensor, run: Run) -> None:
        # One more system with the gradient as its right-hand side: a Newton step, and its decrement.
        value, gradient = energy_of(target, run, compared=False)(sampler.model.center)
        gradient = gradient * target.temperature
        step = sampler.solve(gradient[None], torch.zeros_like(gradient)[None], prior)[0]
        decrement = float(gradient @ step) / target.temperature
        report_mode(run, float(value), gradient / target.temperature, decrement, "the draws are those around a mode")

    def _learn(
        self, target: Target, mode: Tensor, sampler: SampleThenOptimise, run: Run
    ) -> tuple[Learnt, tuple[str, ...]]:
        prior, curvature = declared_prior(target, mode, self.sites), None
        if self.scaling == "g_prior":
            run.count(num_outputs(target, mode, target.x))
            curvature = ggn_diagonal(target, mode)
        groups = group_weights(target, prior, self.groups, self.scaling, curvature)
        found = learn(sampler, groups, rounds=self.em_rounds, learn_noise=self.learn_noise, tolerance=self.tolerance)
        run.info.extra |= {
            "effective_parameters": found.effective,
            "noise_factor": found.noise_factor,
            "em_history": found.history,
        }
        return found, tuple(site.name for site in prior.sites)

    def _check_spread(self, posterior: LinearisedDrawsPosterior, run: Run) -> None:
        # Fewer than none can only be an error of the solver. It is what minibatches have for a residual, and costs no
        # pass over the data.
        determined, error = posterior.determined_parameters()
        run.info.extra["determined_parameters"] = determined
        if not determined >= -_MAX_ERRORS * error:
            run.warn(
                ConvergenceWarning,
                f"the draws spread farther than the prior allows: {determined:.4g} parameters determined by the data, "
                f"where there are none or more (Monte-Carlo error {error:.2g}): the systems were not solved, and with "
                "`em_rounds` precisions learnt from them are wrong; raise `num_steps` or `batch_size`, or lower "
                "`step_size`",
            )

    def _report(self, target: Target, sampler: SampleThenOptimise, precision: Tensor, run: Run) -> None:
        # A site's precision is one number, or the geometric mean of several.
        run.info.extra |= {
            "prior_precision": {s.name: float(precision[s.start : s.stop].log().mean().exp()) for s in target.sites},
        }
        if not sampler.full:  # a residual would cost a pass over all data, and is not taken
            return
        run.info.extra |= {"solver_steps": sampler.num_steps, "relative_residual": sampler.worst_residual}
        if sampler.worst_residual > max(_LOOSE, self.tolerance):
            run.warn(
                ConvergenceWarning,
                f"conjugate gradients ended at a relative residual of {sampler.worst_residual:.2g} after "
                f"{self.num_steps} steps, short of {self.tolerance:.2g}: directions that the data determine weakly "
                "are still those of the prior; raise `num_steps`",
            )
