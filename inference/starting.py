"""Where a fit starts: what the user gave as ``init``, a network's own weights, or at random.

The rule is one for all backends. Without ``init``, the first point is the model's own, where it has one
(``initial_sites``, the weights of a network given to ``bayesianize``): the only point of MAP, Laplace, SWAG and mean
field, chain 0, member 0, particle 0. Every other point is drawn on its own: fresh weights of the network
(``fresh_sites``, what PyTorch would start it from), and where there are none, layer weights at standard deviation
1/sqrt(fan_in) and other sites near their prior median. Point c depends on the seed and on c alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.data import index
from inference.layers import Layer, find_layers

if TYPE_CHECKING:
    from inference.target import Target


def sample_prior(target: Target, num: int, seed: int = 0) -> Tensor:
    """Draws from the prior in unconstrained space.

    Args:
        target: The target.
        num: Number of draws S.
        seed: Random seed.

    Returns:
        (S, P).
    """
    rows = target.programs.traced.rows_of_all_sites
    values = target.programs.traced.prior_values(index(target.x, rows), target.y[rows], seed, num)
    return torch.stack([target.ravel(v) for v in values]).detach()


def starting_points(target: Target, num: int, seed: int, init: Any) -> Tensor:
    """Starting points of ``num`` chains, members or particles.

    Args:
        target: The target.
        num: Number of points C.
        seed: Random seed.
        init: See :meth:`inference.target.Target.initial`.

    Returns:
        (C, P).

    Raises:
        ValueError: If ``init`` does not fit this model.
    """
    if init is None:
        return (own_starts(target, num, seed) if target.initial_sites else random_starts(target, num, seed)).detach()
    if hasattr(init, "starting_points"):
        full = init.starting_points(num, seed, [(s.name, s.shape) for s in target.all_sites])
        return target.reduce(full).to(target.dtype).detach().clone()
    if isinstance(init, Mapping):
        init = target.ravel(init)
    if not isinstance(init, Tensor):
        raise ValueError(f"`init` must be a posterior, a dict of sites or a tensor, got {type(init).__name__}")
    if init.shape not in ((target.dim,), (num, target.dim)):
        raise ValueError(f"`init` must have shape ({target.dim},) or ({num}, {target.dim}), got {tuple(init.shape)}")
    if not torch.isfinite(init).all():
        raise ValueError("`init` holds NaN or infinite values")
    return init.to(target.dtype).expand(num, target.dim).detach().clone()


def own_starts(target: Target, num: int, seed: int) -> Tensor:
    """The model's own starting values, then fresh ones for every further point; what they leave open is random.

    Args:
        target: Target with ``initial_sites``.
        num: Number of points C.
        seed: Random seed.

    Returns:
        (C, P).
    """
    first = _like(target, target.initial_sites or {})
    if num == 1 and all(site.name in first for site in target.all_sites):  # nothing is left to chance
        return target.ravel(first)[None]
    chosen = [first]
    for stream in (random_stream(seed, point) for point in range(1, num)):
        fresh = target.fresh_sites(int(torch.randint(2**62, (), generator=stream))) if target.fresh_sites else {}
        chosen.append(_like(target, fresh))
    points = random_starts(target, num, seed)
    return torch.stack([target.ravel({**target.unravel(p), **own}) for p, own in zip(points, chosen, strict=True)])


def random_starts(target: Target, num: int, seed: int) -> Tensor:
    """Layer weights at standard deviation 1/sqrt(fan_in), other sites near their prior median.

    Args:
        target: The target.
        num: Number of points C, each from a stream of its own.
        seed: Random seed.

    Returns:
        (C, P).
    """
    draws = target.prior_draws
    median = draws.median(0).values
    layers = layers_of(target)
    points = []
    for generator in target.streams(seed, num):
        # A random combination of prior draws, not one of them: members that share a start would never part.
        weights = torch.randn(draws.shape[0], generator=generator, dtype=target.dtype, device=target.device)
        start = median + 0.1 * draws.shape[0] ** -0.5 * (weights @ (draws - median))
        noise = torch.randn(target.full_dim, generator=generator, dtype=target.dtype, device=target.device)
        for layer in layers:
            scale = layer.fan_in**-0.5 / abs(layer.scale)
            for piece in (layer.weight, layer.bias):
                if piece is not None:
                    start[piece] = scale * noise[piece]
        points.append(target.reduce(start))
    return torch.stack(points)


def layers_of(target: Target) -> tuple[Layer, ...]:
    """Layers of a target, read from whichever graph is recorded: their slices do not depend on the number of data.

    Args:
        target: The target.

    Returns:
        The layers.
    """
    return find_layers(target.recorded_any(), target.all_sites)


def _like(target: Target, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of sites in the dtype and on the device of a target."""
    return {k: torch.as_tensor(v, dtype=target.dtype, device=target.device) for k, v in sites.items()}


def random_stream(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for stream ``index`` of ``seed``; different pairs give unrelated streams."""
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + index)
    start = int(torch.randint(2**62, (), generator=mixed))
    return torch.Generator(device=device).manual_seed(start)
