"""A comparison that takes seconds: three backends, five hidden units, a toy."""

from pathlib import Path
from typing import Any

from bnn_zoo.budgets import make_backends
from bnn_zoo.compare import Comparison
from bnn_zoo.models import ModelSpec
from bnn_zoo.tasks import DataSpec
from inference.backend import Backend

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 60, "compile": False},
    "mean_field_vi": {"num_steps": 80, "compile": False},
    "deep_ensemble": {"num_steps": 40, "num_members": 3, "compile": False},
    "nuts": {"num_samples": 8, "warmup_steps": 8, "num_chains": 2, "max_tree_depth": 3, "compile": False},
}


def settings(budget_names: str) -> list[str]:
    """`--set` options that make the backends tiny."""
    names = budget_names.split(",")
    return [f"--set={n}.{field}={value}" for n in names for field, value in HYPERPARAMETERS[n].items()]


def comparison(
    out: Path,
    data: str = "sine",
    backends: str = "map,mean_field_vi,nuts",
    changed: dict[str, Backend] | None = None,
    **changes: Any,
) -> Comparison:
    """What to compare; `changed` replaces backends, and `changes` the other fields."""
    fields: dict[str, Any] = {
        "data": DataSpec(name=data),
        "model": ModelSpec(hidden=(5,)),
        "backends": {**make_backends(backends.split(","), HYPERPARAMETERS), **(changed or {})},
        "reference": "nuts" if "nuts" in backends else None,
        "seed": 0,
        "budget": "demo",
        "threads": 1,
        "out": out,
    }
    return Comparison(**{**fields, **changes})
