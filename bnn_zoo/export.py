"""One NetCDF file per backend, of bounded size."""

from __future__ import annotations

import warnings
from pathlib import Path

from bnn_zoo.run_folder import replace
from inference.posterior import DrawsPosterior, Posterior

# Draws times data: posterior predictive, log likelihood and f each have as many numbers.
_MAX_VALUES = 400_000
_MAX_WEIGHTS = 5_000_000
_MIN_DRAWS = 100


def write_netcdf(posterior: Posterior, file: Path, seed: int = 0) -> dict[str, int | bool]:
    """Write a posterior as ArviZ's NetCDF; chains are thinned evenly where they would make a large file.

    Args:
        posterior: The posterior.
        file: Where to.
        seed: Seed of the predictive draws.

    Returns:
        What was written: number of draws, the thinning, and whether the weights are included.
    """
    most = max(_MIN_DRAWS, _MAX_VALUES // posterior.target.num_data)
    thinned, step = _thinned(posterior, most)
    if isinstance(thinned, DrawsPosterior):
        num_draws = thinned.draws.shape[0] * thinned.draws.shape[1]
    else:
        num_draws = min(most, 1000)
    weights = num_draws * posterior.target.dim <= _MAX_WEIGHTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        idata = thinned.to_arviz(weights=weights, num_samples=num_draws, seed=seed)
        replace(file, lambda temporary: idata.to_netcdf(str(temporary), engine="h5netcdf"))
    return {"draws": num_draws, "thinning": step, "weights": weights}


def _thinned(posterior: Posterior, most: int) -> tuple[Posterior, int]:
    if not isinstance(posterior, DrawsPosterior):
        return posterior, 1
    chains, draws = posterior.draws.shape[:2]
    step = -(-chains * draws // most)
    if step == 1:
        return posterior, 1
    kept = DrawsPosterior(
        posterior.target,
        posterior.draws[:, ::step],
        backend=posterior.backend,
        info=posterior.info,
        weights=posterior.weights[:, ::step],
        sample_stats={name: values[:, ::step] for name, values in posterior.sample_stats.items()},
        log_evidence=posterior.log_evidence_or_none,
    )
    return kept, step
