r"""Pareto-smoothed importance sampling: is the approximation close enough to correct by weighting?

With S draws from the approximation q, the weights :math:`r_s = p(D, \theta_s) / q(\theta_s)` have a tail that a
generalised Pareto distribution describes. Its shape k says how many moments the weights have: below 0.5 good, up to 0.7
usable, above it the weighted average converges too slowly to be trusted, and the approximation is far from the target.

In many dimensions (P above about a thousand) k passes 1 for every Gaussian approximation of a network: then report it
for a subset of layers as well.

Source: vehtari2024psis (JMLR 25(72)); the fit is zhang2009gpd, as in ArviZ 0.23; the use as a diagnostic of an
approximation is yao2018yes [recalled from the paper, not re-read].
"""

import numpy as np

from inference.arrays import Array, Floats, as_floats

_MINIMUM_TAIL = 5
_PRIOR_SIZE = 10  # the prior on k counts as this many tail draws ...
_PRIOR_SHAPE = 0.5  # ... with this shape


def psis_khat(log_ratios: Array) -> float:
    """Shape k of the generalised Pareto distribution fitted to the largest min(S / 5, 3 sqrt(S)) weights.

    Args:
        log_ratios: Log of joint density over approximate density at draws from the approximation, nats, any constant
            added, shape (S,); minus infinity for draws that the target excludes.

    Returns:
        k-hat; minus infinity if the ratios are all equal up to rounding (a perfect approximation), infinity if fewer
        than 5 draws are in the tail.

    Raises:
        ValueError: If log_ratios is empty, not one-dimensional, all minus infinity, or holds NaN or plus infinity.

    Example:
        >>> psis_khat([0.0] * 100)
        -inf
    """
    return _smooth(_check_log_ratios(log_ratios))[1]


def psis_weights(log_ratios: Array) -> Floats:
    """Importance weights with their largest values replaced by the quantiles of the fitted Pareto tail.

    Args:
        log_ratios: Log of joint density over approximate density at draws from the approximation, nats, shape (S,).

    Returns:
        Weights that sum to 1, shape (S,).

    Raises:
        ValueError: If log_ratios is empty, not one-dimensional, all minus infinity, or holds NaN or plus infinity.
    """
    smoothed, _ = _smooth(_check_log_ratios(log_ratios))
    weights = np.exp(smoothed)  # the largest is about 1
    return weights / weights.sum()


def _check_log_ratios(log_ratios: Array) -> Floats:
    """The log ratios in float64."""
    values = as_floats("log_ratios", log_ratios)
    if values.ndim != 1:
        raise ValueError(f"log_ratios must have shape (S,) with S >= 1, got {values.shape}; pass one ratio per draw")
    if np.isnan(values).any() or values.max() in {np.inf, -np.inf}:
        raise ValueError(
            "log_ratios must be finite or minus infinity, and not all minus infinity; "
            "look for draws where the model or the approximation has no finite log density"
        )
    return values


def _smooth(log_ratios: Floats) -> tuple[Floats, float]:
    """Smoothed log weights, at most 0 and not normalised, and k-hat."""
    num_draws = len(log_ratios)
    rounding = 1e-9 * max(1.0, abs(float(log_ratios.max())))
    shifted = log_ratios - log_ratios.max()
    if shifted.min() >= -rounding:
        return shifted, -np.inf
    order = np.argsort(shifted)
    tail_size = int(np.ceil(min(num_draws / 5, 3 * num_draws**0.5)))
    if tail_size >= num_draws:
        return shifted, np.inf
    cutoff = max(shifted[order[-tail_size - 1]], np.log(np.finfo(np.float64).tiny))
    tail = order[np.searchsorted(shifted[order], cutoff, side="right") :]  # ascending, strictly above the cutoff
    if len(tail) < _MINIMUM_TAIL:
        return shifted, np.inf
    excess = np.exp(shifted[tail]) - np.exp(cutoff)
    with np.errstate(all="ignore"):
        khat, scale = _fit_generalised_pareto(excess)
    if np.isfinite(khat) and np.isfinite(scale):  # a tail of one repeated value has no scale
        probability = np.arange(0.5, len(tail)) / len(tail)
        quantiles = scale * _standard_pareto_quantile(probability, khat)
        shifted[tail] = np.minimum(np.log(quantiles + np.exp(cutoff)), 0.0)
    return shifted, float(khat)


def _standard_pareto_quantile(probability: Floats, shape: float) -> Floats:
    """Quantiles of the generalised Pareto distribution of scale 1."""
    exponential = -np.log1p(-probability)
    return exponential if abs(shape) < np.finfo(np.float64).eps else np.expm1(shape * exponential) / shape


def _fit_generalised_pareto(excess: Floats) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution from ascending excesses, by Zhang and Stephens' estimator.

    The profile likelihood of b = -shape / scale is averaged over a grid that a weak prior spans; the shape is then
    drawn towards 1/2 as if 10 more draws had shown it.

    Returns:
        Shape and scale; NaN where the fit fails.
    """
    n = len(excess)
    grid_size = 30 + int(n**0.5)
    lower_quartile = excess[int(n / 4 + 0.5) - 1]
    b = 1 / excess[-1] + (1 - np.sqrt(grid_size / (np.arange(1, grid_size + 1) - 0.5))) / (3 * lower_quartile)
    shapes = np.log1p(-b[:, None] * excess).mean(axis=1)
    profile = n * (np.log(-b / shapes) - shapes - 1)
    weights = 1 / np.exp(profile - profile[:, None]).sum(axis=1)
    relevant = weights >= 10 * np.finfo(np.float64).eps
    b_mean = float(np.sum(b[relevant] * weights[relevant]) / np.sum(weights[relevant]))
    shape = float(np.log1p(-b_mean * excess).mean())
    return (n * shape + _PRIOR_SIZE * _PRIOR_SHAPE) / (n + _PRIOR_SIZE), -shape / b_mean
