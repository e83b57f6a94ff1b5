"""Write docs/image_studies.md from the records: `python -m benchmarks.images.page`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.images.outside import DATA
from benchmarks.images.outside import ROWS as OUTSIDE_ROWS
from benchmarks.images.records import RESULTS
from benchmarks.images.resnet import ROWS as RESNET_ROWS
from benchmarks.report import digits, write_page

PAGE = Path(__file__).parent.parent.parent / "docs" / "image_studies.md"
NAMES = {
    "map": "MAP",
    "kronecker": "Kronecker Laplace, declared prior",
    "kronecker_tuned": "Kronecker Laplace, prior by evidence",
    "kronecker_tuned_probit": "the same, probit link",
    "last_layer_tuned": "last-layer Laplace, prior by evidence",
    "sampled": "sampled Laplace",
    "sampled_em": "sampled Laplace, prior by EM",
    "ensemble": "ensemble of 5",
}
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "notmnist": "notMNIST", "gtsrb": "traffic signs"}

_WIDER = """**{}: failed without a warning.** Fewer than no weights are determined: the draws spread wider than the
prior itself, as draws of a posterior cannot. The descent has not converged in its few steps, and precisions learnt from
such draws mean nothing. More steps (`--sampled-steps`) are needed; nothing here says how many.
"""

INTRODUCTION = """# Image studies

<!-- Written by `python -m benchmarks.images.page` from benchmarks/results/images/; change those instead. -->

Does a Laplace approximation at a trained network improve what the network says of its own certainty? NLL is the test
negative log-likelihood in nats per image, ECE the expected calibration error (15 bins), in brackets what a calibrated
prediction of the same confidences would have. AUROC tells foreign images from test images by the entropy of the
predicted classes; 0.5 is useless. Class probabilities are averages over draws of the linearised network unless a row
says "probit". Seconds: "network" trains the network(s), "fit" takes the curvature or the draws, "prior" chooses the
prior. Others used the machine as well: seconds are upper bounds; in brackets, where it was measured, the processor's
own time. Why Laplace loses likelihood where it gains AUROC: [gotchas](gotchas.md), where a dense Laplace approximation
does the same and long chains do not.
"""


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: What `benchmarks.images.outside` and `benchmarks.images.resnet` wrote.

    Returns:
        Markdown.
    """
    done = [r for r in records if "scores" in r]
    parts = [INTRODUCTION]
    for data in DATA:
        mine = [r for r in done if r["study"] == "outside" and r["data"] == data]
        if mine:
            first = max(mine, key=lambda r: r["parameters"])  # some rows hold a part of the network
            heading = (
                f"## LeNet on {TITLES[data]}\n\n{first['num_train']:,} training images, {first['num_test']:,} test"
            )
            parts += [f"{heading} images, {first['parameters']:,} weights.\n", *_table(mine, OUTSIDE_ROWS)]
    mine = [r for r in done if r["study"] == "resnet"]
    if mine:
        parts += [*_resnet(mine)]
    failed = [r for r in records if "failed" in r]
    if failed:
        parts.append("## Failed\n")
        parts += [f"- {r['study']}, {r['data']}, seed {r['seed']}, {_name(r['row'])}: {r['failed']}" for r in failed]
        parts.append("")
    return "\n".join([*parts, *_how(done)])


def _resnet(records: Sequence[dict[str, Any]]) -> list[str]:
    """The section of the ResNet, with what the draws cost."""
    first = records[0]
    lines = [
        "## ResNet-20 on CIFAR-10\n",
        f"{first['num_train']:,} training images out of CIFAR-10's test set, {first['num_test']:,} others held out; "
        f"{first['parameters']:,} weights with a prior, batch norm in eval mode and constant. "
        f"{first['sizes']['epochs']} epochs without augmentation: the network is far from the state of the art.\n",
        *_table(records, RESNET_ROWS),
    ]
    for record in (r for r in records if r["row"] == "sampled"):
        sizes, extra = record["sizes"], record["extra"]
        minutes, busy = record["seconds"]["fit"] / 60, record["seconds"]["fit_processor"] / 60
        lines.append(
            f"The {sizes['draws']} draws took {minutes:.1f} minutes ({busy:.1f} minutes of the processor's time) on "
            f"{record['environment']['threads']} thread and "
            f"{digits(record['peak_mib'])} MiB above what the process held before (all in all at most "
            f"{digits(record['process_peak_mib'])} MiB); the draws themselves are "
            f"{4 * sizes['draws'] * record['parameters'] / 2**20:.0f} MiB. {sizes['steps']} steps of {sizes['batch']} "
            f"images went over the data {extra['passes_of_descent']:.2g} times. The residual at the end would cost one "
            "more pass, and the backend does not take it.\n"
        )
        if extra.get("determined", math.inf) < 2 * extra.get("determined_error", 0.0):
            lines.append(
                "**By the number of determined weights these draws cannot be told from draws of the prior**: the row "
                "shows what they cost, not what converged draws would predict.\n"
            )
    return lines


def _table(records: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[str]:
    """Scores by row, and how each compares with the mode."""
    foreign = list(records[0]["auroc"])
    heads = ["accuracy", "NLL", "ECE", *(f"AUROC {TITLES[name]}" for name in foreign)]
    heads += ["determined weights", "network, s", "fit, s", "prior, s", "ms per image"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    by_row = {row: [r for r in records if r["row"] == row] for row in rows}
    by_row = {row: mine for row, mine in by_row.items() if mine}
    for row, mine in by_row.items():
        baseline = mean(r["scores"]["ece_baseline"] for r in mine)
        cells = [
            _spread([r["scores"]["accuracy"] for r in mine], 4),
            _spread([r["scores"]["nll"] for r in mine], 4),
            f"{_spread([r['scores']['ece'] for r in mine], 4)} ({baseline:.4f})",
            *(_spread([r["auroc"][name]["entropy"] for r in mine], 3) for name in foreign),
            _determined(mine),
            *(_seconds(mine, part) for part in ("network", "fit", "prior")),
            _mean(mine, lambda r: r["milliseconds_per_image"]),
        ]
        lines.append(f"| {_name(row)} | {' | '.join(cells)} |")
    noise = max(r["scores"]["nll_stderr"] for r in by_row.get("map", records))
    lines += ["", f"Standard error of MAP's NLL over the test images: {noise:.3f}.\n"]
    if "map" in by_row:
        lines += [_beside(row, mine, by_row["map"], foreign) for row, mine in by_row.items() if row != "map"]
        lines.append("")
    lines += [_WIDER.format(_name(row)) for row, mine in by_row.items() if any(map(_wider_than_prior, mine))]
    return lines


def _wider_than_prior(record: dict[str, Any]) -> bool:
    """Whether draws spread more than the prior, which no posterior of a linear model does."""
    extra = record["extra"]
    return extra.get("determined", 0.0) < -2 * extra.get("determined_error", math.inf)


def _beside(row: str, mine: Sequence[dict[str, Any]], mode: Sequence[dict[str, Any]], foreign: Sequence[str]) -> str:
    """In words: better or worse than the mode, figure by figure."""
    figures: list[tuple[str, Callable[[dict[str, Any]], float], int]] = [
        ("NLL", lambda r: r["scores"]["nll"], -1),
        ("ECE", lambda r: r["scores"]["ece"], -1),
        *((f"AUROC {TITLES[name]}", lambda r, name=name: r["auroc"][name]["entropy"], 1) for name in foreign),
    ]
    found: dict[str, list[str]] = {"better": [], "worse": [], "equal": []}
    for name, value, sign in figures:
        gain = sign * (mean(map(value, mine)) - mean(map(value, mode)))
        kind = "equal" if abs(gain) < 5e-4 else "better" if gain > 0 else "worse"
        found[kind].append(name if kind == "equal" else f"{name} by {abs(gain):.3f}")
    told = [f"**{kind}** in {', '.join(names)}" for kind, names in found.items() if names]
    return f"- {_name(row)}, beside MAP: {'; '.join(told)}."


def _determined(records: Sequence[dict[str, Any]]) -> str:
    values = [r["extra"]["determined"] for r in records if "determined" in r["extra"]]
    errors = [r["extra"]["determined_error"] for r in records if "determined_error" in r["extra"]]
    if not values:
        return ""
    return f"{mean(values):,.0f}" + (f" ± {mean(errors):,.0f}" if errors else "")


def _mean(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> str:
    values = [v for v in map(value, records) if v is not None]
    return digits(mean(values)) if values else ""


def _seconds(records: Sequence[dict[str, Any]], part: str) -> str:
    """Of the clock, and of the processor where that is known."""
    busy = _mean(records, lambda r: r["seconds"].get(f"{part}_processor"))
    return _mean(records, lambda r: r["seconds"].get(part)) + (f" ({busy})" if busy else "")


def _spread(values: Sequence[float], places: int) -> str:
    """Mean, and its standard error where there are several seeds."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{places}f}" if len(values) > 1 else ""
    return f"{mean(values):.{places}f}{error}"


def _name(row: str) -> str:
    return NAMES.get(row, row)


def _how(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the columns leave out: settings, warnings, versions."""
    lines = [
        "## How\n",
        '"Determined weights" is how many weights the data determine beside the prior: for sampled Laplace '
        "estimated from the draws, zero for draws that the descent has not moved from the prior.\n",
    ]
    passes = sorted({r["extra"]["passes_of_descent"] for r in records if "passes_of_descent" in r["extra"]})
    if passes:
        listed = " and ".join(f"{p:.2g}" for p in passes)
        lines.append(
            f"Stochastic descent went over the data {listed} times for each set of draws, a budget of minutes. "
            "Directions that it has not reached are still those of the prior, and there the draws spread too far.\n"
        )
    seen: dict[str, None] = {}
    for record in records:
        seen[f"- {_name(record['row'])}: `{record['settings']}`"] = None
    lines += [*seen, ""]
    told: dict[str, None] = {}
    for record in records:
        for name, text in record["warnings"]:
            told[f"- {record['data']}, {_name(record['row'])}, `{name}`: {text}"] = None
    if told:
        lines += ["Warnings of the fits:\n", *told, ""]
    environments = {_environment(r["environment"]): None for r in records}
    return [*lines, *(f"*{environment}.*" for environment in environments), ""]


def _environment(env: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    threads = f"{env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    return f"{env['processor']}, {env['device']}, {threads}, Python {env['python']}, {versions}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the records and write the page.

    Args:
        arguments: Of the command line.
    """
    source = "python -m benchmarks.images.outside"
    write_page(render, arguments, description=__doc__, results=RESULTS, page=PAGE, source=source)


if __name__ == "__main__":
    main()
