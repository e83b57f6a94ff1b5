"""Targets with some of theta fixed: whole sites by name, or single entries."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import constraints

from inference.sites import Site

if TYPE_CHECKING:
    from inference.target import Target

# Supports whose bijection maps every entry on its own.
_ENTRYWISE = (constraints.real, constraints.positive, constraints.nonnegative, constraints.unit_interval)


def restrict_to_sites(target: Target, sites: str | Sequence[str], at: Tensor) -> Target:
    """Keep the sites that match a pattern free.

    Args:
        target: An unrestricted target.
        sites: Site name pattern(s), as in ``fnmatch``.
        at: Full theta that supplies the fixed values, (full P,).

    Returns:
        Target over the matching sites only.

    Raises:
        ValueError: If the target is restricted already, a pattern matches nothing or ``at`` has the wrong length.
    """
    _check(target, at)
    kept, chosen, start = [], [], 0
    for site in matching(target.all_sites, sites):
        kept.append((site.start, site.stop))
        chosen.append(replace(site, start=start, stop=start + site.size))
        start += site.size
    return replace(target, sites=tuple(chosen), kept=tuple(kept), entries=None, at=at.detach())


def restrict_to_entries(target: Target, entries: Tensor, at: Tensor) -> Target:
    """Keep some entries of theta free.

    Args:
        target: An unrestricted target.
        entries: Positions in the full theta, (k,), in any order, each once.
        at: Full theta that supplies the fixed values, (full P,).

    Returns:
        Target over those entries, ascending. Sites held in part are vectors of the entries held.

    Raises:
        ValueError: If the target is restricted already, an entry is out of range, repeated or part of a site that has
            no meaning in part, or ``at`` has the wrong length.
    """
    _check(target, at)
    index = entries.detach().to("cpu", torch.long).flatten().sort().values
    if not len(index) or bool((index.diff() == 0).any()) or int(index[0]) < 0 or int(index[-1]) >= target.full_dim:
        raise ValueError(
            f"`entries` must be distinct positions in a theta of length {target.full_dim}, at least one, got "
            f"{index.tolist()[:10]}"
        )
    chosen, start = [], 0
    for site in target.all_sites:
        size = int(((index >= site.start) & (index < site.stop)).sum())
        if size:
            part = site if size == site.size else _part(site, size)
            chosen.append(replace(part, start=start, stop=start + size))
            start += size
    ends = (index.diff() != 1).nonzero()[:, 0].tolist()  # where a run of neighbours ends
    starts = [0, *(end + 1 for end in ends)]
    runs = [(int(index[a]), int(index[b]) + 1) for a, b in zip(starts, [*ends, len(index) - 1], strict=True)]
    return replace(target, sites=tuple(chosen), kept=tuple(runs), entries=index.to(target.device), at=at.detach())


def matching(sites: Sequence[Site], patterns: str | Sequence[str]) -> list[Site]:
    """Sites whose names match a pattern.

    Args:
        sites: All of them.
        patterns: One or several, as in ``fnmatch``.

    Returns:
        Those that match, in their order.

    Raises:
        ValueError: If a pattern matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [site.name for site in sites]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no site matches {pattern!r}; the model has {names}")
    return [site for site in sites if any(fnmatch.fnmatchcase(site.name, p) for p in patterns)]


def is_entrywise(site: Site) -> bool:
    """Whether a site means something in part: every entry has a prior and a bijection of its own."""
    return _base_support(site) in _ENTRYWISE


def _part(site: Site, size: int) -> Site:
    if not is_entrywise(site):
        raise ValueError(
            f"site {site.name!r} has the support {site.support}, whose entries mean nothing alone: choose all of its "
            f"{site.size} entries or none"
        )
    support: Any = constraints.independent(_base_support(site), 1)
    return replace(site, shape=(size,), unconstrained_shape=(size,), support=support, event_dim=1, plates=())


def _base_support(site: Site) -> Any:
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _check(target: Target, at: Tensor) -> None:
    if target.kept is not None:
        raise ValueError("this target is restricted already; restrict the full one")
    if at.shape != (target.full_dim,):
        raise ValueError(f"`at` must have shape ({target.full_dim},), got {tuple(at.shape)}")
