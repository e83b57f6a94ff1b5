"""Write docs/sampler_benchmarks.md from the JSON files: `python -m benchmarks.samplers.page`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import norm

from benchmarks.report import digits, load
from benchmarks.samplers.posteriors import POSTERIORS

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "samplers", ROOT / "docs" / "sampler_benchmarks.md"
REFERENCE = "NumPyro NUTS, 4 chains"
# Trees long enough to turn, where there are such: only draws that have mixed can be agreed with.
LONG_REFERENCE = "NumPyro NUTS, 4 chains, depth 9"

INTRODUCTION = """# Samplers

<!-- Written by `python -m benchmarks.samplers.page` from benchmarks/results/samplers/; change those, not this page. -->

Our samplers and the peers' on the same posteriors. Every contestant is a process of its own and fits in turn with the
others. NUTS has the same warm-up and number of draws (1,000 and 1,000 a chain) and the same greatest tree depth
everywhere (6 for networks on tables, 8 for the gap, 10 else); the other samplers run at the lengths that the files
list, else at their defaults. A gradient is one pass over all data for one chain. ESS is the bulk effective sample size
of function values (outputs at test inputs, or the parameters), the median over functions, of all chains together; R-hat
is its 95 % quantile. "Sampling" leaves recording and compiling out; "first fit" is the first in a fresh process with
everything but imports in it. Figures are **median [smallest-largest]** over the later fits (the first where there is no
other). A chain that has not mixed flatters its own ESS: read it with R-hat (of the halves of one chain where there is
only one).

On posteriors of a dozen parameters a leapfrog of ours is the call of a compiled program, 10 to 20 us whatever it
computes; NumPyro's and BlackJAX's chains are one program as a whole and win there once it is compiled, in steady state
and not in a first fit. On networks the arithmetic decides.
"""


@dataclass(frozen=True)
class Goal:
    """A ratio that is aimed at on the energy posterior.

    Attributes:
        text: What is compared.
        ours: Labels of ours; the best of them counts.
        peer: Label of the peer.
        figure: Figure of a fit; larger is better.
        first: First fits instead of all.
        least: The aim.
    """

    text: str
    ours: tuple[str, ...]
    peer: str
    figure: Callable[[dict[str, Any]], float]
    first: bool
    least: float


def _rate(fit: dict[str, Any]) -> float:
    return fit["ess_per_second"]


def _whole_rate(fit: dict[str, Any]) -> float:
    return fit["ess_per_second_whole"]


_ALL_OURS = ("NUTS, 1 chains", "NUTS, 4 chains", "NUTS, 8 chains", "MCLMC, 4 chains", "ChEESHMC, 16 chains")
GOALS = (
    Goal("NUTS, 4 chains / Pyro: ESS/s, first fit", ("NUTS, 4 chains",), "Pyro NUTS, 1 chain", _whole_rate, True, 10),
    Goal("NUTS, 4 chains / Pyro: ESS/s, sampling", ("NUTS, 4 chains",), "Pyro NUTS, 1 chain", _rate, False, 15),
    Goal(
        "NUTS / NumPyro, 1 chain: gradients/s, sampling",
        ("NUTS, 1 chains",),
        "NumPyro NUTS, 1 chains",
        lambda fit: 1 / fit["us_per_gradient"],
        False,
        1,
    ),
    Goal("NUTS / NumPyro, 4 chains: ESS/s, sampling", ("NUTS, 4 chains",), REFERENCE, _rate, False, 1.2),
    Goal("NUTS / NumPyro, 8 chains: ESS/s, sampling", ("NUTS, 8 chains",), "NumPyro NUTS, 8 chains", _rate, False, 1.2),
    Goal(
        "NUTS / NumPyro, 1 chain: speed of the first fit",
        ("NUTS, 1 chains",),
        "NumPyro NUTS, 1 chains",
        lambda fit: 1 / fit["seconds"],
        True,
        1,
    ),
    Goal("best of ours / NumPyro, 4 chains: ESS/s, sampling", _ALL_OURS, REFERENCE, _rate, False, 3),
)


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: What `python -m benchmarks.samplers` wrote, one for each posterior and number of threads.

    Returns:
        Markdown.
    """
    order = list(POSTERIORS)
    parts = [INTRODUCTION]
    for record in sorted(records, key=lambda r: (r["threads"], order.index(r["posterior"]))):
        threads = "" if record["threads"] == 1 else f", {record['threads']} threads"
        parts.append(f"## {record['title']}{threads}\n")
        parts.append(_table(record))
        if record["posterior"] == "energy":
            parts.append(_goals(record))
        parts += [f"Not run: {label} ({reason}).\n" for label, reason in record["not_run"].items()]
        parts.append(_agreement(record))
        if record["note"]:
            parts.append(f"{record['note']}\n")
        env = record["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        parts.append(f"*{env['processor']}, {record['threads']} thread(s), Python {env['python']}, {versions}.*\n")
    return "\n".join(parts)


def _table(record: dict[str, Any]) -> str:
    lines = [
        "| | us per gradient | gradients, million | ESS | ESS/s, sampling | ESS/s, first fit | first fit, s "
        "| ESS per 1,000 gradients | R-hat |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for contestant in record["contestants"]:
        first, fits = contestant["fits"][0], _later(contestant["fits"])
        cells = [
            _spread(fits, "us_per_gradient"),
            _spread(fits, "gradients", 1e-6),
            _spread(fits, "ess"),
            _spread(fits, "ess_per_second"),
            digits(first["ess_per_second_whole"]),
            digits(first["seconds"]),
            _spread(fits, "ess_per_gradient", 1e3),
            f"{median(f['rhat'] for f in fits):.2f}",
        ]
        lines.append(f"| {contestant['label']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _goals(record: dict[str, Any]) -> str:
    fits = {c["label"]: c["fits"] for c in record["contestants"]}
    lines = ["| ratio | | goal |", "|---|---|---|"]
    for goal in GOALS:
        ours = [label for label in goal.ours if label in fits]
        if not ours or goal.peer not in fits:
            continue

        def values(label: str, goal: Goal = goal) -> list[float]:
            return [goal.figure(f) for f in (fits[label][:1] if goal.first else _later(fits[label]))]

        best = max(ours, key=lambda label: median(values(label)))
        # Seeds are independent: a ratio is of medians, its range of the extremes.
        mine, theirs = values(best), values(goal.peer)
        ratio = median(mine) / median(theirs)
        spread = f"{digits(ratio)} [{digits(min(mine) / max(theirs))}-{digits(max(mine) / min(theirs))}]"
        which = f" ({best})" if len(goal.ours) > 1 else ""
        verdict = "reached" if ratio >= goal.least else "missed"
        lines.append(f"| {goal.text}{which} | {spread} | at least {goal.least:g}: {verdict} |")
    return "\n".join([*lines, ""])


def _agreement(record: dict[str, Any]) -> str:
    fits = {c["label"]: c["fits"] for c in record["contestants"]}
    reference = next((label for label in (LONG_REFERENCE, REFERENCE) if label in fits), None)
    if reference is None or len(fits) == 1:
        return ""
    theirs = _moments(fits[reference])
    # Of as many standard normal numbers one is larger in one comparison of twenty.
    limit = norm.isf(0.05 / (2 * 2 * len(theirs.mean)))
    lines = [
        f"Compared with {reference}, at {len(theirs.mean)} function values. Differences are in their common "
        f"Monte-Carlo standard errors: the largest of as many independent ones stays below {limit:.1f} nineteen times "
        "out of twenty. Errors of chains that have not mixed are larger than they look.\n",
        "| | largest difference of means | of standard deviations | of means, in posterior sd | ratios of sd |",
        "|---|---|---|---|---|",
    ]
    for label in fits:
        if label == reference:
            continue
        ours = _moments(fits[label])
        shift, ratio = np.abs(ours.mean - theirs.mean), ours.sd / theirs.sd
        of_mean = np.max(shift / np.hypot(ours.mean_error, theirs.mean_error))
        of_sd = np.max(np.abs(ours.sd - theirs.sd) / np.hypot(ours.sd_error, theirs.sd_error))
        lines.append(
            f"| {label} | {of_mean:.1f} | {of_sd:.1f} | {np.max(shift / theirs.sd):.2f} "
            f"| {np.min(ratio):.2f}-{np.max(ratio):.2f} |"
        )
    return "\n".join([*lines, ""])


def _later(fits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return fits[1:] or fits


@dataclass(frozen=True)
class _Moments:
    """Means and standard deviations of the judged functions over all fits, with their standard errors, (F,) each."""

    mean: np.ndarray
    sd: np.ndarray
    mean_error: np.ndarray
    sd_error: np.ndarray


def _moments(fits: Sequence[dict[str, Any]]) -> _Moments:
    mean = np.mean([f["mean"] for f in fits], axis=0)
    square = np.mean([np.square(f["sd"]) + np.square(f["mean"]) for f in fits], axis=0)
    errors = [
        np.sqrt(np.mean(np.square([f[name] for f in fits]), 0) / len(fits)) for name in ("mean_error", "sd_error")
    ]
    return _Moments(mean, np.sqrt(square - mean**2), *errors)


def _spread(fits: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> str:
    values = [scale * f[name] for f in fits if f[name] is not None]
    if not values:
        return ""
    if len(values) == 1:
        return digits(values[0])
    return f"{digits(median(values))} [{digits(min(values))}-{digits(max(values))}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the files and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write (docs/sampler_benchmarks.md)")
    options = parser.parse_args(arguments)
    options.out.write_text(render(load(options.results)))


if __name__ == "__main__":
    main()
