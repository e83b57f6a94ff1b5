"""Cheap hyperparameters of every backend: enough to run all of its code, far too little to converge."""

from __future__ import annotations

from typing import Any

from inference import BACKENDS, MAP, Backend, DeepEnsemble

_NEAR = MAP(num_steps=4, polish=False, compile=False, progress=False)
_MEMBERS = DeepEnsemble(num_steps=4, compile=False, progress=False)
_STEPS = {"step_size": 0.05, "decoherence_length": 1.0}
# Small steps, so that no case of tests/cases.py leaves the region where it is finite.
CHEAP: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 4, "polish": False},
    "mean_field_vi": {"num_steps": 4},
    "pathfinder": {"max_steps": 4, "num_elbo_draws": 2},
    "hmc": {"num_samples": 6, "warmup_steps": 3, "num_chains": 2, "num_leapfrogs": 3, "step_size": 0.05},
    "nuts": {"num_samples": 6, "warmup_steps": 3, "num_chains": 2, "max_tree_depth": 3, "step_size": 0.05},
    # One chain must do as well as two, so nothing is learnt across them.
    "chees_hmc": {
        "num_samples": 6,
        "warmup_steps": 3,
        "num_chains": 2,
        "adapt": False,
        "step_size": 0.05,
        "trajectory_length": 0.2,
        "start": _NEAR,
    },
    "mclmc": {**_STEPS, "num_samples": 6, "warmup_steps": 3, "num_chains": 2, "thinning": 1},
    "mile": {**_STEPS, "num_samples": 6, "warmup_steps": 3, "num_chains": 2, "thinning": 1, "start": _MEMBERS},
    "dense_laplace": {"start": _NEAR, "polish_steps": 2, "newton_steps": 0},
    "diagonal_laplace": {"start": _NEAR, "polish_steps": 2},
    "kronecker_laplace": {"start": _NEAR, "polish_steps": 2, "newton_steps": 0},
    "low_rank_laplace": {"start": _NEAR, "polish_steps": 2, "rank": 2},
    "functional_laplace": {"start": _NEAR, "polish_steps": 2},
    "sampled_laplace": {"start": _NEAR, "polish_steps": 2, "num_samples": 3, "num_steps": 4},
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
    "pathfinder": {"max_steps": 1, "num_elbo_draws": 1},
    "hmc": {"num_samples": 4, "warmup_steps": 0, "num_chains": 2, "step_size": 0.1},
    "nuts": {"num_samples": 4, "warmup_steps": 0, "num_chains": 2, "step_size": 0.1},
    "chees_hmc": {"num_samples": 4, "warmup_steps": 0, "num_chains": 2, "start": None},
    "mclmc": {"num_samples": 4, "warmup_steps": 0, "num_chains": 2},
    "mile": {"num_samples": 4, "warmup_steps": 0, "num_chains": 2, "start": None},
    "dense_laplace": {"polish_steps": 0},
    "diagonal_laplace": {"polish_steps": 0},
    "kronecker_laplace": {"polish_steps": 0},
    "low_rank_laplace": {"polish_steps": 0, "rank": 0},
    "functional_laplace": {"polish_steps": 0, "num_points": 1},
    "sampled_laplace": {"polish_steps": 0, "num_samples": 1, "num_steps": 1},
    "swag": {"num_steps": 4, "max_rank": 2},
    "deep_ensemble": {"num_members": 1, "num_steps": 1},
    "svgd": {"num_particles": 1, "num_steps": 1},
    "pyro_guide_vi": {"num_samples": 1, "num_steps": 1},
    "pyro_mcmc": {"num_samples": 1, "warmup_steps": 0, "num_chains": 2},
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
