"""What in a run of chains is a reason not to believe it: sentences with the number and the remedy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from inference.arrays import Floats

RHAT_LIMIT, RHAT_STRICT = 1.1, 1.01
BFMI_LIMIT = 0.3
ESS_PER_CHAIN = 100
# Draws of a chain that split R-hat needs, and chains from which groups of them are compared instead.
MIN_DRAWS, MANY_CHAINS = 4, 16
SATURATION_LIMIT = 0.1
_TOLERATED_SHARE = 0.05
_ACCEPTANCE_ROOM = 0.15
_LOW_ACCEPTANCE = 0.4
_STEP_RATIO = 5.0


def mixing_signs(what: str, rhat: Floats, *, nested: bool = False) -> list[str]:
    """Whether chains disagree.

    Args:
        what: What was compared, as in "R-hat of the predictions is ...".
        rhat: One figure per scalar.
        nested: Whether it is the nested R-hat of many short chains.

    Returns:
        At most one sentence.
    """
    finite = rhat[~np.isnan(rhat)]
    name = "nested R-hat" if nested else "R-hat"
    for limit, text in (
        (RHAT_LIMIT, "the chains disagree; run longer, or read their spread as model uncertainty"),
        (RHAT_STRICT, "good enough for a plot, not for a second digit; run longer"),
    ):
        share = float((finite > limit).mean()) if finite.size else 0.0
        if share > _TOLERATED_SHARE:
            worst = "inf" if np.isinf(finite).any() else f"{np.quantile(finite, 0.95):.3g}"
            return [f"{name} of the {what} is above {limit} at {share:.0%} of them (95 % quantile {worst}): {text}"]
        if nested:  # a few draws per chain cannot show 1.01
            return []
    return []


def single_chain_signs(chains: int) -> list[str]:
    """Whether there is no second chain to compare with.

    Args:
        chains: Number of chains C.

    Returns:
        At most one sentence.
    """
    if chains > 1:
        return []
    return ["one chain cannot show whether it has mixed: R-hat compares chains; run at least 2, better 4"]


def refuse_one_chain(chains: int, allowed: bool) -> None:
    """Raise where a single chain is asked for, unless that is meant.

    Args:
        chains: Number of chains C.
        allowed: Whether it is meant.

    Raises:
        ValueError: If there is one chain and it is not allowed.
    """
    if chains == 1 and not allowed:
        raise ValueError(
            "`num_chains`=1: R-hat compares chains, so that one alone cannot show whether it has mixed; run at least "
            "2, better 4, or set `allow_one_chain=True` to have one and be warned"
        )


def size_signs(what: str, bulk: Floats, tail: Floats, chains: int, length: int) -> list[str]:
    """Whether there are too few effective draws for means and tails.

    Args:
        what: What was estimated.
        bulk: Bulk effective sample sizes.
        tail: Tail effective sample sizes.
        chains: Number of chains C.
        length: Draws per chain S.

    Returns:
        At most one sentence.
    """
    smaller = np.minimum(bulk, tail)
    finite = smaller[np.isfinite(smaller)]
    share = float((finite < ESS_PER_CHAIN * chains).mean()) if finite.size else 0.0
    if share <= _TOLERATED_SHARE:
        return []
    lowest, total = float(np.quantile(finite, 0.05)), chains * length
    needed = length * ESS_PER_CHAIN * chains / max(lowest, 1.0)
    return [
        f"bulk or tail ESS of the {what} is below {ESS_PER_CHAIN} per chain at {share:.0%} of them (5 % quantile "
        f"{lowest:.0f} of {total} draws): standard deviations and quantiles are rough; about {_round(needed)} draws "
        "per chain would do"
    ]


def energy_signs(bfmi: Floats) -> list[str]:
    """Whether momentum refreshment explores the energies too slowly.

    Args:
        bfmi: One figure per chain, (C,).

    Returns:
        At most one sentence.
    """
    low = np.flatnonzero(bfmi < BFMI_LIMIT)
    if not low.size:
        return []
    return [
        f"BFMI is {np.nanmin(bfmi):.2f} (limit {BFMI_LIMIT}) in {_chains(low)}: energies are explored slowly, as with "
        "heavy tails or scales that are learnt; reparameterise, or run longer"
    ]


def acceptance_signs(acceptance: Floats, target: float | None) -> list[str]:
    """Whether chains accept much less or much more than warm-up aimed at.

    Args:
        acceptance: Mean acceptance statistic per chain, (C,).
        target: What warm-up aimed at; None where nothing was adapted.

    Returns:
        Up to two sentences.
    """
    found = []
    low = np.flatnonzero(acceptance < (_LOW_ACCEPTANCE if target is None else target - _ACCEPTANCE_ROOM))
    aim = "" if target is None else f" where warm-up aimed at {target:g}"
    if low.size:
        remedy = "lower `step_size`" if target is None else "warm up longer, or raise `target_accept`"
        found.append(
            f"acceptance is {np.nanmin(acceptance):.2f} in {_chains(low)}{aim}: the steps are too large for where the "
            f"chain ended up; {remedy}"
        )
    high = np.flatnonzero(acceptance > min(0.995, (target or 1.0) + 2 * _ACCEPTANCE_ROOM))
    if target is not None and high.size:
        found.append(
            f"acceptance is {np.nanmax(acceptance):.2f} in {_chains(high)}{aim}: the steps are smaller than need be, "
            "which costs time; warm up longer"
        )
    return found


def step_size_signs(step_size: Floats) -> list[str]:
    """Whether chains settled on very different step sizes.

    Args:
        step_size: Mean step size per chain, (C,).

    Returns:
        At most one sentence.
    """
    low, high = float(np.nanmin(step_size)), float(np.nanmax(step_size))
    if not low > 0 or high <= _STEP_RATIO * low:
        return []
    return [
        f"step sizes differ {high / low:.0f}-fold between chains ({low:.2g} to {high:.2g}): the chains are in regions "
        "of different curvature, or one is stuck; compare their log densities"
    ]


def saturation_signs(share: float, limit: int) -> list[str]:
    """Whether trajectories end for their depth.

    Args:
        share: Share of draws whose tree reached the limit.
        limit: The limit.

    Returns:
        At most one sentence.
    """
    if share <= SATURATION_LIMIT:
        return []
    return [
        f"{share:.0%} of the draws hit max_tree_depth={limit}: they are more correlated than they need be; raise it, "
        "or reparameterise"
    ]


def divergence_signs(count: int, total: int) -> list[str]:
    """Whether trajectories diverged.

    Args:
        count: Number of divergent draws.
        total: Number of draws.

    Returns:
        At most one sentence.
    """
    if not count:
        return []
    return [
        f"{count} of {total} draws diverged: the sampler missed regions of high curvature; raise `target_accept`, or "
        "reparameterise"
    ]


def khat_signs(khat: float) -> list[str]:
    """Whether an approximation misses mass of the posterior.

    Args:
        khat: Tail index of the importance ratios.

    Returns:
        At most one sentence.
    """
    if khat == math.inf:
        return ["k-hat cannot be computed: the model's density is not finite where the approximation has mass"]
    if not khat > 0.7:
        return []
    return [
        f"k-hat is {khat:.2f} (limit 0.7): the approximation misses mass of the posterior; with more than a thousand "
        "weights this is so for every Gaussian, so compare predictions with a NUTS reference instead"
    ]


def per_chain(stats: dict[str, Any], name: str) -> Floats | None:
    """Mean of a sample statistic over the draws of each chain, (C,), where it was recorded."""
    if name not in stats:
        return None
    return np.asarray(stats[name].double().mean(1).cpu())


def _chains(which: np.ndarray) -> str:
    """Chains by number, from 0."""
    listed = ", ".join(str(int(i)) for i in which[:8]) + (", ..." if len(which) > 8 else "")
    return f"chain{'s' if len(which) > 1 else ''} {listed}"


def _round(value: float) -> str:
    """A number of draws to two digits."""
    digits = 10.0 ** max(0, math.floor(math.log10(max(value, 1.0))) - 1)
    return f"{math.ceil(value / digits) * digits:,.0f}"
