r"""What every Gaussian over the flat parameter vector offers, and the checks and small pieces they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class FlatGaussian(ABC):
    r"""A Gaussian :math:`N(\mu, \Sigma)` over theta, shape (P,).

    Attributes:
        loc: Mean :math:`\mu`, shape (P,).
    """

    loc: Tensor

    over_theta: ClassVar[bool] = True
    """Whether it is a distribution of theta, with draws and a density, and not of function values alone."""

    def __post_init__(self) -> None:
        """Refuse a mean which is not a finite vector.

        Raises:
            ValueError: If `loc` has another shape than (P,) or holds NaN or infinity.
        """
        if self.loc.dim() != 1:
            raise ValueError(f"loc must have shape (P,), got {tuple(self.loc.shape)}")
        require_finite("loc", self.loc)

    @property
    def dim(self) -> int:
        """Number of parameters P."""
        return self.loc.shape[0]

    @abstractmethod
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, shape (S, P).

        Args:
            num_samples: Number of draws S.
            generator: Source of the randomness, on the device of `loc`; None uses torch's global one.

        Returns:
            Draws, shape (S, P).
        """

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """Normalised log-density in nats.

        Args:
            theta: Points, shape (..., P).

        Returns:
            Log-densities, shape (...).
        """

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Marginal variances, the diagonal of the covariance, shape (P,)."""

    @abstractmethod
    def covariance(self) -> Tensor:
        r"""The dense covariance :math:`\Sigma`, shape (P, P): for small P and for tests."""

    @abstractmethod
    def quadratic(self, jacobian: Tensor) -> Tensor:
        r"""Covariance :math:`J \Sigma J^\top` of the linear map :math:`J \theta`.

        Args:
            jacobian: Linear maps J, shape (..., K, P).

        Returns:
            Symmetric covariances, shape (..., K, K).
        """

    def joint(self, jacobian: Tensor) -> Tensor:
        r"""Covariance :math:`J_X \Sigma J_X^\top` of K outputs at B inputs.

        Args:
            jacobian: Jacobians, shape (B, K, P).

        Returns:
            Symmetric covariance, shape (B, K, B, K).
        """
        return self.quadratic(jacobian.flatten(0, 1)).reshape(jacobian.shape[:2] * 2)

    @abstractmethod
    def covariance_times(self, vector: Tensor) -> Tensor:
        r"""Product :math:`\Sigma v`, as in a Newton step :math:`\Lambda^{-1} g`.

        Args:
            vector: Vectors v, shape (..., P).

        Returns:
            Products, shape (..., P).
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors `from_tensors` needs, by name: what is saved."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from what `tensors` returned.

        Args:
            tensors: Tensors by field name.

        Returns:
            A Gaussian equal to the one saved.
        """
        return cls(**tensors)


def noise(like: Tensor, num_samples: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws in the dtype and on the device of ``like``, (S, dim)."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    return torch.randn(num_samples, dim, generator=generator, dtype=like.dtype, device=like.device)


def solve_rows(tril: Tensor, rows: Tensor) -> Tensor:
    """Solution z of :math:`L z = row` for all rows of a (..., P) tensor: one triangular solve, not one per index."""
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return torch.linalg.solve_triangular(tril.mT, flat, upper=True, left=False).reshape(rows.shape)


def require_shape(name: str, value: Tensor, shape: torch.Size, letters: str) -> None:
    """Raise unless a tensor has this shape, written (letters) in the message."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({letters}) = {tuple(shape)}, got {tuple(value.shape)}")


def require_finite(name: str, value: Tensor) -> None:
    """Raise if a tensor holds NaN or infinity, with the number of them."""
    bad = value.numel() - int(value.isfinite().sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} entries of {value.numel()} which are NaN or infinite")


def require_positive(name: str, value: Tensor) -> None:
    """Raise unless every entry of a vector is > 0, with the first smallest."""
    require_finite(name, value)
    if not bool((value > 0).all()):
        index = int(value.argmin())
        raise ValueError(f"{name} must be > 0, got {value[index].item():.3g} at index {index}")
