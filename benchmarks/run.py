"""Measure ours and the peers side by side and write one JSON file for each task.

    python -m benchmarks.run                              every task, then docs/benchmarks.md
    python -m benchmarks.run leapfrog ensemble            some of them
    python -m benchmarks.run --quick --out SOME_FOLDER    a trial of the benchmarks themselves, without meaning

Everything runs on one thread. Peers other than Pyro and ArviZ are installed under benchmarks/.envs/ the first time.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks import environments, report
from benchmarks.measure import NotRun, Settings, race
from benchmarks.tasks import TASKS, Task

RESULTS = Path(__file__).parent / "results"
FORMAT = 1


def run(task: Task, settings: Settings) -> dict[str, Any]:
    """Measure one task.

    Args:
        task: The task.
        settings: Repeats and sizes.

    Returns:
        Its record, for JSON.
    """
    start = time.perf_counter()
    found: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for case in task.cases(settings):
        if isinstance(case, NotRun):
            left_out.append({"case": case.name, "reason": case.reason})
            print(f"  {case.name}: not run, {case.reason}", flush=True)
            continue
        record = race(case, settings.repeats)
        found.append(record)
        _tell(record)
        del case
        gc.collect()
    return {
        "format": FORMAT,
        "task": task.name,
        "title": task.title,
        "quick": settings.quick,
        "repeats": settings.repeats,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environments.record(),
        "cases": found,
        "not_run": left_out,
    }


def _tell(record: dict[str, Any]) -> None:
    print(f"  {record['case']}")
    for c in record["contestants"]:
        print(f"    {c['median']:>10.5g} [{c['min']:.5g}-{c['max']:.5g}] {record['unit']}  {c['name']}")
    for r in record["ratios"]:
        goal = "" if r["goal"] is None else f"  goal {r['goal']:g}{'' if r['median'] >= r['goal'] else ' MISSED'}"
        print(f"    x{r['median']:.2f} [{r['min']:.2f}-{r['max']:.2f}]  {r['slow']} / {r['fast']}{goal}")
    print(f"    {record['agreement']}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen tasks, write their files, and the report unless it is a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)}; all by default")
    parser.add_argument("--repeats", type=int, default=5, help="times that each contestant is timed (5)")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes; needs --out")
    parser.add_argument("--own-only", action="store_true", help="leave out peers that need an environment of their own")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its figures must not replace the real ones")
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.repeats, options.quick, foreign=not (options.quick or options.own_only))

    torch.set_num_threads(1)
    # Names of peers' own deprecations, no business of a reader of timings.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in options.tasks or TASKS:
        print(TASKS[name].title, flush=True)
        pyro.clear_param_store()
        record = run(TASKS[name], settings)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"  {record['seconds']:.0f} s", flush=True)
    if folder == RESULTS:
        report.main([])


if __name__ == "__main__":
    main()
