"""Conversion to ArviZ: the only file that builds InferenceData, so that another ArviZ release means one change."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import arviz as az
import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from inference.data import chunks
from inference.prediction import DrawSource, Prediction

if TYPE_CHECKING:
    from inference.posterior import Posterior

# PSIS-LOO and R-hat need a handful of draws; a point estimate repeats its one.
_MIN_DRAWS = 4
_PRIOR_DRAWS = 100


def to_inference_data(
    posterior: Posterior, *, weights: bool = True, num_samples: int | None = None, seed: int = 0
) -> az.InferenceData:
    """Convert a posterior.

    Args:
        posterior: The posterior.
        weights: Include the latent sites in the groups posterior and prior.
        num_samples: Draws of a continuous posterior (default 1000).
        seed: Random seed.

    Returns:
        Groups posterior, posterior_predictive, prior, log_likelihood, observed_data, sample_stats.
    """
    target = posterior.target
    draws, stats = _draws(posterior, num_samples, seed)
    num_chains, num_draws = draws.shape[:2]
    flat = draws.reshape(-1, draws.shape[-1])
    observed = target.observed
    prediction = Prediction(DrawSource(target, flat, flat.new_full((len(flat),), 1 / len(flat)), target.x), target.num_data, seed)
    log_likelihood = _log_likelihood(target, flat).reshape(num_chains, num_draws, -1)
    sampled = prediction.sample(len(flat), seed).reshape(num_chains, num_draws, *target.y.shape)
    function = prediction.component_functions()
    function = function.reshape(num_chains, num_draws, *function.shape[1:])
    stats = {**stats, "lp": stats.get("lp", _log_density(target, flat).reshape(num_chains, num_draws))}
    coords, dims = _coordinates(posterior, observed, function)
    groups: dict[str, Any] = {
        "posterior_predictive": {observed: _numpy(sampled), "f": _numpy(function)},
        "log_likelihood": {observed: _numpy(log_likelihood)},
        "sample_stats": {k: _numpy(v) for k, v in stats.items()},
        "observed_data": {observed: _numpy(target.y)},
    }
    if weights:
        groups["posterior"] = {k: _numpy(v) for k, v in target.unravel(draws).items()}
        prior = target.unravel(target.sample_prior(_PRIOR_DRAWS, seed))
        groups["prior"] = {k: _numpy(v[None]) for k, v in prior.items()}
    else:
        groups["posterior"] = {"f": _numpy(function)}
    attrs = {
        "inference_library": "bnn-zoo",
        "inference_library_version": _version(),
        "backend": repr(posterior.backend),
        "seconds": posterior.info.seconds,
        "gradient_evaluations": posterior.info.gradients,
    }
    return az.from_dict(**groups, coords=coords, dims=dims, attrs=attrs)


def _draws(posterior: Posterior, num_samples: int | None, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws (C, S, P) with equal weights, and their statistics."""
    from inference.posterior import DrawsPosterior

    if not isinstance(posterior, DrawsPosterior):
        return posterior.sample(num_samples or 1000, seed)[None], {}
    draws, weights = posterior.draws, posterior.weights
    count = draws.shape[0] * draws.shape[1]
    if (weights - 1 / count).abs().max() > 1e-9:
        return posterior.sample(num_samples or max(count, _MIN_DRAWS), seed)[None], {}
    if draws.shape[1] < _MIN_DRAWS:
        repeats = -(-_MIN_DRAWS // draws.shape[1])
        return draws.repeat(1, repeats, 1), {}
    return draws, dict(posterior.sample_stats)


def _log_likelihood(target: Any, thetas: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([vmap(target.log_likelihood)(thetas[part]) for part in chunks(len(thetas), 50)])


def _log_density(target: Any, thetas: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([vmap(target.log_density)(thetas[part]) for part in chunks(len(thetas), 50)])


def _coordinates(posterior: Posterior, observed: str, function: Tensor) -> tuple[dict[str, Any], dict[str, list[str]]]:
    target = posterior.target
    coords: dict[str, Any] = {"obs_id": np.arange(target.num_data)}
    dims: dict[str, list[str]] = {observed: ["obs_id"], "f": ["obs_id"]}
    for name, shape in ((observed, target.y.shape[1:]), ("f", function.shape[3:])):
        extra = [f"{name}_dim_{i}" for i in range(len(shape))]
        dims[name] = ["obs_id", *extra]
        coords.update({dim: np.arange(size) for dim, size in zip(extra, shape, strict=True)})
    for site in target.all_sites:
        names = [f"{site.name}_dim_{i}" for i in range(len(site.shape))]
        dims[site.name] = names
        coords.update({dim: np.arange(size) for dim, size in zip(names, site.shape, strict=True)})
    return coords, dims


def _numpy(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().numpy()


def _version() -> str:
    return version("bnn-zoo")
