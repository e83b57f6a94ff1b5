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
from inference.linearised import LinearisedDraws
from inference.linearised_draws import LinearisedDrawsPosterior, LinearisedProducts
from inference.partial import PartialDrawsPosterior
from inference.prediction import DrawSource, Prediction, Source, draws_per_chunk
from inference.target import Target

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
        Groups posterior, posterior_predictive, prior, log_likelihood, observed_data, sample_stats; the fixed sites of a
        restricted target are in constant_data.
    """
    target = posterior.target
    if isinstance(posterior, PartialDrawsPosterior):
        return _partial(posterior, weights)
    draws, stats = _draws(posterior, num_samples, seed)
    lead = draws.shape[:2]
    flat = draws.reshape(-1, draws.shape[-1])
    observed = target.observed
    source = _source(posterior, flat)
    prediction = Prediction(source, target.num_data, seed)
    function = prediction.component_functions()
    prior_density, log_likelihood = _joint(target, flat)
    if "lp" not in stats:
        joint = (prior_density + log_likelihood.sum(-1) / target.likelihood_temperature) / target.temperature
        stats["lp"] = joint.reshape(lead)
    if isinstance(source, (LinearisedDraws, LinearisedProducts)):  # judged by what it predicts
        log_likelihood = prediction.component_log_prob(target.y)
    latent = _latent_name(target)
    coords, dims = _coordinates(target, latent, function)
    shaped = function.reshape(*lead, *function.shape[1:])
    groups: dict[str, Any] = {
        "posterior_predictive": {
            observed: _numpy(prediction.sample(len(flat), seed).reshape(*lead, *target.y.shape)),
            latent: _numpy(shaped),
        },
        "log_likelihood": {observed: _numpy(log_likelihood.reshape(*lead, -1))},
        "sample_stats": {k: _numpy(v) for k, v in stats.items()},
        "observed_data": {observed: _numpy(target.y)},
    }
    if weights:
        free = {s.name for s in target.sites}
        groups["posterior"] = {k: _numpy(v) for k, v in target.unravel(draws).items() if k in free}
        prior = target.unravel(target.sample_prior(_PRIOR_DRAWS, seed))
        groups["prior"] = {k: _numpy(v[None]) for k, v in prior.items() if k in free}
        fixed = {k: _numpy(v) for k, v in target.unravel(flat[0]).items() if k not in free}
        if fixed:
            groups["constant_data"] = fixed
    else:
        groups["posterior"] = {latent: _numpy(shaped)}
    return az.from_dict(**groups, coords=coords, dims=dims, attrs=_attributes(posterior))


def _attributes(posterior: Posterior) -> dict[str, Any]:
    return {
        "inference_library": "bnn-zoo",
        "inference_library_version": _version(),
        "backend": repr(posterior.backend),
        "seconds": posterior.info.seconds,
        "gradient_evaluations": posterior.info.gradients,
    }


def _partial(posterior: PartialDrawsPosterior, weights: bool) -> az.InferenceData:
    """What is known where only some sites were kept: those, the function values on record, statistics and data."""
    target, values = posterior.target, posterior.probe_values
    groups: dict[str, Any] = {
        "sample_stats": {k: _numpy(v) for k, v in posterior.sample_stats.items()},
        "observed_data": {target.observed: _numpy(target.y)},
    }
    if weights:
        groups["posterior"] = {k: _numpy(v) for k, v in posterior.kept_sites().items()}
    if values is not None:
        groups["posterior_predictive" if weights else "posterior"] = {_latent_name(target): _numpy(values)}
    return az.from_dict(**groups, attrs=_attributes(posterior))


def _draws(posterior: Posterior, num_samples: int | None, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws (C, S, P) with equal weights, and their statistics."""
    from inference.posterior import DrawsPosterior

    if not isinstance(posterior, DrawsPosterior):
        return posterior.sample(num_samples or 1000, seed)[None], {}
    draws = posterior.draws
    count = draws.shape[0] * draws.shape[1]
    if not posterior.equally_weighted:
        return posterior.sample(num_samples or max(count, _MIN_DRAWS), seed)[None], {}
    if draws.shape[1] < _MIN_DRAWS:
        repeats = -(-_MIN_DRAWS // draws.shape[1])
        return draws.repeat(1, repeats, 1), {k: v.repeat(1, repeats) for k, v in posterior.sample_stats.items()}
    return draws, dict(posterior.sample_stats)


def _source(posterior: Posterior, flat: Tensor) -> Source:
    """Components in the order of the draws; those of the linearised network where the posterior predicts with it."""
    from inference.posterior import GaussianPosterior

    target = posterior.target
    if isinstance(posterior, GaussianPosterior) and posterior.linearized:
        return LinearisedDraws(target, posterior.gaussian, flat, target.x)
    if isinstance(posterior, LinearisedDrawsPosterior):
        return posterior.source(target.x, thetas=flat)
    return DrawSource(target, flat, flat.new_full((len(flat),), 1 / len(flat)), target.x)


def _joint(target: Target, thetas: Tensor) -> tuple[Tensor, Tensor]:
    """Log prior (S,) and log-likelihood per datum (S, N) of draws, a few at a time."""
    single = vmap(lambda theta: target.programs.joint(target.expand(theta), target.x, target.y))
    size = draws_per_chunk(target.recorded())
    with torch.no_grad():
        parts = [single(thetas[part]) for part in chunks(len(thetas), size)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _latent_name(target: Target) -> str:
    """Name for the latent function that no site of the model has."""
    taken = {s.name for s in target.all_sites} | {target.observed}
    return "f" if "f" not in taken else "latent_function"


def _coordinates(target: Target, latent: str, function: Tensor) -> tuple[dict[str, Any], dict[str, list[str]]]:
    coords: dict[str, Any] = {"obs_id": np.arange(target.num_data)}
    dims: dict[str, list[str]] = {}
    shapes = {target.observed: target.y.shape[1:], latent: function.shape[2:]}
    shapes.update({site.name: torch.Size(site.shape) for site in target.all_sites})
    for name, shape in shapes.items():
        own = [f"{name}_dim_{i}" for i in range(len(shape))]
        dims[name] = (["obs_id"] if name in (target.observed, latent) else []) + own
        coords.update({dim: np.arange(size) for dim, size in zip(own, shape, strict=True)})
    return coords, dims


def _numpy(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().numpy()


def _version() -> str:
    return version("bnn-zoo")
