r"""The log evidence of a Laplace approximation as a function of prior precisions and noise, differentiable.

With the mode :math:`\theta^*` and the curvature H of the negative log likelihood held fixed,

.. math:: \log p(D \mid A, s) \approx \log p(D \mid \theta^*, s) + \log N(\theta^* \mid m, A^{-1})
          + \tfrac{P}{2} \log 2\pi - \tfrac12 \log\det\big(\tfrac{s_0^2}{s^2} H + A\big),

s the scale of a Normal likelihood, declared as :math:`s_0`. Its gradient knows the effective number of parameters
:math:`\gamma = \mathrm{tr}(\Sigma H)`: :math:`\partial \log\det / \partial \log a_g = P_g - \gamma_g`.
References: MacKay (1992); Immer et al. (2021b) [recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inference.backend import Run
from inference.distributions import FlatGaussian, SpectralGaussian
from inference.laplace.base import Laplace
from inference.laplace.block_curvature import BlockCurvature
from inference.laplace.dense import DenseLaplace
from inference.laplace.diagonal import DiagonalLaplace
from inference.laplace.fixed_curvature import DenseCurvature, DiagonalCurvature, FixedCurvature, LowRankCurvature
from inference.laplace.kronecker import KroneckerLaplace
from inference.laplace.low_rank import LowRankLaplace
from inference.laplace.noise import Noise, normal_noise, require_noise
from inference.laplace.prior_groups import (
    Groups,
    PriorGroups,
    Scaling,
    declared_prior,
    group_weights,
)
from inference.point import Subset
from inference.posterior import GaussianPosterior
from inference.target import Target


@dataclass(frozen=True, eq=False)
class LaplaceEvidence:
    """Log evidence with mode and curvature held fixed; call it with logarithms of precisions and noise scale.

    Attributes:
        target: The model.
        theta: The mode, (P,).
        groups: Which weights share a precision; ``groups.names`` are the groups, ``groups.start`` the declared values.
        curvature: The likelihood's curvature, decomposed for these groups.
        log_density: Log joint density at the mode under the declared prior and noise, nats.
        distances: Squared distances of theta from its prior mean, (P,), float64.
        noise: What is needed to change the noise; None where the likelihood is not a Normal of known scale.
    """

    target: Target
    theta: Tensor
    groups: PriorGroups
    curvature: FixedCurvature
    log_density: float
    distances: Tensor
    noise: Noise | None

    def __call__(self, log_precision: Tensor | None = None, log_noise: Tensor | None = None) -> Tensor:
        """Log evidence.

        Args:
            log_precision: Logarithm of each group's prior precision (its factor, where precisions within the group
                differ), (G,); the declared ones when None.
            log_noise: Logarithm of the noise scale, (); the declared one when None.

        Returns:
            () nats, float64, differentiable in both.
        """
        a, tau = self._arguments(log_precision, log_noise)
        counts, relative, declared = self._sums
        change = 0.5 * (counts * (a - self.groups.start) - relative * a.exp() + declared).sum()
        if self.noise is not None:
            change = change + 0.5 * self.noise.squares * (1 - tau) + 0.5 * self.noise.count * tau.log()
        volume = 0.5 * len(self.theta) * math.log(2 * math.pi) - 0.5 * self.curvature.log_determinant(a, tau)
        return self.log_density + change + volume

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """By group, entries of theta and their squared distances over relative and over declared variances, (G,)."""
        groups, distances = self.groups, self.distances
        ones = torch.ones_like(groups.base)
        return (
            groups.total(ones),
            groups.total(groups.base * distances),
            groups.total(groups.prior.precision * distances),
        )

    def effective_parameters(self, log_precision: Tensor, log_noise: Tensor | None = None) -> tuple[Tensor, float]:
        r"""How many parameters the data determine, :math:`\gamma = \mathrm{tr}((\tau H + A)^{-1} \tau H)`.

        Args:
            log_precision: As for the evidence, (G,).
            log_noise: As for the evidence, ().

        Returns:
            Of each group, (G,), and of all of theta.
        """
        a, tau = (value.detach().requires_grad_() for value in self._arguments(log_precision, log_noise))
        with torch.enable_grad():
            by_group, by_noise = torch.autograd.grad(self.curvature.log_determinant(a, tau), (a, tau))
        return self._sums[0] - by_group, float(by_noise * tau.detach())

    def gaussian(self, log_precision: Tensor, log_noise: Tensor | None = None) -> FlatGaussian:
        """The Laplace approximation with these precisions and noise, in the structure of its backend.

        Args:
            log_precision: As for the evidence, (G,).
            log_noise: As for the evidence, ().

        Returns:
            The Gaussian, centred at the mode.
        """
        a, tau = self._arguments(log_precision, log_noise)
        precision = self.groups.precision(a.detach())
        return self.curvature.gaussian(self.target, self.theta, precision, float(tau))

    def _arguments(self, log_precision: Tensor | None, log_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        start = self.groups.start
        a = start if log_precision is None else log_precision
        if a.shape != start.shape:
            raise ValueError(
                f"`log_precision` must have one entry for each of the {len(start)} groups, got shape {tuple(a.shape)}"
            )
        if log_noise is None:
            return a, start.new_ones(())
        return a, (2 * (require_noise(self.noise, self.target).log_scale - log_noise)).exp()


def laplace_evidence(
    posterior: GaussianPosterior,
    *,
    groups: Groups = "site",
    scaling: Scaling = "declared",
    sites: str | Sequence[str] | None = None,
    seed: int = 0,
) -> LaplaceEvidence:
    """Prepare the log evidence of a fitted Laplace posterior as a function of its prior precisions and noise.

    The curvature is taken once more at the mode, in float64, and decomposed.

    Args:
        posterior: Fitted by `DenseLaplace`, `DiagonalLaplace`, `KroneckerLaplace` or `LowRankLaplace`, also within
            `Subset`.
        groups: Weights that share a precision: "all", "site" (those of one Pyro site) or "weight" (none).
        scaling: Precisions within a group are proportional to the declared ones, or ("g_prior") to the diagonal of the
            curvature, which makes error bars independent of the units that each weight is written in.
        sites: Name pattern(s) of the sites that take part; the others keep their priors. None for all.
        seed: Of the labels drawn for ``curvature="monte_carlo"``.

    Returns:
        The function; at its default arguments it is ``posterior.log_evidence`` (with the g-prior, that of the g-prior
        of the same geometric mean precision).

    Raises:
        ValueError: If the posterior is no Laplace approximation at temperature 1, or a prior is not Gaussian.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from inference import DenseLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 2.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)
        >>> posterior = DenseLaplace().fit(model, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        >>> evidence = laplace_evidence(posterior)
        >>> abs(float(evidence()) - posterior.log_evidence) < 1e-4
        True
    """
    backend, target = laplace_backend(posterior), posterior.target
    run = Run(backend, target, seed)
    theta = posterior.mean_theta
    if isinstance(backend, LowRankLaplace) and isinstance(posterior.gaussian, SpectralGaussian):
        precision = posterior.gaussian.scale.double().pow(-2)
        curvature: FixedCurvature = LowRankCurvature(target, theta, posterior.gaussian, precision)
    else:
        curvature = fixed_curvature(backend, target, theta, run, posterior.curvature)
    diagonal = curvature.diagonal() if scaling == "g_prior" else None
    found = group_weights(target, declared_prior(target, theta, sites), groups, scaling, diagonal)
    log_density = posterior.log_evidence + float(posterior.gaussian.log_prob(theta))
    return evidence_at(target, theta, curvature, found, log_density)


def evidence_at(
    target: Target, theta: Tensor, curvature: FixedCurvature, groups: PriorGroups, log_density: float
) -> LaplaceEvidence:
    """Put the evidence together from its parts.

    Args:
        target: The model.
        theta: The mode, (P,).
        curvature: The likelihood's curvature there; it is decomposed for the groups.
        groups: Which weights share a precision.
        log_density: Log joint density at the mode, nats.

    Returns:
        The function.
    """
    curvature.prepare(groups)
    distances = (theta.double() - groups.prior.mean).square()
    return LaplaceEvidence(target, theta, groups, curvature, log_density, distances, normal_noise(target, theta))


def laplace_backend(posterior: Any) -> Laplace:
    """The Laplace backend behind a posterior.

    Args:
        posterior: The posterior.

    Returns:
        The backend; the inner one of `Subset`.

    Raises:
        ValueError: If there is none, or the posterior is tempered or was loaded from a file.
    """
    backend = getattr(posterior, "backend", None)
    backend = backend.backend if isinstance(backend, Subset) else backend
    if not isinstance(backend, Laplace) or not isinstance(posterior, GaussianPosterior):
        raise ValueError(
            "priors are chosen by the evidence of a posterior fitted by DenseLaplace, DiagonalLaplace, "
            f"KroneckerLaplace or LowRankLaplace in this session, got {posterior!r}; a saved one is refitted at its "
            "mode by KroneckerLaplace(start=None).fit(model, x, y, init=posterior), say"
        )
    if posterior.target.temperature != 1 or posterior.target.likelihood_temperature != 1:
        raise ValueError("a tempered posterior has no evidence; fit with `temperature` and `likelihood_temperature` 1")
    return backend


def fixed_curvature(backend: Any, target: Target, theta: Tensor, run: Run, held: Any = None) -> FixedCurvature:
    """Take the curvature at a point in the structure of a backend.

    Args:
        backend: A Laplace backend.
        target: The model.
        theta: Where, (P,).
        run: Counts the gradients.
        held: What the backend's ``likelihood_curvature`` gave there, where it was kept.

    Returns:
        The curvature.

    Raises:
        ValueError: If the backend has no such curvature.
    """
    if isinstance(backend, (DenseLaplace, DiagonalLaplace)):
        matrix, _ = backend.likelihood_curvature(target, theta, run) if held is None else held
        return DenseCurvature(matrix) if isinstance(backend, DenseLaplace) else DiagonalCurvature(matrix)
    if isinstance(backend, KroneckerLaplace) and not backend.damping:
        return BlockCurvature(backend, backend.likelihood_curvature(target, theta, run) if held is None else held)
    if isinstance(backend, LowRankLaplace):
        gaussian, _ = backend.approximate(target, theta, run)
        return LowRankCurvature(target, theta, gaussian, gaussian.scale.double().pow(-2))
    raise ValueError(
        "priors are chosen by the evidence of DenseLaplace, DiagonalLaplace, KroneckerLaplace (without damping) and "
        f"LowRankLaplace, got {backend!r}"
    )
