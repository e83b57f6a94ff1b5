"""Saved posteriors of the command line: the posterior, and beside it the model and the data's preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bnn_zoo.data import DataError, Dataset, Preprocessor
from bnn_zoo.errors import UsageError, usage
from bnn_zoo.evaluate import predict
from bnn_zoo.models import ModelSpec
from bnn_zoo.run_folder import read_json, write_json
from inference.posterior import Posterior
from inference.storage import FILE_NAME, load

_ABOUT = "run.json"
_FORMAT = "bnn-zoo run"


@dataclass(frozen=True)
class SavedRun:
    """A posterior read back from disk.

    Attributes:
        posterior: Ready to predict.
        model: Its model.
        data: Name, task, target, unit and classes of what it was fitted to.
        preprocessor: Turns new rows into inputs; None for images.
    """

    posterior: Posterior
    model: ModelSpec
    data: dict[str, Any]
    preprocessor: Preprocessor | None


def save_run(path: Path, posterior: Posterior, model: ModelSpec, data: Dataset, *, overwrite: bool) -> None:
    """Save a posterior with all that `predict` needs.

    Args:
        path: Directory.
        posterior: What to save.
        model: Its model.
        data: What it was fitted to.
        overwrite: Replace one that is there.

    Raises:
        UsageError: If there is one already, or it cannot be written.
    """
    check_new(path, overwrite=overwrite)
    with usage():
        posterior.save(path, overwrite=True)
        write_json(
            path / _ABOUT,
            {
                "format": _FORMAT,
                "model": model.to_json(),
                "data": data.metadata(),
                "preprocessor": data.preprocessor.to_json() if data.preprocessor else None,
            },
        )


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a directory that a run must not be saved to.

    Args:
        path: Directory.
        overwrite: Replace a run that is there.

    Raises:
        UsageError: If there is a run already, or ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file; give a directory")
    if (path / FILE_NAME).exists() and not overwrite:
        raise UsageError(f"{path} holds a saved posterior already; give another --out, or --overwrite to replace it")


def open_run(path: Path) -> SavedRun:
    """Read a saved run.

    Args:
        path: Directory that `fit` or `compare` wrote.

    Returns:
        The run.

    Raises:
        UsageError: If there is none, or it is damaged.
    """
    if not (path / FILE_NAME).exists():
        inner = sorted(p.parent.name for p in path.glob(f"posteriors/*/{FILE_NAME}"))
        hint = f"; it is a comparison: give one of its posteriors, {path / 'posteriors' / inner[0]}" if inner else ""
        raise UsageError(f"no saved posterior in {path}{hint}; `bnn-zoo fit --out {path}` writes one")
    if not (path / _ABOUT).exists():
        raise UsageError(f"{path} has a posterior but no {_ABOUT}: it was saved in Python; load it with inference.load")
    about = read_json(path / _ABOUT)
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise UsageError(f"{path / _ABOUT} was not written by bnn-zoo fit or compare")
    model = ModelSpec.from_json(about["model"])
    with usage():
        posterior = load(path, model.build_for(about["data"]["num_features"], len(about["data"]["class_names"])))
    held = about["preprocessor"]
    return SavedRun(posterior, model, about["data"], Preprocessor.from_json(held) if held else None)


def predict_table(run: SavedRun, frame: pd.DataFrame, level: float = 0.9, seed: int = 0) -> pd.DataFrame:
    """Predictions for the rows of a table, in original units.

    Args:
        run: The saved run.
        frame: New rows with the columns it was fitted to.
        level: Probability inside the interval.
        seed: Seed of the predictive draws.

    Returns:
        For a regression: mean, stddev, lower, upper; for classes: the label and one probability each. Row order kept.

    Raises:
        UsageError: If the rows do not fit, or the level is no probability.
    """
    if run.preprocessor is None:
        raise UsageError(
            f"{run.data['name']!r} is not a table of columns; predict in Python: inference.load(...).predict(x)"
        )
    if not 0 < level < 1:
        raise UsageError(f"--level must be between 0 and 1, got {level}")
    try:
        x = run.preprocessor.transform(frame, dtype=run.posterior.target.dtype)
    except DataError as err:
        raise UsageError(str(err)) from err
    prediction = predict(run.posterior, x, seed)
    if run.data["task"] == "classification":
        probs, names = prediction.probs.double().numpy(), run.data["class_names"]
        columns: dict[str, Any] = {"label": np.array(names)[probs.argmax(axis=1)]}
        columns |= {f"p({name})": probs[:, k] for k, name in enumerate(names)}
        columns["entropy"] = prediction.entropy.double().numpy()
        columns["mutual_information"] = prediction.mutual_information.double().numpy()
        return pd.DataFrame(columns)
    scale, shift = run.data["y_std"], run.data["y_mean"]
    lower, upper = prediction.interval(level)
    columns = {
        "mean": prediction.mean.double() * scale + shift,
        "stddev": prediction.stddev.double() * scale,
        "lower": lower.double() * scale + shift,
        "upper": upper.double() * scale + shift,
        "epistemic_stddev": prediction.epistemic_variance.double().sqrt() * scale,
    }
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})
