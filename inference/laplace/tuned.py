"""What choosing a prior gives back: the precisions, a posterior with them, and the model that declares them."""

from __future__ import annotations

import copy
import glob
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inference.laplace.log_evidence import LaplaceEvidence
from inference.laplace.noise import require_noise
from inference.laplace.prior_groups import declared_prior
from inference.laplace.redeclared import RedeclaredModel
from inference.posterior import GaussianPosterior
from inference.target import compile_target


@dataclass(frozen=True, eq=False)
class TunedPrior:
    """Prior precisions, and perhaps a noise scale, chosen by the evidence.

    Attributes:
        method: How they were chosen.
        log_precision: Logarithms of the groups' precisions (factors, where precisions in a group differ), (G,).
        groups: Names of the groups.
        noise_scale: Noise standard deviation in the end (a geometric mean where the declared one varies); None where
            the likelihood is not a Normal of known scale.
        log_evidence_before: With the prior and noise that the search started from, nats.
        log_evidence: With those chosen, nats.
        effective_parameters: How many parameters the data determine, by group, (G,).
        history: Log evidence after each step; with validation, the negative log likelihood per datum of each candidate.
        converged: Whether the steps ended because nothing moved any more; None where that has no meaning (a grid, or
            training).
        model: The Pyro model with the priors and noise chosen, to fit with any backend or to load ``posterior`` with.
        fitted: The posterior whose prior was chosen.
        evidence: The log evidence, as a function of the choice.
        log_noise: Logarithm of the noise scale, (), where it was chosen as well.
    """

    method: str
    log_precision: Tensor
    groups: tuple[str, ...]
    noise_scale: float | None
    log_evidence_before: float
    log_evidence: float
    effective_parameters: Tensor
    history: tuple[float, ...]
    converged: bool | None
    model: RedeclaredModel
    fitted: GaussianPosterior = field(repr=False)
    evidence: LaplaceEvidence = field(repr=False)
    log_noise: Tensor | None = None

    @cached_property
    def posterior(self) -> GaussianPosterior:
        """The Laplace posterior under them, at the same mode, in the same structure; made when first asked for."""
        made, target = copy.copy(self.fitted), self.evidence.target
        recorded = compile_target(self.model, target.x, target.y, batch_size=target.recorded_rows)
        made.target = replace(target, programs=recorded.programs)
        made.gaussian = self.evidence.gaussian(self.log_precision, self.log_noise)
        made.log_evidence_or_none = self.log_evidence
        made.curvature = self.fitted.curvature if self.log_noise is None else None  # it was that of the old noise
        scales = {name: scale for name, scale in self.scales.items() if isinstance(scale, float)}
        extra = {**self.fitted.info.extra, "prior_chosen_by": self.method, "prior_scales": scales}
        made.info = replace(self.fitted.info, extra=extra)
        return made

    @property
    def prior_precision(self) -> dict[str, Tensor]:
        """Prior precision of each tuned site: () where all of its entries share one, else of the site's shape."""
        return {name: scale.pow(-2) for name, scale in self._scales().items()}

    @property
    def scales(self) -> dict[str, float | Tensor]:
        """Prior standard deviation of each tuned site: a number where all of its entries share one.

        Numbers fit ``bnn_models.priors.Normal(scale=tuned.scales)``, which takes one per site name, for ``MLP`` and
        ``bayesianize`` (means are zero there); add a pattern for the sites that were not tuned, as in
        ``{**tuned.scales, "*": 1.0}``. Tensors, of the g-prior say, go through ``model`` or `distributions`.
        """
        return {name: float(scale) if scale.dim() == 0 else scale for name, scale in self._scales().items()}

    def distributions(self) -> dict[str, Any]:
        """Pyro distribution of each tuned site, the declared mean included: for models written by hand."""
        return {name: dist.Normal(*moments).to_event(moments[0].dim()) for name, moments in self.model.moments.items()}

    def _scales(self) -> dict[str, Tensor]:
        found = {name: scale for name, (_, scale) in self.model.moments.items()}
        return {
            name: scale.reshape(-1)[0] if torch.allclose(scale, scale.reshape(-1)[0], rtol=1e-6, atol=0.0) else scale
            for name, scale in found.items()
        }

    def __str__(self) -> str:
        lines = [
            f"log evidence {self.log_evidence_before:.2f} -> {self.log_evidence:.2f} nats by {self.method}, "
            f"{'NOT converged ' if self.converged is False else ''}after {len(self.history)} steps"
        ]
        if self.noise_scale is not None:
            lines.append(f"noise scale {self.noise_scale:.4g}")
        lines += [
            f"{name:32s} precision {math.exp(a):10.4g}   effective parameters {gamma:8.2f}"
            for name, a, gamma in zip(
                self.groups[:20], self.log_precision.tolist(), self.effective_parameters.tolist(), strict=False
            )
        ]
        return "\n".join(lines)


def tuned_prior(
    posterior: GaussianPosterior,
    evidence: LaplaceEvidence,
    log_precision: Tensor,
    log_noise: Tensor | None,
    *,
    method: str,
    before: float,
    history: list[float],
    converged: bool | None,
) -> TunedPrior:
    """Put the result together.

    Args:
        posterior: The posterior that was tuned.
        evidence: The log evidence.
        log_precision: The choice, (G,).
        log_noise: The choice, (), or None for the declared noise.
        method: How it was made.
        before: Log evidence of the declared prior.
        history: What was seen on the way.
        converged: Whether it ended by itself, where that has a meaning.

    Returns:
        The result.
    """
    log_precision = log_precision.detach()
    after = float(evidence(log_precision, log_noise))
    gamma, _ = evidence.effective_parameters(log_precision, log_noise)
    model = redeclared(evidence, log_precision, log_noise)
    scale = evidence.noise.log_scale if evidence.noise is not None else None
    if log_noise is not None:
        scale = float(log_noise)
    return TunedPrior(
        method=method,
        log_precision=log_precision,
        groups=evidence.groups.names,
        noise_scale=None if scale is None else math.exp(scale),
        log_evidence_before=before,
        log_evidence=after,
        effective_parameters=gamma,
        history=tuple(history),
        converged=converged,
        model=model,
        fitted=posterior,
        evidence=evidence,
        log_noise=log_noise,
    )


def redeclared(evidence: LaplaceEvidence, log_precision: Tensor, log_noise: Tensor | None) -> RedeclaredModel:
    """Write a choice of precisions and noise into the model.

    Args:
        evidence: Knows model, groups and declared values.
        log_precision: (G,).
        log_noise: (), or None for the declared noise.

    Returns:
        The model.
    """
    target, prior = evidence.target, evidence.groups.prior
    scales = evidence.groups.precision(log_precision.detach()).rsqrt()
    held = target.reduce(torch.arange(target.full_dim, device=scales.device))  # their places in the full theta
    mean, scale = (scales.new_zeros(target.full_dim) for _ in range(2))
    names = {site.name for site in prior.sites}
    if target.entries is not None:  # what is not held of a site keeps its declared prior
        whole = replace(target, kept=None, entries=None, at=None, sites=target.all_sites)
        rest = declared_prior(whole, target.expand(evidence.theta), [glob.escape(name) for name in names])
        mean, scale = rest.mean.clone(), rest.precision.rsqrt()
    mean[held], scale[held] = prior.mean, scales
    moments = {}
    for site in target.all_sites:
        if site.name in names:
            pair = (values[site.start : site.stop].reshape(site.shape).to(target.dtype) for values in (mean, scale))
            moments[site.name] = tuple(pair)
    factor = 1.0
    if log_noise is not None:
        factor = math.exp(float(log_noise) - require_noise(evidence.noise, target).log_scale)
    inner = target.model
    if isinstance(inner, RedeclaredModel):  # tuned before: one wrapper is enough
        moments, factor = {**inner.moments, **moments}, inner.noise_factor * factor
        inner = inner.model
    return RedeclaredModel(inner, moments, target.observed, factor)
