"""Cheap hyperparameters of every backend: enough to run all of its code, far too little to converge."""

from __future__ import annotations

from typing import Any

from inference import BACKENDS, MAP, Backend

_NEAR = MAP(num_steps=4, polish=False, compile=False, progress=False)
# Small steps, so that no case of tests/cases.py leaves the region where it is finite.
CHEAP: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 4, "polish": False},
    "mean_field_vi": {"num_steps": 4},
    "hmc": {"num_samples": 6, "warmup_steps": 3, "num_chains": 2, "num_leapfrogs": 3, "step_size": 0.05},
    "nuts": {"num_samples": 6, "warmup_steps": 3, "num_chains": 2, "max_tree_depth": 3, "step_size": 0.05},
    "dense_laplace": {"start": _NEAR, "polish_steps": 2, "newton_steps": 0},
    "diagonal_laplace": {"start": _NEAR, "polish_steps": 2},
    "swag": {"num_steps": 12, "snapshot_every": 1, "max_rank": 4, "step_size": 1e-3, "averaging_step_size": 1e-3},
    "deep_ensemble": {"num_members": 5, "num_steps": 4},
    "svgd": {"num_particles": 5, "num_steps": 4},
    "pyro_guide_vi": {"num_steps": 4, "num_samples": 10},
    "pyro_mcmc": {"options": {"max_tree_depth": 2}, "num_samples": 6, "warmup_steps": 3, "num_chains": 2},
}
# The fewest draws each backend can be asked for.
SMALLEST: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 1},
    "mean_field_vi": {"num_steps": 1},
    "hmc": {"num_samples": 1, "warmup_steps": 0, "num_chains": 1},
    "nuts": {"num_samples": 1, "warmup_steps": 0, "num_chains": 1},
    "dense_laplace": {"polish_steps": 0},
    "diagonal_laplace": {"polish_steps": 0},
    "swag": {"num_steps": 4, "max_rank": 2},
    "deep_ensemble": {"num_members": 1, "num_steps": 1},
    "svgd": {"num_particles": 1, "num_steps": 1},
    "pyro_guide_vi": {"num_samples": 1, "num_steps": 1},
    "pyro_mcmc": {"num_samples": 1, "warmup_steps": 0, "num_chains": 1},
}


def cheap(name: str, **changes: Any) -> Backend:
    """A backend of this name on a tiny budget.

    Args:
        name: Key of ``BACKENDS``.
        changes: Fields to override.

    Returns:
        The backend.
    """
    fields = {"compile": False, "progress": False, **CHEAP[name], **changes}
    return BACKENDS[name].cls(**fields)
