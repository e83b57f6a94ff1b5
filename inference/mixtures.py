"""Mixtures of the declared likelihood: moments by the law of total variance, distribution functions and quantiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor

from inference.errors import CapabilityError
from inference.observation import LikelihoodFamily

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Moments:
    """Moments of y and f at some inputs, each (n, ...); variances, not standard deviations."""

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    f_mean: Tensor
    f_variance: Tensor


def mixture_moments(family: LikelihoodFamily, params: Params, weights: Tensor) -> Moments:
    """Law of total variance over mixture components.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        weights: (S,).

    Returns:
        Moments of y (of the one-hot y for class labels) and f.
    """
    if family.kind == "categorical":
        means = params["logits"].softmax(-1)
        variances = means * (1 - means)
    else:
        base = family.cls(**params, validate_args=False)
        means, variances = base.mean, base.variance
    mean, epistemic = weighted_moments(means, weights)
    f_mean, f_variance = weighted_moments(location(family, params), weights)
    return Moments(mean, average(variances, weights), epistemic, f_mean, f_variance)


def location(family: LikelihoodFamily, params: Params) -> Tensor:
    """The latent function f: loc, logits or log rate; the mean of any other family; (S, n, ...)."""
    if "loc" in params:
        return params["loc"]
    if "logits" in params:
        return params["logits"]
    if "rate" in params:
        return params["rate"].log()
    return family.cls(**params, validate_args=False).mean


def average(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the first dimension."""
    return torch.tensordot(weights, values, dims=1)


def weighted_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance (divided by the weight sum, not S - 1) over the first dimension."""
    mean = average(values, weights)
    return mean, average((values - mean).square(), weights)


def entropy(probs: Tensor) -> Tensor:
    """Entropy of the last dimension in nats, with 0 log 0 = 0."""
    return torch.special.entr(probs).sum(-1)


def component_cdf(family: LikelihoodFamily, params: Params, y: Tensor) -> Tensor:
    """Distribution function of every component.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        y: Points, broadcastable to (S, n, ...).

    Returns:
        (S, n, ...).

    Raises:
        CapabilityError: If the distribution has none.
    """
    if family.kind == "normal":
        return torch.special.ndtr((y - params["loc"]) / params["scale"])
    if family.kind == "student_t":
        z = ((y - params["loc"]) / params["scale"]).cpu().numpy()
        return torch.as_tensor(scipy.special.stdtr(params["df"].cpu().numpy(), z)).to(params["loc"])
    if family.kind == "poisson":
        counts = np.floor(y.cpu().numpy())
        below = scipy.special.pdtr(np.maximum(counts, 0), params["rate"].cpu().numpy())
        return torch.as_tensor(np.where(counts < 0, 0.0, below)).to(params["rate"])
    try:
        return family.cls(**params, validate_args=False).cdf(y)
    except NotImplementedError as err:
        raise CapabilityError(
            f"{family.cls.__name__} has no distribution function here, so neither cdf nor quantiles; use `.sample()`"
        ) from err


def mixture_quantile(family: LikelihoodFamily, params: Params, weights: Tensor, q: float) -> Tensor:
    """Quantile of a mixture by bisection on its distribution function, to rounding error.

    Args:
        family: The likelihood.
        params: Component parameters, each (S, n, ...).
        weights: (S,).
        q: Probability in (0, 1).

    Returns:
        (n, ...); the smallest integer reaching q for counts.
    """
    low, high = _bracket(family, params, q)
    low, high = _widen(family, params, weights, q, low, high)
    for _ in range(30 if low.dtype == torch.float32 else 55):
        middle = (low + high) / 2
        below = average(component_cdf(family, params, middle), weights) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.floor() if family.kind == "poisson" else (low + high) / 2


def _bracket(family: LikelihoodFamily, params: Params, q: float) -> tuple[Tensor, Tensor]:
    """First guess of an interval that holds the quantile of every component, (n, ...) each."""
    base = family.cls(**params, validate_args=False)
    if family.kind == "student_t":  # below two degrees of freedom there is no variance, below one no mean
        centre, spread = params["loc"], params["scale"]
    else:
        centre, spread = base.mean, base.stddev
    # Chebyshev's inequality: no quantile is further than sd / sqrt(tail) from its component's mean.
    reach = (1 + 1e-3) * spread / math.sqrt(min(q, 1 - q)) + torch.finfo(spread.dtype).tiny
    low, high = (centre - reach).amin(0), (centre + reach).amax(0)
    support: Any = getattr(base, "support", None)
    if family.kind == "other" and hasattr(support, "lower_bound"):  # such a class is not defined below it
        low = torch.maximum(low, torch.as_tensor(support.lower_bound).to(low))
        high = torch.maximum(high, low)
    return low, high


def _widen(
    family: LikelihoodFamily, params: Params, weights: Tensor, q: float, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Grow a bracket until it holds the quantile: heavy tails have no variance to bound it."""
    for _ in range(60):
        width = high - low
        short = average(component_cdf(family, params, low), weights) > q
        long = average(component_cdf(family, params, high), weights) < q
        if not bool(short.any() | long.any()):
            break
        low, high = torch.where(short, low - width, low), torch.where(long, high + width, high)
    return low, high
