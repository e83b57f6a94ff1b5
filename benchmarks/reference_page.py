"""Write docs/uci_reference.md from the records: `python -m benchmarks.reference_page`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.published import DEEP_ENSEMBLE_5, MCD_GRID, PUBLISHED, Published
from benchmarks.reference import RESULTS
from benchmarks.report import write_page

PAGE = Path(__file__).parent.parent / "docs" / "uci_reference.md"
ORDER = ("energy", "yacht", "concrete", "boston", "wine")
ROWS = ("map", "dense_laplace", "kronecker_laplace", "deep_ensemble", "hmc", "nuts", "chees_hmc", "mclmc", "mile")
CHAINS = ("hmc", "nuts", "chees_hmc", "mclmc", "mile")

INTRODUCTION = """# UCI reference

<!-- Written by `python -m benchmarks.reference_page` from benchmarks/results/reference/; change those instead. -->

Long runs of exact samplers on the standard splits, beside the mode, Laplace approximations at it, an ensemble and the
published tables. One hidden
layer of 50 units; inputs and targets are standardised on the training part; the noise is learnt. Test log-likelihood
is that of the predictive mixture, nats per row in original units, higher is better; coverage is the share of test rows
inside the central interval. Figures are **mean ± standard error over splits**; one split has no error. "Mixed" is the
share of test inputs at which the chains agree (R-hat of the function below 1.1): where it is well below 1, the row is
not a reference but what the sampler found in its budget. Gradients are passes over the training part, of all chains or
members together. The settings are the same on every data set, nothing is tuned.

`python -m benchmarks.reference` makes the records that are missing.
"""


@dataclass(frozen=True)
class Expectation:
    """Something that the rows above are held to.

    Attributes:
        text: What is expected.
        verdict: "reached", "missed" or "open", with the figures.
    """

    text: str
    verdict: str


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: What `benchmarks.reference` wrote.

    Returns:
        Markdown.
    """
    done = [r for r in records if "scores" in r]
    parts = [INTRODUCTION]
    for data in (name for name in ORDER if any(r["data"] == name for r in records)):
        parts.append(_data_set(data, [r for r in done if r["data"] == data]))
    failed = [r for r in records if "failed" in r]
    if failed:
        parts.append("## Not finished\n")
        parts += [f"- {r['data']}, split {r['split']}, {r['backend']}: {r['failed']}." for r in failed]
        parts.append("")
    parts += ["## Expectations\n", "| expected | found |", "|---|---|"]
    parts += [f"| {e.text} | {e.verdict} |" for e in expectations(done)]
    parts += ["", "## Sources of the published rows\n", "| row | source | note | ± |", "|---|---|---|---|"]
    parts += [f"| {p.name} | {p.source} | {p.note} | {p.spread} |" for p in PUBLISHED]
    parts += ["", *_how(records)]
    return "\n".join(parts)


def _data_set(data: str, records: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"## {data}\n",
        "| | log-likelihood | RMSE | 50 % coverage | 90 % coverage | mixed | splits | 1000 gradients | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        mine = [r for r in records if r["backend"] == name]
        if not mine:
            continue
        mixed = [r["mixing"]["share_below_1.1"] for r in mine if r["mixing"]]
        cells = (
            name,
            spread([-r["scores"]["nll"] for r in mine], 3),
            spread([r["scores"]["rmse"] for r in mine], 3),
            spread([r["scores"]["coverage_50"] for r in mine], 2),
            spread([r["scores"]["coverage_90"] for r in mine], 2),
            spread(mixed, 2) if mixed and None not in mixed else "",
            ", ".join(str(r["split"]) for r in sorted(mine, key=lambda r: r["split"])),
            f"{mean(r['gradients'] for r in mine) / 1000:,.0f}",
            f"{mean(r['seconds'] for r in mine):,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for published in PUBLISHED:
        figures = (_published(published.log_likelihood, data), _published(published.rmse, data))
        lines.append(f"| *{published.name}* | {' | '.join(figures)} | | | | published | | |")
    return "\n".join([*lines, ""])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard error, to some digits."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def _published(figures: Any, data: str) -> str:
    if data not in figures:
        return ""
    value, spread = figures[data]
    return f"{value:g}" if spread is None else f"{value:g} ± {spread:g}"


def expectations(records: Sequence[dict[str, Any]]) -> list[Expectation]:
    """What the tables are held to, with verdicts on what has been run.

    Args:
        records: Finished records.

    Returns:
        The expectations.
    """
    found = []
    for name in CHAINS:
        mine = [r for r in records if r["backend"] == name]
        if not mine:
            continue
        found.append(_against(mine, name, MCD_GRID, _itself))
        coverage = _by_data(mine, lambda r: r["scores"]["coverage_90"])
        outside = {data: c for data, c in coverage.items() if not 0.85 <= c <= 0.95}
        listed = "; ".join(f"{data} {c:.3f}" for data, c in outside.items())
        verdict = f"missed: {listed}" if outside else f"reached on all {len(coverage)} sets run"
        found.append(Expectation(f"{name}: 90 % intervals cover 85-95 % on every set", verdict))
        mixing = _by_data(mine, lambda r: r["mixing"]["share_below_1.1"] or 0.0)
        low = "; ".join(f"{data} {share:.2f}" for data, share in mixing.items() if share < 0.95)
        verdict = f"missed: {low}" if low else f"reached on all {len(mixing)} sets run"
        found.append(Expectation(f"{name}: chains agree at 95 % of the test inputs", verdict))
    ensembles = [r for r in records if r["backend"] == "deep_ensemble"]
    if ensembles:
        found.append(_against(ensembles, "deep_ensemble", DEEP_ENSEMBLE_5, _less_one_error))
    return found


def _itself(value: float, _: float | None) -> float:
    return value


def _less_one_error(value: float, deviation: float | None) -> float:
    """The published spread is the standard deviation over 20 splits."""
    return value - (deviation or 0.0) / math.sqrt(20)


def _against(
    records: Sequence[dict[str, Any]], name: str, published: Published, bar: Callable[[float, float | None], float]
) -> Expectation:
    """Log-likelihood at or above a published one, on 6 of the 9 data sets of the tables."""
    ours = _by_data(records, lambda r: -r["scores"]["nll"])
    bars = {data: bar(*published.log_likelihood[data]) for data in ours}
    won = [data for data in ours if ours[data] >= bars[data]]
    lost = [f"{data} {ours[data]:.3f} below {bars[data]:.3f}" for data in ours if data not in won]
    text = f"{name}: log-likelihood at least that of {published.name}, on 6 of the 9 sets of the tables"
    if published is DEEP_ENSEMBLE_5:
        text = f"{name}: log-likelihood at least that of {published.name} less one standard error, on every set"
        verdict = "missed" if lost else "reached"
    else:
        verdict = "reached" if len(won) >= 6 else "open, only these were run" if 9 - len(lost) >= 6 else "missed"
    lost_text = f"; below on {'; '.join(lost)}" if lost else ""
    return Expectation(text, f"{verdict}: {len(won)} of {len(ours)} sets run{lost_text}")


def _by_data(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """Mean over splits, by data set."""
    return {
        data: mean(value(r) for r in records if r["data"] == data)
        for data in ORDER
        if any(r["data"] == data for r in records)
    }


def _how(records: Sequence[dict[str, Any]]) -> list[str]:
    """Settings of every backend, and versions."""
    lines = ["## How\n"]
    for name in ROWS:
        for settings in sorted({r["settings"] for r in records if r["backend"] == name}):
            lines.append(f"- `{settings}`")
    starts = sorted({r["start"] for r in records if r["start"] != "its own"})
    lines += [f"- Chains start at the members of `{start}`." for start in starts]
    models = sorted({f"{r['model']['activation']}, prior `{r['model']['prior']}`" for r in records})
    lines += [f"- Units: {model}; noise: HalfNormal(1) prior on its standard deviation." for model in models]
    environments = sorted({environment(r["environment"]) for r in records})
    lines += [f"- {text}." for text in environments]
    busiest = max((max(r["load"]) for r in records if "load" in r), default=0.0)
    lines += [f"- Load of the machine while these ran: up to {busiest:g} runnable processes; seconds say little.", ""]
    return lines


def environment(env: dict[str, Any]) -> str:
    """Processor and versions of a record, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{env['processor']}, {env['threads']} thread, Python {env['python']}, {versions}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the records and write the page."""
    source = "python -m benchmarks.reference"
    write_page(render, arguments, description=__doc__, results=RESULTS, page=PAGE, source=source)


if __name__ == "__main__":
    main()
