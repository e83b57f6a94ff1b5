r"""Laplace with the full covariance: exact on linear-Gaussian models, P^2 memory and P^3 time.

The precision :math:`\Lambda = H + A` is factorised once, :math:`\Lambda = L L^\top`; a draw is
:math:`\theta^* + L^{-\top} \epsilon`. After L-BFGS the mode is moved by Newton steps
:math:`\Lambda^{-1} \nabla \log p`, each with its curvature taken anew, until the Newton decrement is at rounding error.
References: MacKay (1992); Daxberger et al. (2021).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inference import curvature as curvatures
from inference import hessians
from inference.backend import Run
from inference.distributions import DenseGaussian
from inference.laplace.base import NewtonLaplace, Notes, site_of
from inference.laplace.memory import require_structure
from inference.taps import num_outputs
from inference.target import Target


@dataclass(frozen=True, kw_only=True)
class DenseLaplace(NewtonLaplace):
    """Gaussian at the mode with the full inverse curvature as covariance."""

    bias: ClassVar[str] = "exact on linear-Gaussian models; elsewhere one mode, with its curvature as its only width"
    reference: ClassVar[str] = "MacKay 1992; Daxberger et al. 2021"

    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[DenseGaussian, Notes]:
        """Take the dense curvature at a point.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian, and what had to be clipped.

        Raises:
            ValueError: If the precision is not positive definite.
        """
        likelihood, notes = self.kept_curvature(target, theta, run)
        likelihood = likelihood / target.likelihood_temperature
        prior = hessians.prior_precision(target, theta)
        factor, failed = torch.linalg.cholesky_ex(_plus(likelihood, prior))
        if failed and _has_negative_curvature(prior):
            prior, count, smallest = _clip(prior)
            notes = [
                *notes,
                f"the prior's curvature has {count} negative eigenvalues (smallest {smallest:.3g}), set to 0; "
                "Laplace is rough here: sample the scales of hierarchical priors with NUTS, or fix them with Subset",
            ]
            factor, failed = torch.linalg.cholesky_ex(_plus(likelihood, prior))
        if failed:
            raise ValueError(_not_positive_definite(target, _plus(likelihood, prior)))
        factor = (factor / target.temperature**0.5).to(target.dtype)
        return DenseGaussian(theta, precision_tril=factor), notes

    def _check_target(self, target: Target) -> None:
        super()._check_target(target)
        require_structure(target, "DenseLaplace")

    def likelihood_curvature(self, target: Target, theta: Tensor, run: Run) -> tuple[Tensor, Notes]:
        """Take the curvature of the likelihood alone, not tempered.

        Args:
            target: The target.
            theta: Where, shape (P,).
            run: The fit in progress.

        Returns:
            H, shape (P, P), float64, and what had to be clipped.
        """
        with run.bar(target.num_data, f"curvature ({self.curvature})") as bar:
            if self.curvature == "ggn":
                run.count(num_outputs(target, theta, target.x))
                return curvatures.ggn(target, theta, advance=bar.advance, slope=run.slope), []
            if self.curvature in ("fisher", "monte_carlo"):
                run.count(1)
                y = self._labels(target, theta, run)
                return curvatures.empirical_fisher(target, theta, x=target.x, y=y, advance=bar.advance), []
            run.count(2 * target.dim)
            matrix = hessians.hessian(target, theta, advance=bar.advance)
        matrix, count, smallest = _clip(matrix)
        if not count:
            return matrix, []
        note = (
            f"the exact Hessian of the likelihood has {count} negative eigenvalues (smallest {smallest:.3g}), set to 0"
        )
        return matrix, [note]


def _plus(likelihood: Tensor, prior: Tensor) -> Tensor:
    return likelihood + (prior.diag() if prior.dim() == 1 else prior)


def _has_negative_curvature(prior: Tensor) -> bool:
    return bool((prior < 0).any()) if prior.dim() == 1 else True


def _clip(matrix: Tensor) -> tuple[Tensor, int, float]:
    # Negative eigenvalues set to 0: the matrix, how many there were and the smallest. Rounding errors do not count.
    if matrix.dim() == 1:
        return matrix.clamp_min(0), int((matrix < 0).sum()), matrix.min().item()
    tolerance = 1e-10 * matrix.diagonal().abs().max()
    _, indefinite = torch.linalg.cholesky_ex(matrix + tolerance * torch.eye(len(matrix)).to(matrix))
    if not indefinite:
        return matrix, 0, 0.0
    values, vectors = torch.linalg.eigh(matrix)
    clipped = (vectors * values.clamp_min(0)) @ vectors.mT
    return 0.5 * (clipped + clipped.mT), int((values < -tolerance).sum()), values[0].item()


def _not_positive_definite(target: Target, precision: Tensor) -> str:
    if not bool(precision.isfinite().all()):
        return "the curvature at the mode is not finite; give another `init`, or a smaller step_size to `start`"
    values, vectors = torch.linalg.eigh(precision)
    site = site_of(target, int(vectors[:, 0].abs().argmax()))
    return (
        f"the posterior precision H + A must be positive definite, got a smallest eigenvalue of {values[0].item():.3g} "
        f"mostly along site {site!r}: neither data nor prior bend the density there; give that site a prior with "
        "curvature (such as Normal), or leave it out with Subset"
    )
