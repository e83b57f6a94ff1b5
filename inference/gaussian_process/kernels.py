r"""Covariance functions with features: blocks of the kernel matrix, and draws of functions from the prior.

.. math:: k(x, x') = E\left[\phi(x)^\top \phi(x')\right], \qquad f = \phi(x)^\top w, \; w \sim N(0, I)

For stationary kernels the features are random: cosines and sines at frequencies drawn from the spectral density, which
is Gaussian for RBF and Student-t with :math:`2 \nu` degrees of freedom for Matern (Rahimi & Recht 2007). The linear
kernel of a Bayesian linear model has exact ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_SMOOTHNESS = (0.5, 1.5, 2.5)


@dataclass(frozen=True, eq=False)
class Features:
    """Feature map of a kernel.

    Attributes:
        frequencies: Of cosines and sines, (F / 2, D); None for the inputs themselves.
        scale: Factor of the features: a number, or one per input for the inputs themselves, (D,).
    """

    frequencies: Tensor | None
    scale: Tensor

    @property
    def num(self) -> int:
        """Number of features F."""
        return len(self.scale) if self.frequencies is None else 2 * len(self.frequencies)

    def __call__(self, x: Tensor) -> Tensor:
        """Features of inputs, (n, D) to (n, F)."""
        if self.frequencies is None:
            return x * self.scale
        angles = x @ self.frequencies.T
        return torch.cat([angles.cos(), angles.sin()], -1) * self.scale


class Kernel(ABC):
    """A covariance function."""

    @abstractmethod
    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        """Block of the kernel matrix.

        Args:
            x: Inputs, (n, D).
            other: Inputs, (m, D).

        Returns:
            Covariances of function values, (n, m).
        """

    @abstractmethod
    def variance(self, x: Tensor) -> Tensor:
        """Prior variances of function values, (n, D) to (n,)."""

    @abstractmethod
    def features(self, num: int, like: Tensor, generator: torch.Generator) -> Features:
        """Features whose inner products are the kernel, exactly or on average.

        Args:
            num: Number F of random features, even; not used where there are exact ones.
            like: Inputs, (n, D): their dimension, dtype and device.
            generator: Source of the randomness.

        Returns:
            The feature map.
        """


@dataclass(frozen=True)
class _Stationary(Kernel):
    """What kernels of the distance between inputs share.

    Attributes:
        lengthscale: Length scale > 0: a number, or one per input, as a tuple.
        scale: Prior standard deviation of function values, > 0.
    """

    lengthscale: float | tuple[float, ...] = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a length scale or the scale is not > 0.
        """
        lengths = self.lengthscale if isinstance(self.lengthscale, tuple) else (self.lengthscale,)
        if not lengths or not all(math.isfinite(value) and value > 0 for value in lengths):
            raise ValueError(f"`lengthscale` must be > 0, or a tuple of such numbers, got {self.lengthscale!r}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"`scale` must be > 0, got {self.scale!r}")

    def variance(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.new_full((len(x),), self.scale**2)

    def features(self, num: int, like: Tensor, generator: torch.Generator) -> Features:  # noqa: D102
        frequencies = self._frequencies(max(1, num // 2), like, generator) / self._lengths(like)
        return Features(frequencies, like.new_tensor(self.scale / len(frequencies) ** 0.5))

    def _lengths(self, x: Tensor) -> Tensor:
        lengths = x.new_tensor(self.lengthscale)
        if lengths.dim() and len(lengths) != x.shape[1]:
            raise ValueError(f"`lengthscale` has {len(lengths)} entries, but the inputs have {x.shape[1]} columns")
        return lengths

    def _distance(self, x: Tensor, other: Tensor) -> Tensor:
        lengths = self._lengths(x)
        return torch.cdist(x / lengths, other / lengths)

    @abstractmethod
    def _frequencies(self, num: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draws from the spectral density for a length scale of 1, (num, D)."""


@dataclass(frozen=True)
class RBF(_Stationary):
    r"""Squared exponential, :math:`s^2 \exp(-r^2 / 2)` with :math:`r = \|(x - x') / \ell\|`.

    Attributes:
        lengthscale: Length scale :math:`\ell` > 0: a number, or one per input, as a tuple.
        scale: Prior standard deviation s of function values, > 0.
    """

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:  # noqa: D102
        return self.scale**2 * (-0.5 * self._distance(x, other).square()).exp()

    def _frequencies(self, num: int, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(num, like.shape[1], generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Matern(_Stationary):
    r"""Matern, with :math:`d = \sqrt{2 \nu} \, r`: :math:`s^2 e^{-d}` times 1, :math:`1 + d` or :math:`1 + d + d^2/3`.

    Attributes:
        lengthscale: Length scale > 0: a number, or one per input, as a tuple.
        scale: Prior standard deviation s of function values, > 0.
        smoothness: :math:`\nu`: 0.5, 1.5 or 2.5; draws have :math:`\nu - 1/2` derivatives.
    """

    smoothness: float = 1.5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If the smoothness is not one with a closed form.
        """
        super().__post_init__()
        if self.smoothness not in _SMOOTHNESS:
            raise ValueError(f"`smoothness` must be 0.5, 1.5 or 2.5, got {self.smoothness!r}")

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:  # noqa: D102
        d = (2 * self.smoothness) ** 0.5 * self._distance(x, other)
        if self.smoothness == 0.5:
            factor = torch.ones_like(d)
        else:
            factor = 1 + d if self.smoothness == 1.5 else 1 + d + d.square() / 3
        return self.scale**2 * factor * (-d).exp()

    def _frequencies(self, num: int, like: Tensor, generator: torch.Generator) -> Tensor:
        freedom = round(2 * self.smoothness)
        options = {"generator": generator, "dtype": like.dtype, "device": like.device}
        normal = torch.randn(num, like.shape[1], **options)
        chi_squared = torch.randn(num, freedom, **options).square().sum(1, keepdim=True)
        return normal * (freedom / chi_squared).sqrt()


@dataclass(frozen=True)
class Linear(Kernel):
    r"""Bayesian linear model, :math:`k(x, x') = \sum_i s_i^2 x_i x'_i` for weights :math:`w_i \sim N(0, s_i^2)`.

    Attributes:
        scale: Prior standard deviation s > 0 of the weights: a number, or one per input, as a tuple.
    """

    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: If a scale is not > 0.
        """
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not scales or not all(math.isfinite(value) and value > 0 for value in scales):
            raise ValueError(f"`scale` must be > 0, or a tuple of such numbers, got {self.scale!r}")

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:  # noqa: D102
        return (x * self._scales(x).square()) @ other.T

    def variance(self, x: Tensor) -> Tensor:  # noqa: D102
        return (x * self._scales(x)).square().sum(-1)

    def features(self, num: int, like: Tensor, generator: torch.Generator) -> Features:  # noqa: D102
        return Features(None, self._scales(like))

    def _scales(self, x: Tensor) -> Tensor:
        scales = (
            x.new_tensor(self.scale).expand(x.shape[1])
            if not isinstance(self.scale, tuple)
            else x.new_tensor(self.scale)
        )
        if len(scales) != x.shape[1]:
            raise ValueError(f"`scale` has {len(scales)} entries, but the inputs have {x.shape[1]} columns")
        return scales
