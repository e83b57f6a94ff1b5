"""R-hat and effective sample sizes of many scalars: ours against ArviZ, in turn in one process.

    python benchmarks/diagnostics.py --scalars 1000 10000 --repeats 5 --out benchmarks/results/diagnostics.jsonl

Draws are autoregressive with coefficient 0.8, four chains of 500, one scalar in seven with a shifted chain. Each figure
is one line of JSON: seconds of both (median, minimum, maximum over the repeats) and the ratio of each pair of runs.
Neither uses more than one thread: numpy's sorts and Fourier transforms have no more.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import arviz as az
import numpy as np
import scipy

from inference import diagnostics

CHAINS, LENGTH = 4, 500


def autoregressive_draws(num_scalars: int) -> np.ndarray:
    """Draws of shape (4, 500, num_scalars), float64."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((CHAINS, LENGTH, num_scalars))
    for t in range(1, LENGTH):
        draws[:, t] += 0.8 * draws[:, t - 1]
    draws[0, :, ::7] += 1.0
    return draws


def seconds(call: Callable[[], object]) -> tuple[float, np.ndarray]:
    """Wall-clock time of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, np.asarray(result)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": float(np.median(values)), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def compare(name: str, num_scalars: int, ours: Callable, theirs: Callable, repeats: int) -> dict:
    """Time both in turn and compare their results."""
    runs = []
    for _ in range(repeats):
        (fast, found), (slow, expected) = seconds(ours), seconds(theirs)
        runs.append((fast, slow))
    error = float(np.abs(found / expected - 1).max())
    return {
        "benchmark": "diagnostics",
        "figure": name,
        "scalars": num_scalars,
        "chains": CHAINS,
        "draws": LENGTH,
        "repeats": repeats,
        "ours_seconds": spread([fast for fast, _ in runs]),
        "arviz_seconds": spread([slow for _, slow in runs]),
        "ratio": spread([slow / fast for fast, slow in runs]),
        "largest_relative_difference": float(f"{error:.2g}"),
        "threads": 1,
        "processor": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "arviz": az.__version__,
        },
    }


def figures(num_scalars: int, repeats: int) -> Iterator[dict]:
    """One line for each figure."""
    draws = autoregressive_draws(num_scalars)
    dataset = az.convert_to_dataset({"w": draws})
    pairs = {
        "rhat": (lambda: diagnostics.rhat(draws), lambda: az.rhat(dataset)["w"]),
        "ess_bulk": (lambda: diagnostics.ess_bulk(draws), lambda: az.ess(dataset)["w"]),
        "ess_tail": (lambda: diagnostics.ess_tail(draws), lambda: az.ess(dataset, method="tail")["w"]),
    }
    for name, (ours, theirs) in pairs.items():
        yield compare(name, num_scalars, ours, theirs, repeats)


def main() -> None:
    """Time every figure and print or append one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scalars", type=int, nargs="+", default=[1000, 10_000], help="numbers of scalars")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, ours and ArviZ's in turn")
    parser.add_argument("--out", type=Path, help="file that the lines are appended to")
    options = parser.parse_args()
    for num_scalars in options.scalars:
        for found in figures(num_scalars, options.repeats):
            line = json.dumps(found)
            print(line, flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
