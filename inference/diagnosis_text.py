"""A diagnosis as text: one block for functions, one for weights, one line per figure of the chains, then warnings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from inference.arrays import Floats

if TYPE_CHECKING:
    from inference.diagnosis import Diagnosis, Mixing

_MAX_CHAINS = 8


def written(found: Diagnosis) -> str:
    """The report as lines of text.

    Args:
        found: The diagnosis.

    Returns:
        Text without a final line break.
    """
    lines = [f"{found.backend}: " + ("nothing to worry about found" if found.trusted else "read the warnings")]
    lines += _space("functions at probes", found.functions)
    lines += _space("weights", found.weights, found.rhat_weights_aligned)
    lines += _chains(found)
    if math.isfinite(found.khat) or found.khat == math.inf:
        lines += ["", f"  {'khat':22s} {found.khat:10.3g}   good below 0.7"]
    if found.warnings or found.notes:
        lines.append("")
    return "\n".join(lines + [f"  ! {text}" for text in found.warnings] + [f"  - {text}" for text in found.notes])


def _space(name: str, space: Mixing, aligned: Floats | None = None) -> list[str]:
    """Median and worst twentieth of each figure, and what is good."""
    errors = space.errors
    rows = [
        ("R-hat", space.rhat, 0.95, ".3f", "good below 1.01"),
        ("R-hat, units aligned", aligned, 0.95, ".3f", "good below 1.01"),
        ("nested R-hat", space.nested, 0.95, ".3f", "good below 1.1"),
        ("ESS, bulk", space.ess_bulk, 0.05, ",.0f", "good above 100 per chain"),
        ("ESS, tail", space.ess_tail, 0.05, ",.0f", "good above 100 per chain"),
        ("MCSE of the mean", errors.mean, 0.95, ".3f", "in posterior sd"),
        ("MCSE of the sd", errors.sd, 0.95, ".3f", "in posterior sd"),
        ("MCSE of 5, 95 %", errors.quantile, 0.95, ".3f", "in posterior sd"),
    ]
    lines = []
    for label, values, worst, form, good in rows:
        finite = np.array([]) if values is None else values[np.isfinite(values)]
        if finite.size:
            figures = "".join(f"{np.quantile(finite, q):>11{form}}" for q in (0.5, worst))
            lines.append(f"  {label:22s}{figures}   {good}")
    return ["", f"  {name:22s}{'median':>11s}{'worst 5 %':>11s}", *lines] if lines else []


def _chains(found: Diagnosis) -> list[str]:
    """One line per figure, one column per chain (of the first eight)."""
    rows = [
        ("divergences", found.chain_divergences, "0 is good"),
        ("acceptance", found.acceptance, ""),
        ("step size", found.step_size, ""),
        ("BFMI", found.bfmi, "good above 0.3"),
    ]
    present = [(label, values, good) for label, values, good in rows if values is not None]
    if not present:
        return []
    num = len(present[0][1])
    shown = min(num, _MAX_CHAINS)
    title = f"chain (first {shown} of {num})" if num > shown else "chain"
    lines = ["", f"  {title:22s} " + "".join(f"{i:>10d}" for i in range(shown))]
    for label, values, good in present:
        cells = "".join(f"{_number(float(v)):>10s}" for v in values[:shown])
        lines.append(f"  {label:22s} {cells}   {good}".rstrip())
    if found.depth_saturated is not None:
        lines.append(f"  {'at full tree depth':22s} {found.depth_saturated:>10.0%}   of all draws; good below 10 %")
    return lines


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.95 else f"{value:.3f}"
