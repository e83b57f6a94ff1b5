"""How much each backend may do: hyperparameters per backend and budget, and the user's changes to them."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnn_zoo.data.registry import did_you_mean
from bnn_zoo.errors import UsageError, usage
from inference.backend import Backend
from inference.point.map import MAP
from inference.registry import BACKENDS, find_backend

NINE = (
    "map",
    "mean_field_vi",
    "hmc",
    "nuts",
    "dense_laplace",
    "diagonal_laplace",
    "swag",
    "deep_ensemble",
    "svgd",
)

# demo: all nine on UCI energy (N = 691, P = 502) in about two minutes on one core; standard: what a paper would run,
# ten minutes or so; long: until the chains agree. Whatever is not named here keeps the backend's own default.
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "map": {"num_steps": 2000},
        "mean_field_vi": {"num_steps": 5000},
        "hmc": {"num_samples": 100, "warmup_steps": 150, "num_chains": 2, "max_leapfrogs": 100},
        "nuts": {"num_samples": 250, "warmup_steps": 200, "num_chains": 4, "max_tree_depth": 7},
        "chees_hmc": {"num_samples": 100, "warmup_steps": 150, "max_leapfrogs": 100},
        "mclmc": {"num_samples": 5000, "warmup_steps": 2000},
        "mile": {"num_samples": 2000, "warmup_steps": 3000, "num_chains": 4},
        "dense_laplace": {"start": MAP(num_steps=2000)},
        "diagonal_laplace": {"start": MAP(num_steps=2000)},
        "swag": {"num_steps": 6000, "batch_size": 100, "optimiser": "adam"},
        "deep_ensemble": {"num_members": 5, "num_steps": 2000},
        "svgd": {"num_particles": 20, "num_steps": 1000},
        "pyro_guide_vi": {"num_steps": 1000},
        "pyro_mcmc": {"num_samples": 50, "warmup_steps": 50},
    },
    "standard": {
        "map": {"num_steps": 5000},
        "mean_field_vi": {"num_steps": 20_000},
        "hmc": {"num_samples": 500, "warmup_steps": 500, "num_chains": 4, "max_leapfrogs": 500},
        "nuts": {"num_samples": 500, "warmup_steps": 500, "num_chains": 4, "max_tree_depth": 8},
        "chees_hmc": {"num_samples": 300, "warmup_steps": 300, "max_leapfrogs": 500},
        "mclmc": {"num_samples": 20_000, "warmup_steps": 5000},
        "mile": {"num_samples": 5000, "warmup_steps": 10_000},
        "dense_laplace": {"start": MAP(num_steps=5000)},
        "diagonal_laplace": {"start": MAP(num_steps=5000)},
        "swag": {"num_steps": 20_000, "batch_size": 100, "optimiser": "adam"},
        "deep_ensemble": {"num_members": 10, "num_steps": 5000},
        "svgd": {"num_particles": 50, "num_steps": 3000},
        "pyro_guide_vi": {"num_steps": 5000},
        "pyro_mcmc": {},
    },
    "long": {
        "map": {"num_steps": 10_000, "num_restarts": 4},
        "mean_field_vi": {"num_steps": 50_000, "num_particles": 4},
        "hmc": {"num_samples": 2000, "warmup_steps": 2000, "num_chains": 8, "max_leapfrogs": 1000},
        "nuts": {"num_samples": 2000, "warmup_steps": 2000, "num_chains": 8, "max_tree_depth": 10},
        "chees_hmc": {"num_samples": 1000, "warmup_steps": 1000},
        "mclmc": {"num_samples": 100_000, "warmup_steps": 20_000},
        "mile": {},
        "dense_laplace": {"start": MAP(num_steps=10_000, num_restarts=4)},
        "diagonal_laplace": {"start": MAP(num_steps=10_000, num_restarts=4)},
        "swag": {"num_steps": 100_000, "batch_size": 100, "optimiser": "adam"},
        "deep_ensemble": {"num_members": 20, "num_steps": 10_000},
        "svgd": {"num_particles": 100, "num_steps": 10_000},
        "pyro_guide_vi": {"num_steps": 20_000},
        "pyro_mcmc": {},
    },
}


def parse_backends(text: str) -> tuple[str, ...]:
    """Backend names from a text such as ``map,nuts``.

    Args:
        text: Names separated by commas; class names are understood as well.

    Returns:
        Command-line names, each once, in the order given.

    Raises:
        UsageError: If a name is unknown or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(
            "--backends must name at least one backend, such as map,nuts; `bnn-zoo list backends` shows all"
        )
    with usage():
        return tuple(dict.fromkeys(find_backend(name).name for name in names))


def make_backends(
    names: Iterable[str], budget: str | Mapping[str, dict[str, Any]], changes: Sequence[str] = ()
) -> dict[str, Backend]:
    """Backends with the hyperparameters of a budget.

    Args:
        names: Command-line names.
        budget: One of :data:`BUDGETS`, or hyperparameters by backend.
        changes: Texts such as ``nuts.num_samples=500``.

    Returns:
        Backend by name, in order.

    Raises:
        UsageError: If the budget or a change is not possible.
    """
    if isinstance(budget, str):
        if budget not in BUDGETS:
            raise UsageError(f"unknown budget {budget!r}: {did_you_mean(budget, BUDGETS, 'budgets')}")
        budget = BUDGETS[budget]
    backends: dict[str, Backend] = {}
    for name in names:
        backends[name] = BACKENDS[name].cls(**budget.get(name, {}))
    asked: dict[str, list[tuple[list[str], Any]]] = {}
    texts: dict[str, list[str]] = {}
    for text in changes:
        name, path, value = _parse_change(text, backends)
        asked.setdefault(name, []).append((path, value))
        texts.setdefault(name, []).append(text)
    for name, found in asked.items():
        # At once, since one change may be possible with another only.
        with usage(f"--set {', '.join(texts[name])}: "):
            backends[name] = _changed(backends[name], found)
    return backends


def _parse_change(text: str, backends: dict[str, Backend]) -> tuple[str, list[str], Any]:
    left, equals, right = text.partition("=")
    name, *path = left.strip().split(".")
    if not equals or not path:
        raise UsageError(f"--set must look like nuts.num_samples=500, got {text!r}")
    if name not in backends:
        raise UsageError(
            f"--set {text}: {name!r} is not in this comparison: {did_you_mean(name, backends, 'backends')}"
        )
    try:
        return name, path, ast.literal_eval(right.strip())
    except (ValueError, SyntaxError):
        return name, path, right.strip()


def _changed(owner: Any, changes: Iterable[tuple[list[str], Any]]) -> Any:
    """A copy with fields changed; their paths lead through fields that hold backends (``start.num_steps``)."""
    fields = [f.name for f in dataclasses.fields(owner) if f.name != "progress"]
    values: dict[str, Any] = {}
    inside: dict[str, list[tuple[list[str], Any]]] = {}
    for (head, *rest), value in changes:
        if head not in fields:
            raise UsageError(f"{type(owner).__name__} has no {head!r}: {did_you_mean(head, fields, 'hyperparameters')}")
        if rest:
            inside.setdefault(head, []).append((rest, value))
        else:
            values[head] = value
    for head, further in inside.items():
        inner = values.get(head, getattr(owner, head))
        if not dataclasses.is_dataclass(inner):
            raise UsageError(f"{type(owner).__name__}.{head} is {inner!r}, which has no {further[0][0][0]!r}")
        values[head] = _changed(inner, further)
    return dataclasses.replace(owner, **values)
