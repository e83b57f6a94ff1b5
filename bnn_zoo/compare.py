"""The main job: fit several backends to one declared model on one data set, score them alike, keep what is finished."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnn_zoo.data import Dataset
from bnn_zoo.distance import add_distances
from bnn_zoo.environment import environment
from bnn_zoo.evaluate import Arrays, evaluate
from bnn_zoo.export import write_netcdf
from bnn_zoo.models import ModelSpec
from bnn_zoo.run_folder import RunFolder, read_json, write_json
from bnn_zoo.saved import save_run
from bnn_zoo.tasks import DataSpec
from inference.backend import Backend
from inference.diagnosis import function_draws
from inference.posterior import Posterior

SCHEMA = 1
_MAX_PROBES = 1_000
_NUM_TRACES = 4
_MAX_TRACE = 500

Listener = Callable[[str, str, dict[str, Any]], None]


class Interrupted(Exception):
    """Ctrl-C during a comparison: what was finished is on disk."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare.

    Attributes:
        data: Which data.
        model: Which model.
        backends: Backend by command-line name.
        reference: Name of the backend whose predictions the others are measured against; None for no distances.
        seed: Seed of every fit.
        budget: Name of the budget the backends were made with.
        threads: CPU threads of every fit.
        out: Directory.
    """

    data: DataSpec
    model: ModelSpec
    backends: dict[str, Backend]
    reference: str | None
    seed: int
    budget: str
    threads: int
    out: Path

    def request(self) -> dict[str, Any]:
        """What makes two comparisons the same one."""
        return {
            "schema": SCHEMA,
            "data": self.data.to_json(),
            "model": self.model.to_json(),
            "seed": self.seed,
            "backends": {name: repr(backend) for name, backend in self.backends.items()},
        }


def compare(what: Comparison, *, overwrite: bool = False, listen: Listener | None = None) -> dict[str, Any]:
    """Fit, score and keep every backend that is not finished yet; then measure distances to the reference.

    Args:
        what: The comparison.
        overwrite: Start anew where a comparison is there already.
        listen: Called as ``listen(event, backend, row)`` with "start", "reuse", "done" and "failed".

    Returns:
        The content of ``results.json``.

    Raises:
        UsageError: If the data or the directory cannot be used.
        Interrupted: On Ctrl-C; finished rows stay.
    """
    tell = listen or (lambda event, backend, row: None)
    data = what.data.load()
    model = what.model.build(data)
    folder = RunFolder(what.out)
    folder.open(what.request(), overwrite=overwrite)
    with _threads(what.threads), _ctrl_c() as pressed:
        for name, backend in what.backends.items():
            row = folder.row(name)
            if row is not None:
                tell("reuse", name, row)
                continue
            tell("start", name, {})
            row, arrays = _run(name, backend, what, model, data, folder, pressed)
            folder.write_row(row, arrays)
            tell(row["status"], name, row)
    return collect(what, data, model, folder)


def collect(what: Comparison, data: Dataset, model: Any, folder: RunFolder) -> dict[str, Any]:
    """Gather all rows, measure distances and write ``results.json``.

    Args:
        what: The comparison.
        data: Its data.
        model: Its model.
        folder: Where the rows are.

    Returns:
        The content of ``results.json``.
    """
    names = list(read_json(folder.path / "comparison.json")["backends"])
    files = {name: folder.path / "rows" / f"{name}.json" for name in names}
    rows = [read_json(file) for file in files.values() if file.exists()]
    arrays = {row["backend"]: folder.arrays(row["backend"]) for row in rows if row["status"] == "done"}
    floor = add_distances(rows, arrays, what.reference)
    results = {
        "schema": SCHEMA,
        "data": data.metadata(),
        "model": {
            **what.model.to_json(),
            "repr": repr(model),
            "likelihood": what.model.likelihood_text(data.num_classes),
        },
        "settings": {"seed": what.seed, "budget": what.budget, "reference": what.reference, "threads": what.threads},
        "environment": environment(what.threads),
        "noise_floor": floor,
        "rows": rows,
    }
    write_json(folder.path / "results.json", results)
    return results


def _run(
    name: str,
    backend: Backend,
    what: Comparison,
    model: Any,
    data: Dataset,
    folder: RunFolder,
    pressed: threading.Event,
) -> tuple[dict[str, Any], Arrays | None]:
    """One row and its arrays; an error of the backend becomes a failed row."""
    row: dict[str, Any] = {"backend": name, "status": "done", "hyperparameters": repr(backend), "seed": what.seed}
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit keeps its own warnings, and the report shows them
            posterior = backend.fit(model, data.x_train, data.y_train, seed=what.seed)
            if pressed.is_set():  # samplers return what they have; half a run must not pass for a finished one
                raise KeyboardInterrupt
            arrays = _examine(row, posterior, data, what.seed)
            save_run(folder.posterior_path(name), posterior, what.model, data, overwrite=True)
            row["netcdf"] = write_netcdf(posterior, folder.arviz_path(name), seed=what.seed)
    except KeyboardInterrupt as err:
        if pressed.is_set() or not err.args:
            raise Interrupted(name) from err
        return _failed(row, err, began), None
    except Exception as err:  # noqa: BLE001  any failure of one backend is a row of the table, not the end of it
        return _failed(row, err, began), None
    return row, arrays


def _failed(row: dict[str, Any], err: BaseException, began: float) -> dict[str, Any]:
    message = " ".join(str(err).split()) or "no message"
    cost = {"seconds": time.perf_counter() - began}
    return {**row, "status": "failed", "error": {"type": type(err).__name__, "message": message}, "cost": cost}


def _examine(row: dict[str, Any], posterior: Posterior, data: Dataset, seed: int) -> Arrays:
    """Fill a row from a posterior; returns the arrays."""
    began = time.perf_counter()
    found = evaluate(posterior, data, seed)
    row["scores"] = found.scores
    probes = data.x_test[:_MAX_PROBES]
    diagnosis = posterior.diagnose(probes)
    row["diagnosis"] = diagnosis.summary()
    row["warnings"] = list(dict.fromkeys(diagnosis.warnings))
    evidence = posterior.log_evidence_or_none
    # A density of y in original units is 1 / y_std of the standardised one, once per datum.
    row["log_evidence"] = None if evidence is None else evidence - len(data.y_train) * data.nll_offset
    info = posterior.info
    row["cost"] = {
        "seconds": info.seconds,
        "gradients": info.gradients,
        "peak_bytes": info.peak_bytes,
        "examine_seconds": time.perf_counter() - began,
    }
    row["extra"] = info.extra
    if np.isfinite(diagnosis.rhat_functions).any():
        found.arrays.update(_traces(posterior, probes, diagnosis.rhat_functions, data))
    return found.arrays


def _traces(posterior: Posterior, probes: torch.Tensor, rhat: np.ndarray, data: Dataset) -> Arrays:
    """Chains of f at the worst test input, one at the 90 % quantile of R-hat, the median and the best one."""
    per_input = np.nan_to_num(rhat.reshape(len(probes), -1).max(axis=1), nan=1.0)
    order = np.argsort(per_input)
    places = np.unique(np.round(np.array([1.0, 0.9, 0.5, 0.0]) * (len(order) - 1)).astype(int))[::-1]
    chosen = order[places[:_NUM_TRACES]]
    values = function_draws(posterior, probes[torch.as_tensor(chosen.copy())])  # (C, S, T, ...)
    if values.ndim == 4:  # logits: of two classes their difference, else the first class against the mean
        values = values[..., -1] - values[..., 0] if values.shape[-1] == 2 else values[..., 0] - values.mean(axis=-1)
    if data.task == "regression":
        values = values * data.y_std + data.y_mean
    step = -(-values.shape[1] // _MAX_TRACE)
    return {"trace": values[:, ::step], "trace_input": chosen, "trace_rhat": per_input[chosen], "rhat": per_input}


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Remember Ctrl-C: samplers answer it by returning their draws so far."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def handle(number: int, frame: Any) -> None:
        pressed.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    except KeyboardInterrupt as err:
        raise Interrupted from err
    finally:
        signal.signal(signal.SIGINT, before)
