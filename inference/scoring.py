r"""Scores of predictions: is the prediction any good?

Proper scores are returned per datum, so that a standard error of their mean can be had; smaller is better. Component
log-densities, means and draws have the draws first, (S, N, ...), and a prediction is their equal-weight mixture unless
weights are given. All functions take numpy arrays or torch tensors, compute in float64 and return numpy arrays.

Rescaling: with targets standardised by ``sd_y``, add ``log(sd_y)`` to a negative log-likelihood of one real target and
multiply RMSE, CRPS, W1 and interval widths by ``sd_y`` to have them in the original units.

Calibration, distances to a reference and out-of-distribution detection have files of their own, and are offered here.
"""

import numpy as np
from scipy.special import logsumexp, ndtr

from inference.arrays import (
    Array,
    Floats,
    as_finite,
    as_floats,
    check_alike,
    check_classification,
    check_weights,
    column_blocks,
)
from inference.calibration import (
    CalibrationBins,
    Uniformity,
    calibration_bins,
    classwise_ece,
    ece,
    ece_baseline,
    ece_null,
    interval_coverage,
    interval_width,
    mce,
    miscalibration_area,
    pit,
)
from inference.detection import aupr, auroc, fpr95
from inference.distances import agreement, total_variation, variance_ratio, wasserstein1

__all__ = [
    "CalibrationBins",
    "Uniformity",
    "accuracy",
    "agreement",
    "aupr",
    "auroc",
    "brier",
    "calibration_bins",
    "classwise_ece",
    "crps_gaussian",
    "crps_sample",
    "ece",
    "ece_baseline",
    "ece_null",
    "fpr95",
    "gaussian_nll",
    "interval_coverage",
    "interval_width",
    "mce",
    "miscalibration_area",
    "mixture_nll",
    "pit",
    "rmse",
    "total_variation",
    "variance_ratio",
    "wasserstein1",
]


def gaussian_nll(y: Array, mean: Array, variance: Array) -> Floats:
    r"""Negative log-density of y under :math:`\mathcal N(\mu, \sigma^2)`.

    Args:
        y: Targets, shape (N, ...).
        mean: Predicted means, shape (N, ...).
        variance: Predicted variances, noise included, shape (N, ...).

    Returns:
        Nats per number, shape (N, ...); for the moment-matched Gaussian of a mixture, which is not the mixture's own.

    Raises:
        ValueError: If the shapes differ, a number is not finite, or a variance is not positive.
    """
    targets, means, variances = check_alike(y=y, mean=mean, variance=variance)
    if (variances <= 0).any():
        raise ValueError(f"variance must be > 0, got {variances.min():g}; pass variances with the noise included")
    return (np.log(2 * np.pi * variances) + np.square(targets - means) / variances) / 2


def mixture_nll(component_log_probs: Array, weights: Array | None = None) -> Floats:
    r"""Negative log-density of a mixture, :math:`-\log \sum_s w_s p_s(y_n)`.

    Args:
        component_log_probs: Log-density of each datum under each draw, nats, shape (S, N); minus infinity is allowed.
        weights: Weights of the draws, shape (S,), scaled to sum to 1; equal if left out.

    Returns:
        Nats per datum, shape (N,).

    Raises:
        ValueError: If the shapes do not fit, a log-density is NaN or plus infinity, or a weight is negative.
    """
    log_probs = as_floats("component_log_probs", component_log_probs)
    if log_probs.ndim != 2:
        raise ValueError(f"component_log_probs must have shape (S, N), got {log_probs.shape}; put the draws first")
    if np.isnan(log_probs).any() or (log_probs == np.inf).any():
        raise ValueError(
            "component_log_probs must be finite or minus infinity; look for draws without a finite density"
        )
    with np.errstate(divide="ignore"):
        log_weights = np.log(check_weights(weights, len(log_probs)))
    return -np.asarray(logsumexp(log_probs + log_weights[:, None], axis=0))


def rmse(y: Array, mean: Array) -> float:
    """Root of the mean squared error of the predicted means.

    Args:
        y: Targets, shape (N, ...).
        mean: Predicted means, shape (N, ...).

    Returns:
        RMSE over all numbers, in the units of y.

    Raises:
        ValueError: If the shapes differ, or a number is not finite.
    """
    targets, means = check_alike(y=y, mean=mean)
    return float(np.sqrt(np.mean(np.square(targets - means))))


def crps_gaussian(y: Array, mean: Array, stddev: Array) -> Floats:
    r"""Continuous ranked probability score of a Gaussian, with :math:`z = (y - \mu) / \sigma`.

    .. math:: \sigma \left[ z (2 \Phi(z) - 1) + 2 \phi(z) - \pi^{-1/2} \right]

    Args:
        y: Targets, shape (N, ...).
        mean: Predicted means, shape (N, ...).
        stddev: Predicted standard deviations, noise included, shape (N, ...).

    Returns:
        CRPS of each number, in the units of y, shape (N, ...).

    Raises:
        ValueError: If the shapes differ, a number is not finite, or a standard deviation is not positive.
    """
    targets, means, scales = check_alike(y=y, mean=mean, stddev=stddev)
    if (scales <= 0).any():
        raise ValueError(f"stddev must be > 0, got {scales.min():g}; pass standard deviations with the noise included")
    z = (targets - means) / scales
    density = np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)
    return scales * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


def crps_sample(y: Array, draws: Array, weights: Array | None = None) -> Floats:
    r"""Continuous ranked probability score of the empirical distribution of draws, in O(S log S).

    .. math:: E|X - y| - \tfrac12 E|X - X'|

    Args:
        y: Targets, shape (N, ...).
        draws: Draws of y from the predictive distribution, noise included, shape (S, N, ...).
        weights: Weights of the draws, shape (S,), scaled to sum to 1; equal if left out.

    Returns:
        CRPS of each number, in the units of y, shape (N, ...). Both expectations are over the draws with themselves:
        S draws cost about :math:`E|X - X'| / (2 S)` more than their distribution.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or a weight is negative.
    """
    targets = as_finite("y", y)
    samples = as_finite("draws", draws)
    if samples.shape[1:] != targets.shape:
        raise ValueError(f"draws must have shape (S, *{targets.shape}), got {samples.shape}; put the draws first")
    probabilities = check_weights(weights, len(samples))
    out = np.empty(targets.size)
    columns = samples.reshape(len(samples), -1)
    for block in column_blocks(len(samples), targets.size):
        errors = columns[:, block] - targets.reshape(-1)[block]
        order = np.argsort(errors, axis=0)
        errors = np.take_along_axis(errors, order, axis=0)
        share = probabilities[order]
        # Half the expected distance of two draws is a sum over one: each draw lies above those before it.
        half_spread = share * errors * (2 * np.cumsum(share, axis=0) - share - 1)
        out[block] = (share * np.abs(errors) - half_spread).sum(axis=0)
    return out.reshape(targets.shape)


def accuracy(probs: Array, labels: Array) -> float:
    """Share of data whose most probable class is the label.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).

    Returns:
        Accuracy, 0 to 1; of equally probable classes the first is predicted.

    Raises:
        ValueError: If probs are not probabilities, or labels do not fit them.
    """
    probabilities, classes = check_classification(probs, labels)
    return float(np.mean(probabilities.argmax(axis=1) == classes))


def brier(probs: Array, labels: Array) -> Floats:
    r"""Brier score summed over all classes, :math:`\sum_k (p_k - 1[y = k])^2`.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).

    Returns:
        Score of each datum, 0 to 2, shape (N,); for two classes twice the one-class convention.

    Raises:
        ValueError: If probs are not probabilities, or labels do not fit them.
    """
    probabilities, classes = check_classification(probs, labels)
    one_hot = np.arange(probabilities.shape[1]) == classes[:, None]
    return np.square(probabilities - one_hot).sum(axis=1)
