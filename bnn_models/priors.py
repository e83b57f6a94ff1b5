r"""Priors over network weights, as normalised Pyro distributions on whole tensors.

A prior is a frozen dataclass. A model asks it for the distribution of one tensor, described by a `Slot` (site name,
shape, fan-in, bias or not), and samples that under the site's name. Scales stay Python floats until the model runs, so
the prior follows the dtype and the device of the data. With ``scale="fan_in"`` the standard deviation of a weight is
:math:`s_w / \sqrt{\text{fan-in}}`, which keeps network outputs of order one at any width (Neal 1996; the convention of
Fortuin et al. 2022); a bias gets the standard deviation :math:`s_w` itself, where :math:`s_w` is ``gain``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bnn_models.checks import cast_distribution, check_positive_distribution, check_scale, match_patterns

Scale = float | Literal["fan_in"] | Mapping[str, float | Literal["fan_in"]]


@dataclass(frozen=True)
class Slot:
    """A tensor of the network that a prior is asked about.

    Attributes:
        name: Site name, the dotted name of the parameter.
        shape: Shape of the tensor, any number of dimensions.
        fan_in: Number of inputs that one output of the layer sums over.
        is_bias: Whether the tensor is a bias or bias-like (one-dimensional), so that fan-in does not apply.
        dtype: Floating-point type the model runs in.
        device: Device the model runs on.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    is_bias: bool
    dtype: torch.dtype
    device: torch.device

    def scalar(self, value: float) -> Tensor:
        """Put a Python float into the dtype and device of this slot.

        Args:
            value: The number.

        Returns:
            The number as a tensor of shape ().
        """
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def expand(self, scalar_distribution: Any) -> Any:
        """Make independent copies of a scalar distribution fill the slot.

        Args:
            scalar_distribution: Univariate distribution of batch shape ().

        Returns:
            The distribution with event shape equal to the shape of the slot.
        """
        return scalar_distribution.expand(self.shape).to_event(len(self.shape))


class Prior:
    """Base class: a rule that gives every tensor of a network its prior distribution."""

    def distribution(self, slot: Slot) -> Any:
        """Return the prior of one tensor.

        Args:
            slot: The tensor asked about.

        Returns:
            A normalised Pyro distribution with event shape ``slot.shape``; log-densities in nats.

        Raises:
            NotImplementedError: In the base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must define distribution(slot)")

    def sample(self, slot: Slot) -> Tensor:
        """Sample one tensor as the Pyro site ``slot.name``.

        Args:
            slot: The tensor to sample.

        Returns:
            The value, shape ``slot.shape``, with extra dimensions on the left inside vectorised plates.
        """
        return pyro.sample(slot.name, self.distribution(slot))

    def check(self, names: Iterable[str]) -> None:
        """Check patterns, if there are any, against the names of the sites the prior will be asked about.

        Args:
            names: Site names.
        """


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
        return slot.expand(dist.MixtureSameFamily(dist.Categorical(probs=weights), normals))


@dataclass(frozen=True)
class Hierarchical(Prior):
    r"""A scale per layer with its own prior: :math:`\tau_l \sim p(\tau)`, :math:`w \mid \tau_l \sim N(0, \tau_l^2)`.

    The scale of the weights of a layer is the latent site ``"<weight>_scale"``, such as ``"layers.0.weight_scale"``.
    Biases have no latent scale: they follow the same family with the fixed scale ``bias_scale``.

    Attributes:
        scale_prior: Prior of the scale, a univariate Pyro distribution on (0, inf).
        family: ``"normal"`` (the scale is the standard deviation) or ``"laplace"`` (the scale is b).
        fan_in: Whether to divide the scale by sqrt(fan-in).
        bias_scale: Scale of the biases, > 0.
    """

    scale_prior: Any
    family: Literal["normal", "laplace"] = "normal"
    fan_in: bool = False
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: If the prior of the scale is not univariate and positive, or the family is unknown.
        """
        check_positive_distribution("scale_prior", self.scale_prior)
        if self.family not in _FAMILIES:
            raise ValueError(f"`family` must be one of {sorted(_FAMILIES)}, got {self.family!r}")
        check_scale("bias_scale", self.bias_scale)

    def distribution(self, slot: Slot) -> Any:
        """Return the prior of one tensor given its layer's scale, which is sampled here as a site of its own.

        Args:
            slot: The tensor asked about.

        Returns:
            Distribution with event shape ``slot.shape``.
        """
        family = _FAMILIES[self.family]
        if slot.is_bias:
            return slot.expand(family(slot.scalar(0.0), slot.scalar(self.bias_scale)))
        scale = pyro.sample(f"{slot.name}_scale", cast_distribution(self.scale_prior, slot.dtype, slot.device))
        if self.fan_in:
            scale = scale / math.sqrt(slot.fan_in)
        batch_shape, num_dims = scale.shape, len(slot.shape)
        scale = scale.reshape(batch_shape + (1,) * num_dims)
        return family(slot.scalar(0.0), scale).expand(batch_shape + slot.shape).to_event(num_dims)


@dataclass(frozen=True)
class PerSite(Prior):
    """Different priors for different sites: the first pattern that matches the site name decides.

    Models accept the bare dictionary in place of this class.

    Attributes:
        priors: From `fnmatch` patterns on dotted site names to priors; None keeps the pretrained value
            (`bayesianize` only).
    """

    priors: Mapping[str, Prior | None]

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: If there is no pattern.
            TypeError: If a value is neither a prior nor None.
        """
        if not self.priors:
            raise ValueError("`priors` is empty; give at least one pattern, such as {'*': Normal()}")
        object.__setattr__(self, "priors", dict(self.priors))
        for pattern, prior in self.priors.items():
            if prior is not None and (not isinstance(prior, Prior) or isinstance(prior, PerSite)):
                raise TypeError(f"the prior of pattern '{pattern}' must be a single prior or None, got {prior!r}")


_FAMILIES: dict[str, Any] = {"normal": dist.Normal, "laplace": dist.Laplace}


def assign(prior: Prior | Mapping[str, Prior | None], names: Sequence[str]) -> dict[str, Prior | None]:
    """Give each site its prior.

    Args:
        prior: One prior for all sites, or a dictionary from `fnmatch` patterns to priors.
        names: Names of all sites.

    Returns:
        From site name to its prior, in the order of ``names``; None for a site that stays constant.

    Raises:
        TypeError: If ``prior`` is neither a prior nor a dictionary.
    """
    if isinstance(prior, Mapping):
        prior = PerSite(prior)
    if not isinstance(prior, Prior):
        raise TypeError(f"`prior` must be a prior such as priors.Normal(1.0), or a dictionary of them, got {prior!r}")
    if not isinstance(prior, PerSite):
        prior.check(names)
        return dict.fromkeys(names, prior)
    matches = match_patterns(prior.priors, names)
    for pattern, single in prior.priors.items():
        if single is not None:
            single.check([name for name in names if matches[name] == pattern])
    return {name: prior.priors[matches[name]] for name in names}
