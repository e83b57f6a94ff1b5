"""Write docs/uci_laplace.md from the records: `python -m benchmarks.uci_laplace_page`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import norm

from benchmarks.reference_page import Expectation, environment, spread
from benchmarks.report import write_page
from benchmarks.uci_laplace import GAP_ROWS, RESULTS, ROWS
from bnn_zoo.distance import Figures, distance, noise_floor
from bnn_zoo.evaluate import LEVELS, Arrays

Record = dict[str, Any]
Verdict = tuple[bool, str]

PAGE = Path(__file__).parent.parent / "docs" / "uci_laplace.md"
ORDER = ("energy", "yacht", "concrete", "boston", "wine", "naval")
LAPLACE = ("last_layer", "kronecker", "dense", "dense_refitted", "sampled_em", "dense_declared")
# The evidence of a last layer is conditional on the other weights, and draws have none.
WITHOUT_EVIDENCE = ("map", "sampled_em", "deep_ensemble", "nuts")

INTRODUCTION = """# Laplace on UCI data

<!-- Written by `python -m benchmarks.uci_laplace_page` from benchmarks/results/uci_laplace/; change those instead. -->

Laplace approximations whose prior and noise were chosen by their own evidence, beside the mode and NUTS. One hidden
layer of 50 tanh units, inputs and targets standardised on the training part, prior `normal:fan_in`. All Laplace rows
predict with the network linearised at the mode. Figures are **mean ± standard error over splits**; one split has no
error.

- **map**: the mode of the declared model; the noise, HalfNormal(1), is learnt with it.
- **last_layer, kronecker, dense**: the noise known, at first that of the mode; a Laplace approximation at the mode
  under it, then `tune_prior(noise=True)` with one precision for each weight and each bias. For the last layer only its
  own precisions are chosen.
- **dense_refitted**: as dense, then twice more: the mode under the prior and noise chosen, and the choice there.
- **sampled_em**: `SampledLaplace` at the same mode; noise and one factor of the declared precisions by
  expectation-maximisation on 16 draws.
- **dense_declared**: the model of MAP and NUTS as declared, noise a part of theta; nothing is chosen.
- **deep_ensemble**: five modes, for the gap splits.
- **nuts**: four chains of the declared model, each from a network trained on its own, ended by a limit in seconds.

Test log-likelihood is that of the predictive distribution, nats per row in original units, higher is better; RMSE in
original units; coverage is the share of test rows inside the central interval. "W1 to NUTS" is the Wasserstein distance
between the predictive distributions at a test input, in the units of the target, averaged; "variance / NUTS's" the
median ratio of predictive variances. Both are computed from mean and standard deviation, as if predictions were Normal,
on the splits where NUTS was run; in the row of NUTS itself they compare the two halves of its chains, and nothing
smaller than that means anything. NUTS samples the declared model, so a row whose prior was chosen may be farther from
it and yet predict better. "Mixed" is the share of test inputs at which the chains agree (R-hat of the function below
1.1): where it is well below 1, NUTS is no reference. Log evidence is in nats, for standardised targets, and compares
the priors of one structure; that of the last layer is conditional on the other weights. CPU seconds of a row that
starts at the mode do not include those of the mode (row map). Nothing is tuned by hand, and the settings are the same
on every data set.
"""

GAPS = """## Gap splits

Gap split j trains without the rows whose feature j lies in its middle third, and tests on them (Foong et al. 2019,
"'In-Between' Uncertainty in Bayesian Neural Networks" [recalled from the paper, not re-read]): error bars must widen
between two clusters of data. Criterion: a row **does not fail** where its log-likelihood in the gaps is at least that
of MAP less one standard error (of the difference, over gaps). "Below MAP" counts the gaps in which it is below MAP less
one standard error over the test rows; "below a constant" those in which it is worse than the mean and standard
deviation of the training targets, predicted everywhere: that is a catastrophe whoever else has it. Gaps that hold back
the same rows are run once: in energy features 0 and 1 determine each other, and in naval only gaps 0, 7, 8, 14 and 15
differ.
"""


def render(records: Sequence[Record]) -> str:
    """The page.

    Args:
        records: What `benchmarks.uci_laplace` wrote.

    Returns:
        Markdown.
    """
    done = [r for r in records if "scores" in r]
    standard = [r for r in done if not is_gap(r)]
    gaps = [r for r in done if is_gap(r)]
    parts = [INTRODUCTION]
    parts += [_standard(data, mine) for data, mine in by_data(standard)]
    if gaps:
        parts.append(GAPS)
        parts += [_gaps(data, mine, [r for r in standard if r["data"] == data]) for data, mine in by_data(gaps)]
    parts += ["## Expectations\n", "| expected | found |", "|---|---|"]
    parts += [f"| {e.text} | {e.verdict} |" for e in expectations(done)]
    failed = [r for r in records if "failed" in r]
    if failed:
        parts.append("\n## Not finished\n")
        parts += [f"- {r['data']}, split {r['split']}, {r['backend']}: {r['failed']}." for r in failed]
    return "\n".join([*parts, "", *_how(done)])


def is_gap(record: Record) -> bool:
    """Whether a record is of a gap split."""
    return str(record["split"]).startswith("gap")


def by_data(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records by data set, in the order of the page."""
    each = [(name, [r for r in records if r["data"] == name]) for name in ORDER]
    return [(name, mine) for name, mine in each if mine]


def predictions(record: Record) -> Arrays:
    """The arrays that a distance needs, from the moments in a record: quantiles are those of Normal distributions.

    Args:
        record: Of a standard split.

    Returns:
        Arrays by name, original units.
    """
    arrays = {name: np.array(values, dtype=np.float64) for name, values in record["predictions"].items()}
    levels = norm.ppf(LEVELS)[:, None]
    for half in ("", "half0_", "half1_"):
        if f"{half}mean" in arrays:
            arrays[f"{half}quantiles"] = arrays[f"{half}mean"] + arrays[f"{half}stddev"] * levels
    return arrays


def distances(records: Sequence[Record]) -> dict[str, dict[int, Figures]]:
    """How far each row is from NUTS on each split that has both; for NUTS, how far the halves of its chains are apart.

    Args:
        records: Of the standard splits of one data set.

    Returns:
        Figures of `bnn_zoo.distance.distance` by row and split.
    """
    reference = {r["split"]: predictions(r) for r in records if r["backend"] == "nuts"}
    found: dict[str, dict[int, Figures]] = {row: {} for row in ROWS}
    for r in records:
        if r["split"] not in reference:
            continue
        nuts = reference[r["split"]]
        figures = noise_floor(nuts) if r["backend"] == "nuts" else distance(predictions(r), nuts)
        if figures:
            found[r["backend"]][r["split"]] = figures
    return found


def _standard(data: str, records: Sequence[Record]) -> str:
    lines = [
        f"## {data}\n",
        "| | log-likelihood | RMSE | 50 % | 90 % | W1 to NUTS | variance / NUTS's | mixed | log evidence | splits "
        "| CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    apart = distances(records)
    for row in ROWS:
        mine = sorted((r for r in records if r["backend"] == row), key=lambda r: r["split"])
        if not mine:
            continue
        shares = [r["mixing"]["share_below_1.1"] for r in mine if r["mixing"]]
        evidence = [] if row in WITHOUT_EVIDENCE else [r["log_evidence"] for r in mine]
        digits = 3 if mean(r["scores"]["rmse"] for r in mine) > 0.1 else 5
        cells = (
            row,
            spread([-r["scores"]["nll"] for r in mine], 3),
            spread([r["scores"]["rmse"] for r in mine], digits),
            spread([r["scores"]["coverage_50"] for r in mine], 2),
            spread([r["scores"]["coverage_90"] for r in mine], 2),
            _spread_or_blank([f["wasserstein1"] for f in apart[row].values()], digits),
            _spread_or_blank([f["variance_ratio"] for f in apart[row].values()], 2),
            _spread_or_blank(shares, 2),
            _spread_or_blank(evidence, 0),
            _ranges([r["split"] for r in mine]),
            f"{mean(r['cpu_seconds'] for r in mine):,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _gaps(data: str, records: Sequence[Record], standard: Sequence[Record]) -> str:
    lines = [
        f"### {data}\n",
        "| | log-likelihood in the gaps | median | worst gap | 90 % | below MAP | below a constant "
        "| on standard splits | gaps | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in ROWS if row in GAP_ROWS):
        mine = sorted((r for r in records if r["backend"] == row), key=lambda r: int(r["split"][3:]))
        if not mine:
            continue
        worst = min(mine, key=lambda r: -r["scores"]["nll"])
        cells = (
            row,
            spread([-r["scores"]["nll"] for r in mine], 2),
            f"{median(-r['scores']['nll'] for r in mine):.2f}",
            f"{-worst['scores']['nll']:.2f} ({worst['split']})",
            spread([r["scores"]["coverage_90"] for r in mine], 2),
            "" if row == "map" else f"{len(below_map(mine, records))} of {len(mine)}",
            f"{len(below_constant(mine))} of {len(mine)}",
            _spread_or_blank([-r["scores"]["nll"] for r in standard if r["backend"] == row], 2),
            _ranges([int(r["split"][3:]) for r in mine]),
            f"{mean(r['cpu_seconds'] for r in mine):,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def below_map(mine: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Splits in which a row's log-likelihood is below that of MAP less one standard error over the test rows.

    Args:
        mine: Records of one row on one data set.
        records: Those of all rows on it.

    Returns:
        Names of the splits.
    """
    bars = {
        r["split"]: -r["scores"]["nll"] - (r["scores"]["nll_stderr"] or 0.0) for r in records if r["backend"] == "map"
    }
    return [r["split"] for r in mine if r["split"] in bars and -r["scores"]["nll"] < bars[r["split"]]]


def below_constant(mine: Sequence[Record]) -> list[str]:
    """Splits in which predicting the training part's mean and standard deviation everywhere would score better.

    Args:
        mine: Records of one row on one data set.

    Returns:
        Names of the splits.
    """
    return [r["split"] for r in mine if r["scores"]["nll"] > r["constant_nll"]]


def expectations(records: Sequence[Record]) -> list[Expectation]:
    """What the tables are held to, with verdicts on what has been run.

    Args:
        records: Finished records.

    Returns:
        The expectations.
    """
    standard = by_data([r for r in records if not is_gap(r)])
    gaps = by_data([r for r in records if is_gap(r)])
    found: list[Expectation] = []
    for row in LAPLACE:
        of_row = [(data, mine) for data, mine in standard if any(r["backend"] == row for r in mine)]
        if of_row:
            text = f"{row}: log-likelihood at least that of MAP less one standard error over splits, on every set"
            found += _held(text, [_margin(data, row, mine) for data, mine in of_row])
            found += _covered(row, of_row)
        near = [_nearness(data, row, mine) for data, mine in of_row]
        found += _held(f"{row}: nearer to NUTS than MAP is, on every set", near)
    text = "dense_refitted: the log evidence in the end is at least that of the first choice, on every set"
    found += _held(text, [_risen(data, mine) for data, mine in standard])
    for row in (row for row in GAP_ROWS if row != "map"):
        of_row = [(data, mine) for data, mine in gaps if any(r["backend"] == row for r in mine)]
        if of_row:
            text = f"{row}: log-likelihood in the gaps at least that of MAP less one standard error over gaps"
            found += _held(text, [_margin(data, row, mine) for data, mine in of_row])
            text = f"{row}: no gap in which a constant prediction would score better"
            found += _held(text, [_no_catastrophe(data, row, mine) for data, mine in of_row])
    return found


def _margin(data: str, row: str, records: Sequence[Record]) -> Verdict | None:
    """Whether a row is at or above MAP less one standard error, paired over splits; None where MAP was not run."""
    other = {r["split"]: -r["scores"]["nll"] for r in records if r["backend"] == "map"}
    gains = [-r["scores"]["nll"] - other[r["split"]] for r in records if r["backend"] == row and r["split"] in other]
    if not gains:
        return None
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    sign = "+" if mean(gains) >= 0 else ""
    return mean(gains) >= -error, f"{data} {sign}{spread(gains, 3)}"


def _covered(row: str, of_row: Sequence[tuple[str, list[Record]]]) -> list[Expectation]:
    coverage = {data: mean(r["scores"]["coverage_90"] for r in mine if r["backend"] == row) for data, mine in of_row}
    verdicts = [(0.85 <= share <= 0.95, f"{data} {share:.3f}") for data, share in coverage.items()]
    return _held(f"{row}: 90 % intervals cover 85-95 % on every set", verdicts)


def _no_catastrophe(data: str, row: str, records: Sequence[Record]) -> Verdict:
    mine = [r for r in records if r["backend"] == row]
    worse = below_constant(mine)
    named = f" ({', '.join(worse)})" if worse else ""
    return not worse, f"{data} {len(worse)} of {len(mine)}{named}"


def _risen(data: str, records: Sequence[Record]) -> Verdict | None:
    gains = [r["rounds"][-1] - r["rounds"][0] for r in records if r["backend"] == "dense_refitted"]
    return (mean(gains) >= 0, f"{data} {spread(gains, 0)} nats") if gains else None


def _nearness(data: str, row: str, records: Sequence[Record]) -> Verdict | None:
    """Whether a row is nearer to NUTS than MAP is, in the mean over splits; None where NUTS was not run."""
    apart = distances(records)
    both = sorted(apart[row].keys() & apart["map"].keys())
    if not both:
        return None
    ours, other = (mean(apart[name][split]["wasserstein1"] for split in both) for name in (row, "map"))
    return ours < other, f"{data} {ours:.3g} against {other:.3g}"


def _held(text: str, verdicts: Sequence[Verdict | None]) -> list[Expectation]:
    """The expectation on the sets that it can be seen on; none where there is no such set."""
    known = [verdict for verdict in verdicts if verdict is not None]
    missed = [figures for good, figures in known if not good]
    listed = "; ".join(figures for _, figures in known)
    verdict = f"missed on {len(missed)} of {len(known)}" if missed else "reached"
    return [Expectation(text, f"{verdict}: {listed}")] if known else []


def _spread_or_blank(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return spread(known, digits) if known else ""


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in words: 0-4, 7."""
    groups: list[list[int]] = []
    for value in numbers:
        if groups and value == groups[-1][-1] + 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def _how(records: Sequence[Record]) -> list[str]:
    """Settings of every row, and versions."""
    lines = ["## How\n"]
    for row in ROWS:
        for settings in sorted({r["settings"] for r in records if r["backend"] == row}):
            lines.append(f"- {row}: `{settings}`")
    lines += [f"- {text}." for text in sorted({environment(r["environment"]) for r in records})]
    busiest = max((max(r["load"]) for r in records), default=0.0)
    lines += [f"- Load of the machine while these ran: up to {busiest:g} runnable processes.", ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the records and write the page."""
    source = "python -m benchmarks.uci_laplace"
    write_page(render, arguments, description=__doc__, results=RESULTS, page=PAGE, source=source)


if __name__ == "__main__":
    main()
