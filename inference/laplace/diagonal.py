r"""Laplace with independent weights, :math:`\Sigma_{ii} = 1 / (H_{ii} + A_{ii})`: P memory, whatever the network.

Each variance is that of one weight with all others *held fixed*, so it is too small wherever weights are correlated:
on a linear-Gaussian model 1/diag(precision) instead of diag(covariance). References: MacKay (1992); Daxberger et al.
(2021).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inference import curvature as curvatures
from inference import hessians
from inference.backend import Run
from inference.distributions import DiagonalGaussian
from inference.laplace.base import Laplace, Notes, site_of
from inference.taps import num_outputs
from inference.target import Target


@dataclass(frozen=True, kw_only=True)
class DiagonalLaplace(Laplace):
    """Gaussian at the mode with the inverse of the curvature's diagonal as variances."""

    bias: ClassVar[str] = "mean exact on linear-Gaussian models; variances 1/diag(precision): too small"
    reference: ClassVar[str] = "MacKay 1992; Daxberger et al. 2021"

    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[DiagonalGaussian, Notes]:
        """Take the curvature's diagonal at a point.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian, and what had to be clipped.

        Raises:
            ValueError: If an entry of the precision is not positive.
        """
        likelihood, notes = self.kept_curvature(target, theta, run)
        likelihood = likelihood / target.likelihood_temperature
        prior = hessians.prior_precision_diagonal(target, theta)
        precision = likelihood + prior
        negative = int((precision <= 0).sum())
        if negative:
            notes = [
                *notes,
                f"{negative} entries of the precision were <= 0: the prior's negative curvature was set to 0",
            ]
            precision = likelihood + prior.clamp_min(0)
        if not bool((precision > 0).all()):
            index = int(precision.argmin())
            raise ValueError(
                f"the posterior precision H + A must be positive, got {precision[index].item():.3g} in site "
                f"{site_of(target, index)!r}: neither data nor prior bend the density there; give that site a prior "
                "with curvature (such as Normal), or leave it out with Subset"
            )
        scale = (precision / target.temperature).rsqrt().to(target.dtype)
        return DiagonalGaussian(theta, scale), notes

    def likelihood_curvature(self, target: Target, theta: Tensor, run: Run) -> tuple[Tensor, Notes]:
        """Take the diagonal of the likelihood's curvature, not tempered.

        Args:
            target: The target.
            theta: Where, shape (P,).
            run: The fit in progress.

        Returns:
            The diagonal of H, shape (P,), float64, and what had to be clipped.
        """
        with run.bar(target.num_data, f"curvature ({self.curvature})") as bar:
            if self.curvature == "ggn":
                run.count(num_outputs(target, theta, target.x))
                return curvatures.ggn_diagonal(target, theta, advance=bar.advance, slope=run.slope), []
            if self.curvature in ("fisher", "monte_carlo"):
                run.count(1)
                y = self._labels(target, theta, run)
                return curvatures.empirical_fisher_diagonal(target, theta, x=target.x, y=y, advance=bar.advance), []
            run.count(2 * target.dim)
            diagonal = hessians.hessian_diagonal(target, theta, advance=bar.advance)
        count = int((diagonal < 0).sum())
        if not count:
            return diagonal, []
        smallest = diagonal.min().item()
        note = f"the exact Hessian of the likelihood has {count} negative entries (smallest {smallest:.3g}), set to 0"
        return diagonal.clamp_min(0), [note]
