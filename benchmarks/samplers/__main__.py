"""Measure our samplers and the peers' on the same posteriors, each in a process of its own.

    python -m benchmarks.samplers                       every posterior, then docs/sampler_benchmarks.md
    python -m benchmarks.samplers energy gaussian       some of them
    python -m benchmarks.samplers --quick --out FOLDER  a trial of the benchmarks themselves, without meaning

Fits of the contestants take turns; the first of each is the first in its process and pays all compilation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.environments import PeerError
from benchmarks.samplers import page
from benchmarks.samplers.contest import Contestant, Process, judge
from benchmarks.samplers.posteriors import POSTERIORS

# Greatest tree depth of NUTS where it is not 10: the trajectories of networks do not turn by then.
DEPTHS = {"energy": 6, "energy_deep": 6, "boston": 6, "gap": 8}
RESULTS = Path(__file__).parent.parent / "results" / "samplers"


def contestants(name: str, quick: bool, fits: int) -> list[Contestant]:
    """Who takes part on a posterior.

    Args:
        name: Key of `POSTERIORS`.
        quick: A trial.
        fits: Fits of each.

    Returns:
        The line-up. NUTS has the same warm-up, draws and tree depth everywhere.
    """
    depth = DEPTHS.get(name, 10)
    draws = 20 if quick else 1000
    nuts = {"num_samples": draws, "warmup_steps": draws, "max_tree_depth": min(3, depth) if quick else depth}
    found = [Contestant(f"NUTS, {c} chains", "NUTS", nuts | {"num_chains": c}, fits) for c in (1, 4, 8)]
    if quick:
        return found[:1]
    found += [
        Contestant(f"NumPyro NUTS, {c} chains", "NumPyro NUTS", nuts | {"num_chains": c}, fits) for c in (1, 4, 8)
    ]
    found.append(Contestant("BlackJAX NUTS, 1 chain", "BlackJAX NUTS", nuts | {"num_chains": 1}, fits))
    langevin = {"num_samples": draws, "warmup_steps": 10_000, "thinning": 20}
    found.append(Contestant("BlackJAX MCLMC, 1 chain", "BlackJAX MCLMC", langevin | {"num_chains": 1}, fits))
    langevin["num_samples"] *= langevin["thinning"]  # ours counts steps
    found.append(Contestant("MCLMC, 4 chains", "MCLMC", langevin | {"num_chains": 4}, fits))
    chees = {"num_chains": 16, "num_samples": draws // 5, "warmup_steps": 2 * draws // 5}
    found.append(Contestant("ChEESHMC, 16 chains", "ChEESHMC", chees, fits))
    if name in ("energy", "gap"):  # where samplers are held to agree
        steps = {"num_chains": 4, "num_samples": draws // 2, "warmup_steps": draws // 2, "max_leapfrogs": 200}
        found.append(Contestant("HMC, 4 chains", "HMC", steps, fits))
        deeper = {"num_chains": 4, "num_samples": draws // 2, "warmup_steps": draws // 2, "max_tree_depth": 9}
        found.append(Contestant("NUTS, 4 chains, depth 9", "NUTS", deeper, 1))
        found.append(Contestant(page.LONG_REFERENCE, "NumPyro NUTS", deeper, 1))
    if name not in ("energy_deep", "gap"):
        found.append(Contestant("Pyro NUTS, 1 chain", "Pyro NUTS", nuts | {"num_chains": 1}, 1))
    return found


def measure(name: str, line_up: Sequence[Contestant], threads: int) -> dict[str, Any]:
    """All fits on one posterior, in turn.

    Args:
        name: Key of `POSTERIORS`.
        line_up: The contestants.
        threads: Threads for each.

    Returns:
        The record, for JSON.
    """
    posterior, start = POSTERIORS[name](), time.perf_counter()
    fits: dict[str, list[dict[str, Any]]] = {c.label: [] for c in line_up}
    left_out: dict[str, str] = {}
    processes: dict[str, Process] = {}
    for seed in range(max(c.fits for c in line_up)):
        for contestant in line_up:
            label = contestant.label
            if seed >= contestant.fits or label in left_out:
                continue
            try:
                if label not in processes:
                    processes[label] = Process(contestant, name, posterior, threads)
                fits[label].append(judge(processes[label].fit(seed)))
            except PeerError as error:
                left_out[label] = str(error)
                print(f"  {label}: not run, {error}", flush=True)
                continue
            last = fits[label][-1]
            print(
                f"  {label:28s} seed {seed}: {last['seconds']:7.1f} s, sampling {last['sampling_seconds']:7.1f} s, "
                f"{last['us_per_gradient'] or 0:7.1f} us a gradient, ESS {last['ess']:7.0f}, "
                f"{last['ess_per_second']:7.1f} a second, R-hat {last['rhat']:.3f}",
                flush=True,
            )
    for process in processes.values():
        process.close()
    return {
        "posterior": name,
        "title": posterior.name,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environments.record(),
        "contestants": [
            {"label": c.label, "sampler": c.sampler, "options": c.options, "fits": fits[c.label]}
            for c in line_up
            if fits[c.label]
        ],
        "not_run": left_out,
    }


def merged(record: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """A record with contestants of a later run, which replace their namesakes.

    Args:
        record: What there was.
        later: What was measured now, by itself.

    Returns:
        Both, with a note that says which were measured by themselves.
    """
    found = {c["label"]: c for c in later["contestants"]}
    labels = list(found)
    places = {c["label"]: c for c in record["contestants"]} | found  # namesakes keep their place
    note = f"Measured in a run of their own, not in turn with the others: {'; '.join(labels)}."
    return record | {
        "contestants": list(places.values()),
        "not_run": {k: v for k, v in record["not_run"].items() if k not in labels} | later["not_run"],
        "note": " ".join(part for part in (record["note"], note if labels else "", later["note"]) if part),
        "seconds": record["seconds"] + later["seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write one file for each posterior, and the page unless it is a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", nargs="*", metavar="POSTERIOR", help=f"some of {', '.join(POSTERIORS)}")
    parser.add_argument("--fits", type=int, default=3, help="fits of each contestant (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads for each contestant (1)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="contestants whose label contains one of these; they are added to the record",
    )
    parser.add_argument("--note", default="", help="what a reader should know of this run, for the page")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (benchmarks/results/samplers)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, our NUTS alone; needs --out")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.posteriors if name not in POSTERIORS]
    if unknown:
        parser.error(f"no posterior {unknown[0]!r}; there are {', '.join(POSTERIORS)}")
    if options.fits < 1 or options.threads < 1:
        parser.error("--fits and --threads must be at least 1")
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its figures must not replace the real ones")
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.posteriors or POSTERIORS:
        print(POSTERIORS[name]().name, flush=True)
        line_up = [
            c
            for c in contestants(name, options.quick, options.fits)
            if not options.only or any(part in c.label for part in options.only)
        ]
        record = measure(name, line_up, options.threads) | {"note": options.note}
        path = folder / f"{name}{'' if options.threads == 1 else f'_{options.threads}_threads'}.json"
        if options.only and path.exists():
            record = merged(json.loads(path.read_text()), record)
        path.write_text(json.dumps(record, indent=1) + "\n")
    if folder == RESULTS:
        page.main([])


if __name__ == "__main__":
    main()
