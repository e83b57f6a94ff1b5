"""Write docs/benchmarks.md from the JSON files: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
ORDER = ("leapfrog", "ensemble", "predictive", "diagnostics", "mean_field", "laplace")

INTRODUCTION = """# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/results/; change those, not this page. -->

Ours and the peers were measured in one run, in turn, on one thread: a repeat times everyone once, in an order that
rotates, and a ratio is taken within a repeat. Every figure is **median [smallest-largest]** over the repeats. A ratio
says how many times longer the first takes than the second; those below 1, where ours is the slower, are listed as
well. A goal is what the project set out to reach. Times depend on the machine, ratios less so. Compilation is not in
the times but in the column "first call", unless a row says "whole fit"; files in `benchmarks/results/` hold every
repeat. `make bench` measures everything again.
"""


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: What `benchmarks.run` wrote, one for each task.

    Returns:
        Markdown.
    """
    parts = [INTRODUCTION]
    for record in sorted(records, key=lambda r: ORDER.index(r["task"])):
        parts.append(f"## {record['title']}\n")
        parts += [_case(case) for case in record["cases"]]
        parts += [f"Not run: {left['case']} ({left['reason']}).\n" for left in record["not_run"]]
        parts.append(_measured_with(record))
    return "\n".join(parts)


def _case(case: dict[str, Any]) -> str:
    lines = [f"### {case['case']}\n", f"| {case['unit']} per {case['per']} | time | first call, s |", "|---|---|---|"]
    for c in case["contestants"]:
        first = "" if c["build_seconds"] is None else f"{c['build_seconds']:.2g}"
        lines.append(f"| {c['name']} | {_spread(c)} | {first} |")
    lines += ["", "| ratio | | goal |", "|---|---|---|"]
    for r in case["ratios"]:
        goal = ""
        if r["goal"] is not None:
            goal = f"at least {r['goal']:g}: {'reached' if r['median'] >= r['goal'] else 'missed'}"
        lines.append(f"| {r['slow']} / {r['fast']} | {_spread(r)} | {goal} |")
    checks = [f"{name} {value:g}" for name, value in case["agreement"].items()]
    lines += ["", f"Compared: {'; '.join(checks)}." if checks else "", *case["notes"], ""]
    return "\n".join(lines)


def _spread(figures: dict[str, Any]) -> str:
    return f"{digits(figures['median'])} [{digits(figures['min'])}-{digits(figures['max'])}]"


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _measured_with(record: dict[str, Any]) -> str:
    env = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    threads = f"{env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    trial = " A trial with the smallest sizes: these figures mean nothing." if record["quick"] else ""
    machine = f"{env['processor']}, {threads}, Python {env['python']}, {versions}"
    return f"*{record['repeats']} repeats; {machine}.{trial}*\n"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every record in a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def write_page(
    render: Callable[[list[dict[str, Any]]], str],
    arguments: Sequence[str] | None,
    *,
    description: str | None,
    results: Path,
    page: Path,
    source: str,
) -> None:
    """The command that reads the records of a study and writes its page.

    Args:
        render: From records to Markdown.
        arguments: Of the command line.
        description: What `--help` says first.
        results: Folder of the records.
        page: The page.
        source: The command that makes records.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=results, help="folder of the records")
    parser.add_argument("--out", type=Path, default=page, help=f"page to write (docs/{page.name})")
    options = parser.parse_args(arguments)
    records = load(options.results)
    if not records:
        parser.error(f"no record in {options.results}; run `{source}` first")
    options.out.write_text(render(records))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the files and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (benchmarks/results)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write (docs/benchmarks.md)")
    options = parser.parse_args(arguments)
    options.out.write_text(render(load(options.results)))


if __name__ == "__main__":
    main()
