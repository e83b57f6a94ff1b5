"""A Pyro model with other priors at some sites and another noise scale, made without touching the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.observation import unwrap


@dataclass(frozen=True, eq=False)
class RedeclaredModel:
    """A model whose sites have independent Gaussian priors with the moments given here; any backend fits it.

    Attributes:
        model: The Pyro callable ``model(x, y=None)``.
        moments: From site name to prior means and standard deviations, each of the site's shape.
        observed: Name of the observed site.
        noise_factor: Factor of its Normal distribution's scale.
    """

    model: Any
    moments: Mapping[str, tuple[Tensor, Tensor]]
    observed: str
    noise_factor: float = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the other priors."""
        with _Redeclare(self):
            return self.model(*args, **kwargs)

    @property
    def initial_sites(self) -> Any:
        """Starting values of the model itself, if it has any."""
        return getattr(self.model, "initial_sites", None)

    @property
    def fresh_sites(self) -> Any:
        """Further starting values of the model itself, if it has any."""
        return getattr(self.model, "fresh_sites", None)


class _Redeclare(Messenger):
    """Pyro handler that replaces distributions before they are used."""

    def __init__(self, declared: RedeclaredModel) -> None:
        super().__init__()
        self.declared = declared

    def _pyro_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if name in self.declared.moments:
            like = fn.mean
            loc, scale = (value.to(like.device, like.dtype) for value in self.declared.moments[name])
            msg["fn"] = _shaped(dist.Normal(loc, scale), fn)
        elif name == self.declared.observed and self.declared.noise_factor != 1:
            base, _ = unwrap(fn)
            msg["fn"] = _shaped(dist.Normal(base.loc, base.scale * self.declared.noise_factor), fn)


def _shaped(base: Any, fn: Any) -> Any:
    """A distribution with the batch and event shapes of another."""
    return base.expand(fn.batch_shape + fn.event_shape).to_event(fn.event_dim)
