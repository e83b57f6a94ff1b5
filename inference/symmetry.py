r"""Undo the symmetries of a network's weights: hidden units that can be swapped, and flipped where tanh is odd.

Reordering the H units of a hidden layer, with the columns of the next layer's weight, leaves the function as it is; so
does negating a unit's incoming and outgoing weights when the activation is odd. Chains number and sign their units
arbitrarily, so R-hat of the weights is large where the functions agree. :func:`align` brings every draw as near to a
reference as these moves allow: with u_i all weights of unit i and the sign s,

.. math:: \min_{\pi, s} \sum_i \| u_i^{\mathrm{ref}} - s_i u_{\pi(i)} \|^2,

a linear assignment per hidden layer, exact for one of them and repeated to a fixed point for several. Layers are found
in the recorded model, and which moves are symmetries is tested on its functions. Sources: ainsworth2023git, who match
by the same coordinate descent; sign flips of tanh units: chen1993geometry [recalled from the papers, not re-read].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx
from torch.func import vmap

from inference.backend import FitInfo
from inference.data import chunks, index
from inference.errors import ApproximationWarning, CapabilityError
from inference.layers import Layer
from inference.posterior import DrawsPosterior
from inference.posterior_base import Posterior
from inference.prediction import draws_per_chunk
from inference.target import Target

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_PROBE_ROWS, _PROBE_DRAWS = 20, 50
_MAX_SWEEPS = 50
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class HiddenUnits:
    """Units of one hidden layer that may be swapped.

    Attributes:
        name: Site name of the layer's weight.
        incoming: Indices into the full theta of what each unit reads, weights and bias, (H, I).
        outgoing: Indices of what the following layers read of it, (H, O).
        flips: Whether a unit may be negated as well.
    """

    name: str
    incoming: Tensor
    outgoing: Tensor
    flips: bool = False

    @property
    def size(self) -> int:
        """Number of units H."""
        return self.incoming.shape[0]

    @property
    def entries(self) -> Tensor:
        """All weights of each unit, (H, I + O)."""
        return torch.cat([self.incoming, self.outgoing], 1)

    def moved(self, theta: Tensor, order: Tensor, signs: Tensor) -> Tensor:
        """Draws with the units in another order and with other signs.

        Args:
            theta: (S, P).
            order: Unit that comes to each place, (S, H).
            signs: Sign that it is multiplied with, (S, H).

        Returns:
            (S, P).
        """
        out = theta.clone()
        num = theta.shape[0]
        for entries in (self.incoming, self.outgoing):
            values = theta[:, entries.reshape(-1)].reshape(num, *entries.shape)  # (S, H, I)
            chosen = values.gather(1, order.unsqueeze(-1).expand_as(values)) * signs.unsqueeze(-1)
            out[:, entries.reshape(-1)] = chosen.reshape(num, -1)
        return out


def align(posterior: Posterior, reference: Tensor | None = None) -> DrawsPosterior:
    """The same draws with hidden units matched to a reference, for diagnostics and moments in weight space.

    Functions are unchanged: that is checked on up to 50 draws, to 1e-6 of their size in float64 and 1e-3 in float32,
    and moves that change them (residual connections, normalisation with weights of its own) are left out with a
    warning. The aligned draws follow the posterior folded onto one copy of each function; a prior that tells units
    apart is reported.

    Args:
        posterior: Draws.
        reference: Theta to match to, (P,); the draw of highest log density by default.

    Returns:
        Aligned draws, chains and weights as before.

    Raises:
        CapabilityError: If the posterior is not made of draws of the whole theta.
        ValueError: If the reference has the wrong shape.
    """
    if not isinstance(posterior, DrawsPosterior) or not posterior.complete:
        raise CapabilityError(
            f"{posterior.backend_name} gives {posterior.kind}; only draws of all weights can be aligned"
        )
    target, flat = posterior.target, posterior.flat_draws
    if reference is not None and reference.shape != (target.dim,):
        raise ValueError(f"`reference` must have shape ({target.dim},), got {tuple(reference.shape)}")
    info = replace(posterior.info, warnings=list(posterior.info.warnings))
    groups = symmetric_units(target, target.expand(flat[:: max(1, len(flat) // _PROBE_DRAWS)][:_PROBE_DRAWS]), info)
    full = target.expand(flat)
    if groups:
        centre = _densest(target, flat) if reference is None else reference
        full = match(full, target.expand(centre.to(flat)), groups)
        _check_prior(target, flat, target.reduce(full), info)
    return DrawsPosterior(
        target,
        target.reduce(full).reshape(posterior.draws.shape),
        backend=posterior.backend,
        info=info,
        weights=posterior.weights,
        sample_stats=posterior.sample_stats,
        log_evidence=posterior.log_evidence_or_none,
    )


def match(theta: Tensor, reference: Tensor, groups: list[HiddenUnits]) -> Tensor:
    """Bring draws as near to a reference as swaps and flips allow.

    Two starts per draw, as it is and layer by layer from the inputs by incoming weights alone; each goes on to a fixed
    point, and the nearer one is kept.

    Args:
        theta: Draws, (S, full P).
        reference: (full P,).
        groups: Hidden layers from the inputs on.

    Returns:
        (S, full P).
    """
    rows = max(1, _CHUNK_ELEMENTS // max(theta.shape[1], max(g.size for g in groups) ** 2))
    return torch.cat([_match_chunk(theta[part], reference, groups) for part in chunks(len(theta), rows)])


def _match_chunk(theta: Tensor, reference: Tensor, groups: list[HiddenUnits]) -> Tensor:
    forward = theta
    for group in groups:
        forward = _assigned(forward, reference, group, group.incoming)
    best, distance = theta, torch.full(theta.shape[:1], torch.inf, dtype=theta.dtype, device=theta.device)
    for start in (theta, forward) if len(groups) > 1 else (theta,):
        found = _descend(start, reference, groups)
        new = (found - reference).square().sum(1)
        nearer = new < distance
        best, distance = torch.where(nearer.unsqueeze(1), found, best), torch.where(nearer, new, distance)
    return best


def _descend(theta: Tensor, reference: Tensor, groups: list[HiddenUnits]) -> Tensor:
    """Assign layer after layer until no draw comes nearer."""
    before = torch.full(theta.shape[:1], torch.inf, dtype=theta.dtype, device=theta.device)
    for _ in range(_MAX_SWEEPS):
        for group in groups:
            theta = _assigned(theta, reference, group, group.entries)
        now = (theta - reference).square().sum(1)
        if len(groups) == 1 or not bool((now < before * (1 - 1e-12)).any()):
            break
        before = now
    return theta


def _assigned(theta: Tensor, reference: Tensor, group: HiddenUnits, entries: Tensor) -> Tensor:
    """The best order and signs of one layer's units with all others as they are, by the products of ``entries``."""
    gain = torch.einsum("ie,sje->sij", reference[entries], theta[:, entries])
    profit = (gain.abs() if group.flips else gain).double().cpu().numpy()
    order = torch.as_tensor(np.stack([linear_sum_assignment(p, maximize=True)[1] for p in profit]), device=theta.device)
    picked = gain.gather(2, order.unsqueeze(-1)).squeeze(-1)
    signs = torch.where(picked < 0, -1.0, 1.0).to(theta) if group.flips else torch.ones_like(picked)
    return group.moved(theta, order, signs)


def symmetric_units(target: Target, theta: Tensor, info: FitInfo | None = None) -> list[HiddenUnits]:
    """Hidden layers whose units can be swapped without changing the function, found by trying it.

    Args:
        target: The model.
        theta: Draws to try it on, (S, full P).
        info: Receives the warnings, where given.

    Returns:
        The layers from the inputs on, with whether their units may be flipped too.
    """
    functions = _functions(target)
    before = functions(theta)
    generator = torch.Generator().manual_seed(0)
    found = []
    for group in hidden_units(target):
        shape = (len(theta), group.size)
        order = torch.rand(shape, generator=generator).argsort(1).to(theta.device)
        ones = torch.ones(shape, dtype=theta.dtype, device=theta.device)
        change = _change(before, functions(group.moved(theta, order, ones)))
        if change > _TOLERANCE.get(theta.dtype, 1e-3):
            _warn(
                info,
                f"the {group.size} units behind {group.name!r} are left as they are: swapping them changes the "
                f"function by {change:.1e} of its size (a residual connection, or weights per unit elsewhere)",
            )
            continue
        signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0).to(theta)
        signs[:, 0] = -1.0
        same = torch.arange(group.size, device=theta.device).expand(shape)
        flips = _change(before, functions(group.moved(theta, same, signs))) <= _TOLERANCE.get(theta.dtype, 1e-3)
        found.append(replace(group, flips=flips))
    return found


def hidden_units(target: Target) -> list[HiddenUnits]:
    """Linear layers whose outputs reach nothing but other linear layers of the same number of inputs.

    Args:
        target: The model; of a restricted one only layers whose weights are all free count.

    Returns:
        Candidates, in the order they run; whether they are symmetric is for :func:`symmetric_units` to try.
    """
    layers = {layer.node: layer for layer in target.layers}
    nodes = {n.name: n for n in target.recorded().graph.nodes if n.name in layers}
    free = target.reduce(torch.arange(target.full_dim)) if target.kept is not None else torch.arange(target.full_dim)
    found = []
    for name, layer in layers.items():
        readers = _readers(nodes[name], layers)
        if layer.kind != "linear" or not readers:
            continue
        if any(r.kind != "linear" or r.weight_shape[0] != layer.fan_out for r in readers):
            continue
        incoming = [layer.positions.T]
        if layer.bias is not None:
            incoming.append(torch.arange(layer.bias.start, layer.bias.stop).unsqueeze(1))
        if any(piece.shape[0] != layer.fan_out for piece in incoming):
            continue
        outgoing = torch.cat([r.positions for r in readers], 1)
        group = HiddenUnits(layer.name, torch.cat(incoming, 1).to(target.device), outgoing.to(target.device))
        if layer.fan_out > 1 and bool(torch.isin(group.entries.cpu(), free).all()):
            found.append(group)
    return found


def _readers(node: fx.Node, layers: dict[str, Layer]) -> list[Layer] | None:
    """Layers that a layer's output reaches first; None where it also reaches the output past them."""
    pending, seen, found = list(node.users), set(), {}
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "output":
            return None
        if user.name in layers:
            found[user.name] = layers[user.name]
        else:
            pending += user.users
    return list(found.values())


def _functions(target: Target) -> Callable[[Tensor], Tensor]:
    """All parameters of the observed distribution at some training inputs, (S, full P) to (S, n)."""
    local = bool(target.programs.traced.local_sites)
    rows = torch.linspace(0, target.num_data - 1, min(target.num_data, _PROBE_ROWS), dtype=torch.float64)
    x = target.x if local else index(target.x, rows.round().long())

    def functions(theta: Tensor) -> Tensor:
        with torch.no_grad():
            parameters = vmap(target.programs.parameters, in_dims=(0, None))(theta, x)
        return torch.cat([value.flatten(1) for value in parameters.values()], 1)

    return functions


def _change(before: Tensor, after: Tensor) -> float:
    """Largest difference, in the size of the functions."""
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))


def _densest(target: Target, flat: Tensor) -> Tensor:
    with torch.no_grad():
        size = draws_per_chunk(target.recorded())
        values = torch.cat([vmap(target.log_density)(flat[part]) for part in chunks(len(flat), size)])
    return flat[values.nan_to_num(-torch.inf).argmax()]


def _check_prior(target: Target, before: Tensor, after: Tensor, info: FitInfo) -> None:
    """Say so where aligned draws are not as likely as the original ones; their functions must be the same."""
    some = slice(None, None, max(1, len(before) // _PROBE_DRAWS))
    functions = _functions(target)
    change = _change(functions(target.expand(before[some])), functions(target.expand(after[some])))
    tolerance = _TOLERANCE.get(before.dtype, 1e-3)
    if change > tolerance:
        raise AssertionError(f"alignment changed the functions by {change:.1e} of their size")
    with torch.no_grad():
        old, new = (vmap(target.log_prior)(theta[some]) for theta in (before, after))
    shift = float((new - old).abs().max())
    if shift > max(tolerance * float(old.abs().max()), tolerance):
        _warn(
            info,
            f"the prior tells hidden units apart: alignment changes the log prior by up to {shift:.2g} nats, so the "
            "aligned draws are no draws of this posterior; read their R-hat as a distance between functions only",
        )


def _warn(info: FitInfo | None, text: str) -> None:
    if info is not None:
        info.warnings.append((ApproximationWarning.__name__, text))
    warnings.warn(text, ApproximationWarning, stacklevel=4)
