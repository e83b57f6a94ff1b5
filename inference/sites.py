"""Latent sites and their places in theta, and which plate runs over the data: read from one run's messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.errors import UnsupportedModelError
from inference.observation import bijection
from inference.refusals import is_latent


@dataclass(frozen=True)
class Site:
    """One latent variable and its place in theta.

    Attributes:
        name: Site name in the model.
        shape: Shape of the constrained value.
        unconstrained_shape: Shape before the bijection onto the support.
        support: Pyro constraint.
        event_dim: Rightmost dimensions of the value that one log-probability covers.
        start: First index in theta.
        stop: One past the last index in theta.
        plates: Names of the plates the site is in.
        local: Whether there is one value per datum.
    """

    name: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    support: Any
    event_dim: int
    start: int
    stop: int
    plates: tuple[tuple[str, int], ...] = ()
    local: bool = False

    @property
    def transform(self) -> Any:
        """Bijection from unconstrained space onto the support."""
        return bijection(self.support)

    @property
    def size(self) -> int:
        """Number of entries in theta."""
        return self.stop - self.start

    def constrain(self, flat: Tensor) -> Tensor:
        """Map this site's slice of theta, shape (..., size), to its value, shape (..., *shape)."""
        return self.transform(flat.reshape(flat.shape[:-1] + self.unconstrained_shape))

    def log_abs_det_jacobian(self, flat: Tensor) -> Tensor:
        """Log |d value / d theta| of one slice, shape (size,) to ()."""
        unconstrained = flat.reshape(self.unconstrained_shape)
        return self.transform.log_abs_det_jacobian(unconstrained, self.transform(unconstrained)).sum()


def data_frame(msg: dict[str, Any], data_plate: str | None) -> Any:
    """The plate over the data, if the site is in it."""
    return next((f for f in msg["cond_indep_stack"] if f.dim is not None and f.name == data_plate), None)


def find_data_plate(message: dict[str, Any], batch: int, target_dim: int) -> str:
    """Name of the plate over the data: of the batch's size and, among several, along the first dimension of y.

    Args:
        message: Message of the observed site.
        batch: Number of data in this run.
        target_dim: Dimensions of y.

    Returns:
        The name.

    Raises:
        UnsupportedModelError: If the site is in no plate of that size.
    """
    frames = [f for f in message["cond_indep_stack"] if f.dim is not None]
    if not frames:
        raise UnsupportedModelError(
            f"the observed site {message['name']!r} is in no plate, so the data are not known to be independent; "
            "put it inside "
            '`with pyro.plate("data", len(x)):`'
        )
    sized = [f for f in frames if f.size == batch]
    if not sized:
        raise UnsupportedModelError(
            f"the observed site {message['name']!r} is in plates of size {[f.size for f in frames]}, but there "
            f"are {batch} "
            'data; put it inside `with pyro.plate("data", len(x)):`'
        )
    first = [f for f in sized if -f.dim == target_dim - message["fn"].event_dim]
    named = [f for f in sized if f.name == "data"]
    return (first or named or sized)[0].name


def find_sites(messages: list[dict[str, Any]], data_plate: str | None) -> tuple[Site, ...]:
    """Every latent site of one run with its slice of theta.

    Args:
        messages: All messages of the run.
        data_plate: Name of the plate over the data.

    Returns:
        Sites in the order of the model.

    Raises:
        UnsupportedModelError: If there is none, or one has no known bijection onto its support.
    """
    sites: list[Site] = []
    start = 0
    for msg in messages:
        if not is_latent(msg):
            continue
        fn, value = msg["fn"], msg["value"]
        try:
            shape = tuple(bijection(fn.support).inv(value).shape)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"latent site {msg['name']!r} has the support {fn.support}, onto which no bijection is known; "
                "sample an "
                "unconstrained site and transform it, or register one with torch.distributions.biject_to"
            ) from error
        stop = start + int(torch.Size(shape).numel())
        plates = tuple((f.name, f.dim) for f in msg["cond_indep_stack"] if f.dim is not None)
        local = data_frame(msg, data_plate) is not None
        sites.append(Site(msg["name"], tuple(value.shape), shape, fn.support, fn.event_dim, start, stop, plates, local))
        start = stop
    if not sites:
        raise UnsupportedModelError("the model has no latent site: nothing has a prior, so there is nothing to infer")
    return tuple(sites)
