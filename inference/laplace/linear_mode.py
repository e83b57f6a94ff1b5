r"""Priors chosen by the evidence of the linearised network at its own mode.

A trained network is rarely at a mode of its log density, and where layers are normalised there need not be one:
:math:`f(k w) = f(w)` leaves the norm of a weight to chance, and with it the prior precision that the evidence at w*
asks for. The linear model :math:`f_{lin}(w) = f(w^*) + J(w - w^*)` has one mode for every precision A. Alternating

1. :math:`\hat w = \arg\max_w \log p(y \mid f_{lin}(w)) - \tfrac12 (w - m)^\top A (w - m)`,
2. :math:`A = \arg\max_A \log p(y \mid f_{lin}(\hat w)) - \tfrac12 \big[(\hat w - m)^\top A (\hat w - m)
   + \log\det(H + A) - \log\det A\big]`, :math:`\hat w` following A, with H the curvature at the last
   :math:`f_{lin}(\hat w)`,

it makes predictions the same whatever the scale of normalised weights, as long as each of them has a precision of its
own (``groups="site"``, or the g-prior). The network is still linearised, and predicts, at w*. Exact for linear models.
What it gets wrong: a last linear layer alone fits :math:`f(w^*)`, so that the precisions of earlier layers may go to
infinity, and their error bars to nothing; a warning says so.
Reference: Antoran et al., ICML 2022 [recalled from the paper, not re-read]; that the mode follows within a round, and
the solver, are [our reconstruction].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from inference.backend import Run
from inference.data import Tree
from inference.distributions import FlatGaussian
from inference.errors import ConvergenceWarning
from inference.laplace.log_evidence import LaplaceEvidence, fixed_curvature, laplace_backend, laplace_evidence
from inference.laplace.noise import require_noise
from inference.laplace.prior_groups import Groups, Scaling
from inference.laplace.solvers import conjugate_gradients
from inference.laplace.tuned import TunedPrior, tuned_prior
from inference.laplace.tuning import maximise, warn_of_ends
from inference.linear_model import LinearModel
from inference.observation import LikelihoodFamily
from inference.posterior import GaussianPosterior
from inference.target import Target

_INNER_STEPS = 200
_MOVED, _GAINED = 1e-7, 1e-9
_ROUNDING = 1e-9  # of a Newton decrement, in nats
_MAX_NEWTON, _MAX_CG, _SMALLEST_STEP = 50, 1000, 1e-9
# Of the dtype's rounding: a relative residual of 1e-10 in float64, in the preconditioner's norm.
_CG_POWER = 0.64


def tune_at_linear_mode(
    posterior: GaussianPosterior,
    *,
    groups: Groups = "site",
    scaling: Scaling = "declared",
    noise: bool = False,
    max_rounds: int = 200,
    seed: int = 0,
) -> TunedPrior:
    """Choose prior precisions by the evidence of the linear model at its own mode.

    With a Normal likelihood of known scale one round is enough; with any other the curvature follows from round to
    round.

    Args:
        posterior: Fitted by `DenseLaplace`, `DiagonalLaplace`, `KroneckerLaplace` or `LowRankLaplace`; all of its sites
            need Gaussian priors (fix others with `Subset`).
        groups: As in `tune_prior`.
        scaling: As in `tune_prior`.
        noise: Choose the scale of a Normal likelihood as well.
        max_rounds: Most rounds of finding the linear mode and then the precisions.
        seed: Of what is drawn.

    Returns:
        As `tune_prior`; ``history`` holds the evidence after each round, and ``log_evidence_before`` is the linear
        model's with the prior that the search started from. ``posterior.info.extra`` gains the distance of the linear
        mode from w*.

    Raises:
        ValueError: If an option does not fit the posterior.
    """
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"`max_rounds` must be an integer >= 1, got {max_rounds!r}")
    backend, target = laplace_backend(posterior), posterior.target
    if backend.curvature != "ggn":
        raise ValueError(f'the linear model has the curvature "ggn", but the posterior has {backend.curvature!r}')
    at_mode = laplace_evidence(posterior, groups=groups, scaling=scaling, seed=seed)
    evidence = _LinearModeEvidence.of(at_mode)
    log_noise = None
    if noise:
        log_noise = at_mode.groups.start.new_tensor(require_noise(at_mode.noise, target).log_scale)
    a, history, converged = at_mode.groups.start, [], False
    run = Run(backend, target, seed)
    evidence = evidence.with_curvature(backend, run, a, log_noise)
    before = float(evidence(a, log_noise))
    for _ in range(max_rounds):
        moved, log_noise, _, _ = maximise(evidence, a, log_noise, noise=noise, max_steps=_INNER_STEPS)
        change = float((moved - a).abs().max())
        a, previous = moved, evidence
        evidence = evidence.with_curvature(backend, run, a, log_noise)
        history.append(float(evidence(a, log_noise)))
        gain = history[-1] - (history[-2] if len(history) > 1 else before)
        if evidence is previous or change < _MOVED or abs(gain) < _GAINED:
            converged = True
            break
    if not converged:
        warnings.warn(
            f"the prior precisions still move after {max_rounds} rounds of linear mode and evidence; raise "
            "`max_rounds`",
            ConvergenceWarning,
            stacklevel=2,
        )
    warn_of_ends(evidence, a)
    tuned = tuned_prior(
        posterior,
        evidence.at(a, log_noise),
        a,
        log_noise,
        method="linear mode",
        before=before,
        history=history,
        converged=converged,
    )
    tuned.posterior.info.extra["linear_mode_distance"] = float((evidence.state.mode - posterior.mean_theta).norm())
    return tuned


@dataclass
class _State:
    """Where the last mode was: the next search starts there."""

    model: LinearModel
    mode: Tensor


@dataclass(frozen=True, eq=False)
class _LinearModeEvidence(LaplaceEvidence):
    """Evidence whose mode moves with the precisions, with the curvature held fixed.

    The derivative at the mode held fixed is the derivative along the mode as well: there the density does not change to
    first order.
    """

    state: _State = field(kw_only=True)

    @classmethod
    def of(cls, at_mode: LaplaceEvidence) -> _LinearModeEvidence:
        """Around the point that an evidence was taken at."""
        state = _State(LinearModel(at_mode.target, at_mode.theta, 1), at_mode.theta)
        return cls(**{f.name: getattr(at_mode, f.name) for f in fields(LaplaceEvidence)}, state=state)

    def __call__(self, log_precision: Tensor | None = None, log_noise: Tensor | None = None) -> Tensor:
        """Log evidence at the linear model's mode, as that of `LaplaceEvidence`."""
        a = self.groups.start if log_precision is None else log_precision
        return self.at(a, log_noise)(a, log_noise)

    def at(self, log_precision: Tensor, log_noise: Tensor | None) -> LaplaceEvidence:
        """Evidence at the mode of given precisions (G,) and noise (), held fixed there."""
        model, prior = self.state.model, self.groups.prior
        a, tau = (value.detach() for value in self._arguments(log_precision, log_noise))
        precision, mean = (v.to(self.theta.dtype) for v in (self.groups.precision(a), prior.mean))
        gaussian: FlatGaussian = self.curvature.gaussian(self.target, self.theta, precision.double(), float(tau))
        mode, eta = linear_mode(model, mean, precision, self.state.mode, gaussian.covariance_times, float(tau))
        self.state.mode = mode
        noise = self.noise
        if noise is not None:
            params = model.params_at(eta)
            squares = ((self.target.y - params["loc"]) / params["scale"]).double().square().sum()
            noise = replace(noise, squares=float(squares))
        declared = torch.distributions.Normal(prior.mean, prior.precision.rsqrt()).log_prob(mode.double()).sum()
        return LaplaceEvidence(
            target=self.target,
            theta=self.theta,
            groups=self.groups,
            curvature=self.curvature,
            log_density=model.log_likelihood(eta) + float(declared),
            distances=(mode.double() - prior.mean).square(),
            noise=noise,
        )

    def with_curvature(
        self, backend: Any, run: Run, log_precision: Tensor, log_noise: Tensor | None
    ) -> _LinearModeEvidence:
        """The same with the curvature at the linear mode; itself where the likelihood's is the same everywhere."""
        if self.noise is not None:
            return self
        self.at(log_precision, log_noise)
        moved = _AtLinearMode.of(self.target, self.theta, self.state.mode)
        curvature = fixed_curvature(backend, moved, self.theta, run)
        curvature.prepare(self.groups)
        return replace(self, curvature=curvature)


def linear_mode(
    model: LinearModel,
    mean: Tensor,
    precision: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tau: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Mode of a linear model under a Gaussian prior, by Newton steps with backtracking.

    Each step solves :math:`(\tau J^\top F J + A) d = r` by conjugate gradients; along it the function values are
    linear, so that trials cost no pass over the data.

    Args:
        model: The linear model.
        mean: Prior mean m, (P,).
        precision: Prior precision A, (P,).
        start: Where to start, (P,).
        precondition: Product with about the inverse of the system's matrix, (P,) to (P,).
        tau: Factor of the log likelihood.

    Returns:
        The mode, (P,), and the likelihood's parameters there, (N, E).
    """
    theta, eta = start, model.eta + model.push((start - model.center)[None])[0]
    for _ in range(_MAX_NEWTON):
        value = _height(model, theta, eta, mean, precision, tau)
        gradient = tau * model.score(eta) - precision * (theta - mean)
        params = model.params_at(eta)
        # The preconditioner is a matrix of its own: near the solution from the first step.
        step = conjugate_gradients(
            lambda v, at=params: tau * model.gram(v, at) + precision * v,
            gradient[None],
            lambda v: precondition(v[0])[None],
            max_steps=_MAX_CG,
            tolerance=torch.finfo(theta.dtype).eps ** _CG_POWER,
        ).z[0]
        moved, scale = model.push(step[None])[0], 1.0
        if float(gradient @ step) <= max(_ROUNDING, torch.finfo(theta.dtype).eps * abs(value)):
            return theta + step, eta + moved  # the gain cannot be told from rounding, but the step can be taken
        while _height(model, theta + scale * step, eta + scale * moved, mean, precision, tau) <= value:
            scale /= 2
            if scale < _SMALLEST_STEP:
                return theta, eta
        theta, eta = theta + scale * step, eta + scale * moved
    return theta, eta


def _height(model: LinearModel, theta: Tensor, eta: Tensor, mean: Tensor, precision: Tensor, tau: float) -> float:
    prior = 0.5 * float((precision.double() * (theta - mean).double().square()).sum())
    return tau * model.log_likelihood(eta) - prior


@dataclass(frozen=True)
class _AtLinearMode(Target):
    """The network at w* whose likelihood is looked at where the linear model's mode puts its outputs."""

    plain: Target | None = None
    points: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, target: Target, theta: Tensor, mode: Tensor) -> _AtLinearMode:
        """Around w* (P,), for a linear mode (P,)."""
        fields = {name: getattr(target, name) for name in target.__dataclass_fields__}
        return cls(**fields, plain=target, points=(theta, mode - theta))

    def eta(self, theta: Tensor, x: Tree | None = None) -> Tensor:
        """As the network's."""
        assert self.plain is not None
        return self.plain.eta(theta, x)

    def family(self, x: Tree | None = None) -> LikelihoodFamily:
        """The likelihood, its Fisher information at linearised outputs."""
        assert self.plain is not None
        x = self.x if x is None else x
        return self.fisher_family(self.plain.family(x), x)

    def fisher_family(self, family: LikelihoodFamily, x: Tree) -> LikelihoodFamily:
        """That of the network, its Fisher information at linearised outputs."""
        assert self.plain is not None
        assert self.points is not None
        plain, (theta, step) = self.plain, self.points
        eta, pushed = plain.eta(theta, x), jvp(lambda t: plain.eta(t, x), (theta,), (step,))[1]
        fields: dict[str, Any] = {name: getattr(family, name) for name in family.__dataclass_fields__}
        return _MovedFamily(**fields, moved=(eta + pushed).detach())


@dataclass(frozen=True)
class _MovedFamily(LikelihoodFamily):
    """A likelihood whose Fisher information is taken at given eta, whatever the parameters."""

    moved: Tensor | None = None

    def fisher(self, params: dict[str, Tensor]) -> Tensor:
        """(B, E, E) at ``moved``."""
        return super().fisher(self._moved(params))

    def fisher_root(self, params: dict[str, Tensor]) -> Tensor:
        """(B, E, C) at ``moved``."""
        return super().fisher_root(self._moved(params))

    def _moved(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.moved is not None
        return self.from_eta(self.moved, params)
