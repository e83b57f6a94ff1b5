"""Long exact runs on the standard UCI splits: one JSON record for each data set, split and backend.

    python -m benchmarks.reference --data energy,yacht --splits 5 --backend map,deep_ensemble,nuts --seconds 600
    python -m benchmarks.reference_page                        writes docs/uci_reference.md from the records

A record that exists is kept, so a run that was stopped goes on where it was. Split 0 of every data set comes first,
then split 1, so that a run that is stopped early has seen all sets. Where a limit in seconds ends a fit, its draws
depend on what else the machine did: the record keeps gradients and seconds.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import environments
from benchmarks.records import keep, number
from bnn_zoo.budgets import make_backends, parse_backends
from bnn_zoo.data import Dataset, load, splits
from bnn_zoo.errors import UsageError
from bnn_zoo.evaluate import evaluate
from bnn_zoo.models import ModelSpec
from inference import DeepEnsemble
from inference.backend import Backend
from inference.posterior import DrawsPosterior, Posterior

RESULTS = Path(__file__).parent / "results" / "reference"
FORMAT = 1
DATA = ("energy", "yacht", "concrete", "boston", "wine")
BACKENDS = "map,deep_ensemble,nuts"
# About half a million gradients for the chains; a limit in seconds only ends those that take far longer.
SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 5000},
    "deep_ensemble": {"num_members": 5, "num_steps": 5000},
    "nuts": {"num_samples": 300, "warmup_steps": 200, "num_chains": 4, "max_tree_depth": 8},
    "hmc": {"num_samples": 300, "warmup_steps": 200, "num_chains": 4, "max_leapfrogs": 255},
}
SCORES = ("nll", "nll_stderr", "nll_gaussian", "rmse", "coverage_50", "coverage_90", "width_50", "width_90")
START_STEPS = 2000


@dataclass(frozen=True)
class Fit:
    """One record to be made.

    Attributes:
        data: Name of the data set.
        split: Number of the standard split, or "gap0", "gap1", ... for a gap split.
        name: Name of the backend on the command line.
        backend: The backend with its settings.
        spec: The network and its prior.
        start: "random", or "ensemble" (each chain at a network trained on its own).
        seed: Seed of the fit.
    """

    data: str
    split: int | str
    name: str
    backend: Backend
    spec: ModelSpec
    start: str = "ensemble"
    seed: int = 0

    @property
    def file_name(self) -> str:
        """Name of the record."""
        return f"{self.data}-{self.split}-{self.name}.json"


def planned(
    data: Sequence[str], num_splits: int, backends: Mapping[str, Backend], spec: ModelSpec, start: str
) -> list[Fit]:
    """All fits, split by split.

    Args:
        data: Names of the data sets.
        num_splits: Splits 0 to this minus 1.
        backends: Backends by name.
        spec: The network.
        start: Where chains start.

    Returns:
        The fits, in the order of running.
    """
    return [
        Fit(name, split, backend_name, backend, spec, start)
        for split in range(num_splits)
        for name in data
        if split < splits(name)
        for backend_name, backend in backends.items()
    ]


def limited(backend: Backend, seconds: float) -> Backend:
    """The backend with a limit in seconds where it knows one; others end by themselves."""
    return replace(backend, max_seconds=seconds) if "max_seconds" in backend.field_names() else backend


def run(fit: Fit) -> dict[str, Any]:
    """Fit, score and diagnose.

    Args:
        fit: What to do.

    Returns:
        The record, for JSON; with "failed" in place of figures where the time ended before the first draw.
    """
    data = load(fit.data, split=fit.split)
    model = fit.spec.build(data)
    record = heading(fit, data)
    began, load_before = time.perf_counter(), os.getloadavg()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kept in the record: the limit in seconds is meant to end the run
        init = chain_start(fit, model, data)
        record["start"] = "its own" if init is None else f"{init.backend!r}"
        record["start_seconds"] = round(time.perf_counter() - began, 1)
        try:
            posterior = fit.backend.fit(model, data.x_train, data.y_train, seed=fit.seed, init=init)
        except TimeoutError as error:
            return record | {"failed": str(error)}
    record |= costs(posterior, load_before)
    scores = evaluate(posterior, data).scores
    record["scores"] = {name: number(scores[name]) for name in SCORES}
    record["mixing"] = mixing(posterior, data)
    return record


def heading(fit: Fit, data: Dataset) -> dict[str, Any]:
    """What was fitted to what, by which program.

    Args:
        fit: What is to be done.
        data: Its data set.

    Returns:
        The first part of a record.
    """
    return {
        "format": FORMAT,
        "data": fit.data,
        "split": fit.split,
        "backend": fit.name,
        "settings": repr(fit.backend),
        "model": fit.spec.to_json(),
        "num_train": len(data.x_train),
        "num_test": len(data.x_test),
        "seed": fit.seed,
        "environment": environments.record(),
    }


def costs(posterior: Posterior, load_before: float) -> dict[str, Any]:
    """What a fit took, and what it warned of.

    Args:
        posterior: What came of it.
        load_before: Runnable processes of the machine before it.

    Returns:
        A part of a record.
    """
    return {
        "seconds": round(posterior.info.seconds, 1),
        "gradients": round(posterior.info.gradients),
        # Others may have used the machine: the seconds are then worth less than they look.
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "warnings": posterior.info.warnings,
    }


def chain_start(fit: Fit, model: Any, data: Dataset) -> Posterior | None:
    """Where the chains of a fit start.

    Args:
        fit: What is to be done.
        model: Its model.
        data: Its data set.

    Returns:
        One network for each chain; None where there are no chains, or they start at random.
    """
    chains = getattr(fit.backend, "num_chains", None)
    if fit.start == "random" or chains is None:
        return None
    ensemble = DeepEnsemble(num_members=chains, num_steps=START_STEPS)
    return ensemble.fit(model, data.x_train, data.y_train, seed=fit.seed)


def mixing(posterior: Posterior, data: Dataset) -> dict[str, Any] | None:
    """How far the chains agree at the test inputs.

    Args:
        posterior: The posterior.
        data: The data set.

    Returns:
        Figures of convergence; None where there are no chains.
    """
    if not isinstance(posterior, DrawsPosterior) or "chains" not in posterior.backend.capabilities:
        return None
    found = posterior.diagnose(data.x_test)
    rhat = found.rhat_functions
    figures = {name: number(value) for name, value in found.summary().items() if not isinstance(value, str)}
    return figures | {
        "chains": posterior.draws.shape[0],
        "draws": posterior.draws.shape[1],
        "share_below_1.1": number(float(np.mean(rhat < 1.1))) if np.isfinite(rhat).any() else None,
    }


def make_missing(fits: Sequence[Fit], folder: Path, make: Callable[[Fit], dict[str, Any]]) -> None:
    """Write the records that are not there yet.

    Args:
        fits: All that are wanted.
        folder: Of the records; made if it is not there.
        make: Makes one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, fit in enumerate(fits, 1):
        keep(folder / fit.file_name, lambda fit=fit: make(fit), f"{place}/{len(fits)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the records that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA), help="names, separated by commas (%(default)s)")
    parser.add_argument("--splits", type=int, default=5, help="standard splits 0 to this minus 1 (%(default)s)")
    parser.add_argument("--backend", default=BACKENDS, help="registered names, separated by commas (%(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of one fit of chains (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="BACKEND.FIELD=VALUE", help="change a setting")
    parser.add_argument("--start", choices=("random", "ensemble"), default="ensemble", help="where chains start")
    parser.add_argument("--hidden", type=int, default=50, help="hidden units (%(default)s)")
    parser.add_argument("--activation", default="tanh", help="of the hidden units (%(default)s)")
    parser.add_argument("--prior", default="normal:fan_in", help="as for bnn-zoo compare (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.splits < 1 or options.seconds <= 0:
        parser.error(f"--splits and --seconds must be positive, got {options.splits} and {options.seconds:g}")
    try:
        backends = make_backends(parse_backends(options.backend), SETTINGS, options.set)
        backends = {name: limited(backend, options.seconds) for name, backend in backends.items()}
        spec = ModelSpec(hidden=(options.hidden,), activation=options.activation, prior=options.prior)
        fits = planned(options.data.split(","), options.splits, backends, spec, options.start)
    except (UsageError, ValueError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    make_missing(fits, options.out, run)


if __name__ == "__main__":
    main()
