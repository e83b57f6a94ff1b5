"""Which mass matrix chains begin with: unit masses, the prior's variances, or the covariance of another posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.distributions import DiagonalGaussian, LowRankGaussian
from inference.flat_gaussian import FlatGaussian
from inference.mcmc.metrics import MassMatrix, Metric
from inference.posterior import GaussianPosterior
from inference.spectral_gaussian import SpectralGaussian, from_factor
from inference.target import Target

_PRIOR_DRAWS = 200
_PRIOR_NUMBERS = 20_000_000


def initial_metric(mass_matrix: MassMatrix | GaussianPosterior, target: Target, like: Tensor, rank: int) -> Metric:
    """The metric of every chain at its start.

    Args:
        mass_matrix: A name, or a posterior whose covariance becomes the inverse mass.
        target: The target.
        like: A theta, (P,).
        rank: Directions of "low_rank".

    Returns:
        The metric.

    Raises:
        ValueError: If the posterior belongs to another model or other sites of it.
    """
    if isinstance(mass_matrix, GaussianPosterior):
        mass_matrix.starting_points(1, 0, [(s.name, s.shape) for s in target.all_sites])
        own, free = ([s.name for s in t.sites] for t in (mass_matrix.target, target))
        if own != free or mass_matrix.target.kept != target.kept:
            other = "" if own != free else ", other entries of them"
            raise ValueError(f"`mass_matrix` is a posterior of the sites {own}, but the chains move {free}{other}")
        return metric_of(mass_matrix.gaussian, like)
    if mass_matrix == "prior":
        return Metric.fixed("diagonal", prior_variances(target).to(like))
    return Metric.identity(mass_matrix, like, rank)


def metric_of(gaussian: FlatGaussian, like: Tensor) -> Metric:
    """A fixed metric whose inverse mass is the covariance of a Gaussian, in the Gaussian's own structure.

    Args:
        gaussian: Over theta.
        like: A theta, (P,), for dtype and device.

    Returns:
        Diagonal, low-rank or dense; dense for a structure that has no faster velocity here.
    """
    if isinstance(gaussian, DiagonalGaussian):
        return Metric.fixed("diagonal", gaussian.variance.to(like))
    if isinstance(gaussian, LowRankGaussian):
        gaussian = from_factor(gaussian.loc, gaussian.cov_diag, gaussian.cov_factor)
    if isinstance(gaussian, SpectralGaussian) and 2 * gaussian.basis.shape[1] + 1 < gaussian.dim:
        scaled = gaussian.scale[:, None] * gaussian.basis
        rows = [gaussian.scale.square()[None], (scaled * (gaussian.eigenvalues - 1)).mT, scaled.mT]
        return Metric.fixed("low_rank", torch.cat(rows).to(like))
    return Metric.fixed("dense", gaussian.covariance().to(like))


def prior_variances(target: Target) -> Tensor:
    """Prior variances in unconstrained space, from draws.

    Entries of one site whose estimates agree up to their Monte-Carlo error share one. The variance of a heavy-tailed
    prior is cut at ten times that of a Gaussian with the same quartiles.

    Args:
        target: The target.

    Returns:
        (P,).
    """
    num = max(16, min(_PRIOR_DRAWS, _PRIOR_NUMBERS // target.dim))
    draws = target.sample_prior(num).double()
    quartiles = torch.quantile(draws, torch.tensor([0.25, 0.75], dtype=draws.dtype, device=draws.device), dim=0)
    robust = ((quartiles[1] - quartiles[0]) / 1.349).square()
    variances = torch.minimum(draws.var(0), 10 * robust)
    for site in target.sites:
        own = variances[site.start : site.stop]
        if site.size > 1 and float(own.std() / own.mean()) < 2 * (2 / (num - 1)) ** 0.5:
            own.fill_(own.mean())
    return variances
