"""Priors under which all weights are independent: Gaussian, Laplace, Student t, logistic, mixture of two Gaussians."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from bnn_models.checks import check_scale, match_patterns
from bnn_models.priors.base import Prior, Slot

Scale = float | Literal["fan_in"] | Mapping[str, float | Literal["fan_in"]]


@dataclass(frozen=True)
class _Scaled(Prior):
    """What the families with one scale share.

    Attributes:
        scale: Scale of the family (> 0), or ``"fan_in"``, or a dictionary from site-name patterns to these.
        gain: With ``"fan_in"``: the standard deviation is gain / sqrt(fan-in) for weights and gain for biases.
    """

    scale: Scale = 1.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a scale or the gain is not positive, or a gain is given that nothing would use.
        """
        if isinstance(self.scale, Mapping):
            # A copy, so that changing the caller's dictionary later does not change the prior.
            object.__setattr__(self, "scale", dict(self.scale))
        values = list(self.scale.values()) if isinstance(self.scale, Mapping) else [self.scale]
        if not values:
            raise ValueError("`scale` is an empty dictionary; give at least one pattern, such as {'*': 1.0}")
        for value in values:
            if value != "fan_in":
                check_scale("scale", value, "a positive number, 'fan_in', or a dictionary from patterns to these")
        check_scale("gain", self.gain)
        if self.gain != 1.0 and "fan_in" not in values:
            raise ValueError(f"`gain` only applies to scale='fan_in', got gain={self.gain!r} with scale={self.scale!r}")

    def check(self, names: Iterable[str]) -> None:
        """Check a dictionary of scales against the site names.

        Args:
            names: Site names.
        """
        if isinstance(self.scale, Mapping):
            match_patterns(self.scale, names)

    def scale_at(self, slot: Slot) -> float:
        """Scale of the family's distribution for one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            The scale, in the units of the weights.
        """
        scale = self.scale
        if isinstance(scale, Mapping):
            scale = scale[match_patterns(scale, [slot.name], all_used=False)[slot.name]]
        if isinstance(scale, str):
            return self.gain * self._scale_per_stddev() / (1.0 if slot.is_bias else math.sqrt(slot.fan_in))
        return float(scale)

    def _scale_per_stddev(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Normal(_Scaled):
    r"""Independent Gaussians, :math:`w \sim N(0, s^2)`.

    Attributes:
        scale: Standard deviation s, or ``"fan_in"``, or a dictionary from site-name patterns to these (first wins).
        gain: With ``"fan_in"``: s = gain / sqrt(fan-in) for weights, s = gain for biases.

    Example:
        >>> Normal(scale="fan_in", gain=2.0)
        Normal(scale='fan_in', gain=2.0)
    """

    def distribution(self, slot: Slot) -> Any:
        """Return the Gaussian prior of one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        return slot.expand(dist.Normal(slot.scalar(0.0), slot.scalar(self.scale_at(slot))))


@dataclass(frozen=True)
class Laplace(_Scaled):
    r"""Independent Laplace distributions, :math:`p(w) = \exp(-|w| / b) / 2b`, of variance :math:`2 b^2`.

    Attributes:
        scale: Scale b, or ``"fan_in"`` (b giving the standard deviation stated below), or a dictionary of them.
        gain: With ``"fan_in"``: the standard deviation is gain / sqrt(fan-in) for weights and gain for biases.
    """

    def distribution(self, slot: Slot) -> Any:
        """Return the Laplace prior of one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        return slot.expand(dist.Laplace(slot.scalar(0.0), slot.scalar(self.scale_at(slot))))

    def _scale_per_stddev(self) -> float:
        return math.sqrt(0.5)


@dataclass(frozen=True)
class StudentT(_Scaled):
    r"""Independent Student t with :math:`\nu` degrees of freedom, of variance :math:`s^2 \nu / (\nu - 2)`.

    Attributes:
        scale: Scale s (not the standard deviation), or ``"fan_in"``, or a dictionary of them.
        gain: With ``"fan_in"``: the standard deviation is gain / sqrt(fan-in) for weights and gain for biases.
        df: Degrees of freedom, > 0; above 2 with ``"fan_in"``, because below that the variance is infinite.
    """

    df: float = 3.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a field is out of range.
        """
        super().__post_init__()
        check_scale("df", self.df)
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        if "fan_in" in scales and self.df <= 2:
            raise ValueError(f"`df` must be > 2 with scale='fan_in' (the variance is infinite), got {self.df!r}")

    def distribution(self, slot: Slot) -> Any:
        """Return the Student t prior of one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        scale = slot.scalar(self.scale_at(slot))
        return slot.expand(dist.StudentT(slot.scalar(self.df), slot.scalar(0.0), scale))

    def _scale_per_stddev(self) -> float:
        return math.sqrt((self.df - 2) / self.df)


@dataclass(frozen=True)
class Logistic(_Scaled):
    r"""Independent logistic distributions, :math:`p(w) = e^{-w/s} / s (1 + e^{-w/s})^2`.

    The variance is :math:`s^2 \pi^2 / 3`. Between the Gaussian and the Laplace in its tails, and smooth at zero: the
    third family of Izmailov et al. 2021 [recalled from the paper, not re-read].

    Attributes:
        scale: Scale s (not the standard deviation), or ``"fan_in"``, or a dictionary of them.
        gain: With ``"fan_in"``: the standard deviation is gain / sqrt(fan-in) for weights and gain for biases.
    """

    def distribution(self, slot: Slot) -> Any:
        """Return the logistic prior of one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        return slot.expand(dist.Logistic(slot.scalar(0.0), slot.scalar(self.scale_at(slot))))

    def _scale_per_stddev(self) -> float:
        return math.sqrt(3.0) / math.pi


class _RealMixture(dist.MixtureSameFamily):
    """A mixture on the real line, said in a way that `torch.distributions.biject_to` understands."""

    support = constraints.real  # type: ignore[assignment]


@dataclass(frozen=True)
class ScaleMixture(Prior):
    r"""Mixture of two zero-mean Gaussians, :math:`\pi N(0, s_1^2) + (1 - \pi) N(0, s_2^2)` (Blundell et al. 2015).

    [recalled from the paper, not re-read]

    Attributes:
        mix: Weight :math:`\pi` of the first Gaussian, in (0, 1).
        scales: Standard deviations of the two Gaussians, > 0.
    """

    mix: float = 0.5
    scales: tuple[float, float] = (1.0, 0.1)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If the weight is outside (0, 1), or there are not two positive scales.
        """
        if not 0.0 < self.mix < 1.0:
            raise ValueError(f"`mix` must lie in (0, 1), got {self.mix!r}")
        if not isinstance(self.scales, Sequence) or len(self.scales) != 2:
            raise ValueError(f"`scales` must be two positive numbers, got {self.scales!r}")
        object.__setattr__(self, "scales", tuple(self.scales))
        for value in self.scales:
            check_scale("scales", value, "two positive numbers")

    def distribution(self, slot: Slot) -> Any:
        """Return the mixture prior of one tensor; the component is summed out for every weight separately.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        weights = torch.stack([slot.scalar(self.mix), slot.scalar(1.0 - self.mix)])
        scales = torch.stack([slot.scalar(scale) for scale in self.scales])
        normals = dist.Normal(torch.zeros_like(scales), scales)
        return slot.expand(_RealMixture(dist.Categorical(probs=weights), normals))
