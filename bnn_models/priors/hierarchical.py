"""A prior whose scale is learnt with the weights, layer by layer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist

from bnn_models.checks import cast_distribution, check_positive_distribution, check_scale
from bnn_models.priors.base import Prior, Slot

_FAMILIES: dict[str, Any] = {"normal": dist.Normal, "laplace": dist.Laplace}


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
