r"""Gaussians over the flat parameter vector: diagonal, low rank plus diagonal, Kronecker and dense.

Every Gaussian posterior of this package is one of these. They differ in how the covariance :math:`\Sigma` is held,
and each does sampling, densities and :math:`J \Sigma J^\top` from what it holds: a dense P x P matrix is only formed
by `covariance()`, which is there to look at, and by `DenseGaussian`, which is one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from inference.flat_gaussian import (
    LOG_2PI,
    FlatGaussian,
    noise,
    require_finite,
    require_positive,
    require_shape,
    solve_rows,
)
from inference.kronecker_gaussian import KroneckerGaussian
from inference.output_gaussians import OutputGaussians
from inference.spectral_gaussian import SpectralGaussian

__all__ = [
    "GAUSSIANS",
    "DenseGaussian",
    "DiagonalGaussian",
    "FlatGaussian",
    "KroneckerGaussian",
    "LowRankGaussian",
    "OutputGaussians",
    "SpectralGaussian",
    "gaussian_from_tensors",
]


@dataclass(frozen=True, eq=False)
class DiagonalGaussian(FlatGaussian):
    r"""Independent coordinates, :math:`\Sigma = \mathrm{diag}(\sigma^2)`.

    Attributes:
        loc: Mean, shape (P,).
        scale: Standard deviations :math:`\sigma`, all > 0, shape (P,).
    """

    scale: Tensor

    def __post_init__(self) -> None:
        """Check shapes and that every standard deviation is positive."""
        super().__post_init__()
        require_shape("scale", self.scale, self.loc.shape, "P")
        require_positive("scale", self.scale)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return self.loc + self.scale * noise(self.loc, num_samples, self.dim, generator)

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        z = (theta - self.loc) / self.scale
        return -0.5 * (z.square().sum(-1) + self.dim * LOG_2PI) - self.scale.log().sum()

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return self.scale.square()

    def covariance(self) -> Tensor:  # noqa: D102
        return self.variance.diag()

    def quadratic(self, jacobian: Tensor) -> Tensor:  # noqa: D102
        scaled = jacobian * self.scale  # (..., K, P)
        return scaled @ scaled.mT

    def covariance_times(self, vector: Tensor) -> Tensor:  # noqa: D102
        return vector * self.variance

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"loc": self.loc, "scale": self.scale}


@dataclass(frozen=True, eq=False)
class LowRankGaussian(FlatGaussian):
    r"""A diagonal plus a low-rank term, :math:`\Sigma = \mathrm{diag}(d) + F F^\top`.

    Densities use the Woodbury identity and the determinant lemma with the R x R matrix
    :math:`C = I + F^\top \mathrm{diag}(d)^{-1} F`; draws are
    :math:`\mu + \sqrt{d} \odot \epsilon_1 + F \epsilon_2`, so that SWAG's own way of sampling is this one.

    Attributes:
        loc: Mean, shape (P,).
        cov_diag: Diagonal part d of the covariance (variances), all > 0, shape (P,).
        cov_factor: Factor F, shape (P, R); R may be 0.
    """

    cov_diag: Tensor
    cov_factor: Tensor
    _capacitance_tril: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and that the diagonal part is positive; factorise the R x R matrix.

        Raises:
            ValueError: If `cov_factor` is not (P, R).
        """
        super().__post_init__()
        require_shape("cov_diag", self.cov_diag, self.loc.shape, "P")
        require_positive("cov_diag", self.cov_diag)
        if self.cov_factor.dim() != 2 or self.cov_factor.shape[0] != self.dim:
            raise ValueError(f"cov_factor must have shape ({self.dim}, R), got {tuple(self.cov_factor.shape)}")
        require_finite("cov_factor", self.cov_factor)
        whitened = self.cov_factor / self.cov_diag.sqrt()[:, None]
        identity = torch.eye(whitened.shape[1], dtype=whitened.dtype, device=whitened.device)
        # Now, not at the first density: a value cached inside a torch.func transform or a capture would leak out of it.
        object.__setattr__(self, "_capacitance_tril", torch.linalg.cholesky(identity + whitened.mT @ whitened))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        rank = self.cov_factor.shape[1]
        drawn = noise(self.loc, num_samples, self.dim + rank, generator)
        return self.loc + self.cov_diag.sqrt() * drawn[:, : self.dim] + drawn[:, self.dim :] @ self.cov_factor.mT

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        z = (theta - self.loc) / self.cov_diag.sqrt()  # (..., P)
        u = solve_rows(self._capacitance_tril, (z / self.cov_diag.sqrt()) @ self.cov_factor)  # (..., R)
        distance = z.square().sum(-1) - u.square().sum(-1)
        half_logdet = 0.5 * self.cov_diag.log().sum() + self._capacitance_tril.diagonal().log().sum()
        return -0.5 * (distance + self.dim * LOG_2PI) - half_logdet

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return self.cov_diag + self.cov_factor.square().sum(-1)

    def covariance(self) -> Tensor:  # noqa: D102
        return self.cov_diag.diag() + self.cov_factor @ self.cov_factor.mT

    def quadratic(self, jacobian: Tensor) -> Tensor:  # noqa: D102
        scaled = jacobian * self.cov_diag.sqrt()  # (..., K, P)
        projected = jacobian @ self.cov_factor  # (..., K, R)
        return scaled @ scaled.mT + projected @ projected.mT

    def covariance_times(self, vector: Tensor) -> Tensor:  # noqa: D102
        return vector * self.cov_diag + (vector @ self.cov_factor) @ self.cov_factor.mT

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"loc": self.loc, "cov_diag": self.cov_diag, "cov_factor": self.cov_factor}


@dataclass(frozen=True, eq=False)
class DenseGaussian(FlatGaussian):
    r"""A full covariance, held as the Cholesky factor of itself or of its inverse.

    From a precision :math:`\Lambda = L L^\top` a draw is :math:`\mu + L^{-\top} \epsilon` by a triangular solve:
    no matrix is inverted, except where `variance` or `covariance` ask for it.

    Attributes:
        loc: Mean, shape (P,).
        scale_tril: Lower Cholesky factor of the covariance, shape (P, P), or None.
        precision_tril: Lower Cholesky factor of the precision, shape (P, P), or None. Exactly one of the two is given.
    """

    scale_tril: Tensor | None = None
    precision_tril: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that exactly one factor is given and that it is a Cholesky factor.

        Raises:
            ValueError: If none or both are given, or the factor is not lower triangular with a positive diagonal.
        """
        super().__post_init__()
        if (self.scale_tril is None) == (self.precision_tril is None):
            raise ValueError("give exactly one of scale_tril and precision_tril")
        name = "scale_tril" if self.precision_tril is None else "precision_tril"
        # LAPACK's factors lie column by column; laid out as when loaded from a file, draws are equal to the bit.
        object.__setattr__(self, name, getattr(self, name).contiguous())
        factor = self._factor
        require_shape(name, factor, torch.Size([self.dim, self.dim]), "P, P")
        require_finite(name, factor)
        if torch.count_nonzero(factor.triu(1)):
            raise ValueError(f"{name} must be lower triangular, got entries above its diagonal")
        require_positive(f"the diagonal of {name}", factor.diagonal())

    @classmethod
    def from_precision(cls, loc: Tensor, precision: Tensor) -> Self:
        r"""Build from a precision matrix :math:`\Lambda = \Sigma^{-1}`.

        Args:
            loc: Mean, shape (P,).
            precision: Symmetric positive definite matrix, shape (P, P).

        Returns:
            The Gaussian with covariance :math:`\Lambda^{-1}`.
        """
        return cls(loc, precision_tril=_cholesky("precision", precision))

    @classmethod
    def from_covariance(cls, loc: Tensor, covariance: Tensor) -> Self:
        r"""Build from a covariance matrix :math:`\Sigma`.

        Args:
            loc: Mean, shape (P,).
            covariance: Symmetric positive definite matrix, shape (P, P).

        Returns:
            The Gaussian with that covariance.
        """
        return cls(loc, scale_tril=_cholesky("covariance", covariance))

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        drawn = noise(self.loc, num_samples, self.dim, generator)
        if self.scale_tril is not None:
            return self.loc + drawn @ self.scale_tril.mT
        return self.loc + torch.linalg.solve_triangular(self._factor, drawn, upper=False, left=False)

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        centred = theta - self.loc
        log_diagonal = self._factor.diagonal().log().sum()
        if self.scale_tril is not None:
            z, half_logdet = solve_rows(self.scale_tril, centred), log_diagonal
        else:
            z, half_logdet = centred @ self._factor, -log_diagonal
        return -0.5 * (z.square().sum(-1) + self.dim * LOG_2PI) - half_logdet

    @cached_property
    def variance(self) -> Tensor:  # noqa: D102
        if self.scale_tril is not None:
            return self.scale_tril.square().sum(-1)
        return torch.cholesky_inverse(self._factor).diagonal().clone()

    def covariance(self) -> Tensor:  # noqa: D102
        if self.scale_tril is not None:
            return self.scale_tril @ self.scale_tril.mT
        return torch.cholesky_inverse(self._factor)

    @cached_property
    def dense(self) -> Tensor:
        """The covariance, kept: as large again as the factor."""
        return self.covariance()

    def quadratic(self, jacobian: Tensor) -> Tensor:  # noqa: D102
        if self.scale_tril is not None:
            scaled = jacobian @ self.scale_tril
        else:
            scaled = solve_rows(self._factor, jacobian)
        return scaled @ scaled.mT

    def covariance_times(self, vector: Tensor) -> Tensor:  # noqa: D102
        if self.scale_tril is not None:
            return (vector @ self.scale_tril) @ self.scale_tril.mT
        whitened = solve_rows(self._factor, vector)
        flat = whitened.reshape(math.prod(whitened.shape[:-1]), self.dim)
        return torch.linalg.solve_triangular(self._factor, flat, upper=False, left=False).reshape(vector.shape)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        if self.scale_tril is not None:
            return {"loc": self.loc, "scale_tril": self.scale_tril}
        return {"loc": self.loc, "precision_tril": self._factor}

    @property
    def _factor(self) -> Tensor:
        factor = self.scale_tril if self.precision_tril is None else self.precision_tril
        assert factor is not None
        return factor


GAUSSIANS: dict[str, type[FlatGaussian]] = {
    gaussian.__name__: gaussian
    for gaussian in (
        DiagonalGaussian,
        LowRankGaussian,
        DenseGaussian,
        KroneckerGaussian,
        SpectralGaussian,
        OutputGaussians,
    )
}
"""Every flat Gaussian by its class name, under which it is saved."""


def gaussian_from_tensors(name: str, tensors: Mapping[str, Tensor]) -> FlatGaussian:
    """Rebuild a saved Gaussian.

    Args:
        name: Class name.
        tensors: What its `tensors` returned.

    Returns:
        A Gaussian equal to the one saved.

    Raises:
        ValueError: If there is no such class, or the tensors are not its own.
    """
    if name not in GAUSSIANS:
        raise ValueError(f"no Gaussian is called {name!r}; expected one of {sorted(GAUSSIANS)}")
    try:
        return GAUSSIANS[name].from_tensors(tensors)
    except TypeError as err:
        raise ValueError(f"{name} cannot be made from tensors named {sorted(tensors)}") from err


def _cholesky(name: str, matrix: Tensor) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must have shape (P, P), got {tuple(matrix.shape)}")
    require_finite(name, matrix)
    scale = matrix.diagonal().abs().max()
    if (matrix - matrix.mT).abs().max() > 1e3 * torch.finfo(matrix.dtype).eps * scale:
        raise ValueError(f"{name} must be symmetric, got entries differing by {(matrix - matrix.mT).abs().max():.3g}")
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        smallest = torch.linalg.eigvalsh(matrix)[0].item()
        raise ValueError(f"{name} must be positive definite, got a smallest eigenvalue of {smallest:.3g}")
    return factor
