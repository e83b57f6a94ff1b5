"""What a prior is: a rule from a tensor of the network, described by a `Slot`, to its distribution."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor


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
