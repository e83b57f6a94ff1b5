r"""Gaussians whose covariance is a diagonal, corrected along a few directions.

.. math:: \Sigma = \mathrm{diag}(s)\,\big(I + U(\Lambda - I)U^\top\big)\,\mathrm{diag}(s), \qquad U^\top U = I_R

Unlike a diagonal plus a low-rank term this may also shrink a direction. It is the form of L-BFGS inverse Hessians and
of low-rank mass matrices; everything costs O(P R). Source: zhang2022pathfinder, appendix; seyboldt2026preconditioning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.flat_gaussian import LOG_2PI, FlatGaussian, noise, require_finite, require_positive, require_shape


@dataclass(frozen=True, eq=False)
class SpectralGaussian(FlatGaussian):
    r"""A Gaussian with a scaled low-rank-corrected covariance.

    Attributes:
        loc: Mean, shape (P,).
        scale: s > 0, shape (P,).
        basis: Orthonormal columns U, shape (P, R); R may be 0.
        eigenvalues: :math:`\Lambda` > 0 along the columns, shape (R,).
    """

    scale: Tensor
    basis: Tensor
    eigenvalues: Tensor

    def __post_init__(self) -> None:
        """Check shapes, positivity and that the basis is orthonormal.

        Raises:
            ValueError: If the basis has another shape than (P, R), or its columns are not orthonormal.
        """
        super().__post_init__()
        require_shape("scale", self.scale, self.loc.shape, "P")
        require_positive("scale", self.scale)
        if self.basis.dim() != 2 or self.basis.shape[0] != self.dim:
            raise ValueError(f"basis must have shape ({self.dim}, R), got {tuple(self.basis.shape)}")
        require_finite("basis", self.basis)
        require_shape("eigenvalues", self.eigenvalues, self.basis.shape[1:], "R")
        if self.eigenvalues.numel():
            require_positive("eigenvalues", self.eigenvalues)
            identity = torch.eye(self.basis.shape[1], dtype=self.basis.dtype, device=self.basis.device)
            error = float((self.basis.mT @ self.basis - identity).abs().max())
            if error > 1e5 * torch.finfo(self.basis.dtype).eps:
                raise ValueError(f"basis must have orthonormal columns, got products off by {error:.2g}")

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        white = noise(self.loc, num_samples, self.dim, generator)
        return self.loc + self.scale * self._apply(white, self.eigenvalues.sqrt())

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        z = (theta - self.loc) / self.scale
        inside = z @ self.basis  # (..., R)
        distance = z.square().sum(-1) - (inside.square() * (1 - 1 / self.eigenvalues)).sum(-1)
        half_logdet = self.scale.log().sum() + 0.5 * self.eigenvalues.log().sum()
        return -0.5 * (distance + self.dim * LOG_2PI) - half_logdet

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return self.scale.square() * (1 + self.basis.square() @ (self.eigenvalues - 1))

    def covariance(self) -> Tensor:  # noqa: D102
        return self.quadratic(torch.eye(self.dim, dtype=self.loc.dtype, device=self.loc.device))

    def quadratic(self, jacobian: Tensor) -> Tensor:  # noqa: D102
        scaled = jacobian * self.scale  # (..., K, P)
        inside = scaled @ self.basis
        return scaled @ scaled.mT + (inside * (self.eigenvalues - 1)) @ inside.mT

    def covariance_times(self, vector: Tensor) -> Tensor:  # noqa: D102
        return self.scale * self._apply(self.scale * vector, self.eigenvalues)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"loc": self.loc, "scale": self.scale, "basis": self.basis, "eigenvalues": self.eigenvalues}

    def _apply(self, vector: Tensor, eigenvalues: Tensor) -> Tensor:
        """(I + U (diag(eigenvalues) - I) U^T) times vectors (..., P)."""
        return vector + ((vector @ self.basis) * (eigenvalues - 1)) @ self.basis.mT


def from_factor(loc: Tensor, diagonal: Tensor, factor: Tensor) -> SpectralGaussian:
    r"""The same Gaussian as one with covariance :math:`\mathrm{diag}(d) + F F^\top`.

    Args:
        loc: Mean, shape (P,).
        diagonal: d > 0, shape (P,).
        factor: F, shape (P, R).

    Returns:
        The Gaussian, of rank min(P, R).
    """
    scale = diagonal.sqrt()
    basis, singular, _ = torch.linalg.svd(factor / scale[:, None], full_matrices=False)
    return SpectralGaussian(loc, scale, basis.contiguous(), 1 + singular.square())
