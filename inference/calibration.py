r"""Calibration: do events that are given 90 % happen nine times in ten?

Classification bins the data by confidence, the largest probability, and compares it with the accuracy in each bin.
Regression counts how often the targets fall inside intervals, and asks whether the predictive distribution function at
the targets (the probability integral transform) is uniform. Neither says that a prediction is sharp: report widths too.

A perfectly calibrated prediction does not have a calibration error of 0 on a finite sample: see ``ece_baseline``.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest

from inference.arrays import Array, Floats, as_finite, check_alike, check_classification, check_probs

Strategy = Literal["uniform", "quantile"]


@dataclass(frozen=True)
class CalibrationBins:
    """The points of a reliability diagram; bins without data are left out.

    Attributes:
        confidence: Mean confidence in each bin, shape (B,).
        accuracy: Share of right predictions in each bin, shape (B,).
        count: Data in each bin, shape (B,).
    """

    confidence: Floats
    accuracy: Floats
    count: NDArray[np.intp]

    @property
    def gap(self) -> Floats:
        """Accuracy minus confidence in each bin, negative where the prediction is too sure, shape (B,)."""
        return self.accuracy - self.confidence


@dataclass(frozen=True)
class Uniformity:
    """Kolmogorov and Smirnov's test of uniformity.

    Attributes:
        statistic: Largest distance between the empirical distribution function and the diagonal, 0 to 1.
        pvalue: Probability of a larger one under uniformity.
    """

    statistic: float
    pvalue: float


def calibration_bins(
    probs: Array, labels: Array, num_bins: int = 15, strategy: Strategy = "uniform"
) -> CalibrationBins:
    """Confidence against accuracy in bins.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).
        num_bins: Number of bins of the confidence.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile"). They are closed on the
            left and open on the right, the last one closed: every datum is in one.

    Returns:
        The bins that hold data.

    Raises:
        ValueError: If probs are not probabilities, labels do not fit them, or num_bins or strategy is not allowed.
    """
    probabilities, classes = check_classification(probs, labels)
    right = probabilities.argmax(axis=1) == classes
    return _bins(probabilities.max(axis=1), right, num_bins, strategy)


def ece(probs: Array, labels: Array, num_bins: int = 15, strategy: Strategy = "uniform") -> float:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} |\text{accuracy}_b - \text{confidence}_b|`.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).
        num_bins: Number of bins of the confidence.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile").

    Returns:
        Error, 0 to 1; of the order of sqrt(num_bins / N) for a calibrated prediction.

    Raises:
        ValueError: If probs are not probabilities, labels do not fit them, or num_bins or strategy is not allowed.
    """
    return _expected_error(calibration_bins(probs, labels, num_bins, strategy))


def mce(probs: Array, labels: Array, num_bins: int = 15, strategy: Strategy = "uniform") -> float:
    """Maximum calibration error, the largest gap of any bin; noisy where a bin holds few data.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).
        num_bins: Number of bins of the confidence.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile").

    Returns:
        Error, 0 to 1.

    Raises:
        ValueError: If probs are not probabilities, labels do not fit them, or num_bins or strategy is not allowed.
    """
    return float(np.abs(calibration_bins(probs, labels, num_bins, strategy).gap).max())


def classwise_ece(probs: Array, labels: Array, num_bins: int = 15, strategy: Strategy = "uniform") -> float:
    """Calibration error of each class's probability as that of a binary event, averaged over the classes.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).
        num_bins: Number of bins of the probability of each class.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile").

    Returns:
        Error, 0 to 1.

    Raises:
        ValueError: If probs are not probabilities, labels do not fit them, or num_bins or strategy is not allowed.
    """
    probabilities, classes = check_classification(probs, labels)
    columns = enumerate(probabilities.T)
    return float(np.mean([_expected_error(_bins(p, classes == k, num_bins, strategy)) for k, p in columns]))


def ece_null(
    probs: Array, num_bins: int = 15, strategy: Strategy = "uniform", num_resamples: int = 200, seed: int = 0
) -> Floats:
    """Calibration errors that the same predictions would have if they were calibrated.

    Labels are drawn from the predicted probabilities again and again. The observed error is evidence of miscalibration
    only where it exceeds most of these.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        num_bins: Number of bins of the confidence.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile").
        num_resamples: Number R of sets of labels.
        seed: Seed of the labels.

    Returns:
        Expected calibration errors, shape (R,).

    Raises:
        ValueError: If probs are not probabilities, or num_bins, strategy or num_resamples is not allowed.
    """
    confidence = check_probs("probs", probs).max(axis=1)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples}")
    # A label drawn from the probabilities is the predicted class with probability equal to the confidence.
    generator = np.random.default_rng(seed)
    draws = (generator.random(len(confidence)) < confidence for _ in range(num_resamples))
    return np.array([_expected_error(_bins(confidence, right, num_bins, strategy)) for right in draws])


def ece_baseline(
    probs: Array, num_bins: int = 15, strategy: Strategy = "uniform", num_resamples: int = 200, seed: int = 0
) -> float:
    """Mean calibration error of the same predictions if they were calibrated: subtract it from ``ece``.

    Args:
        probs: Predicted probabilities, shape (N, K), or (N,) of class 1.
        num_bins: Number of bins of the confidence.
        strategy: Bins of equal width ("uniform") or with equal numbers of data ("quantile").
        num_resamples: Number of sets of labels drawn from the predicted probabilities.
        seed: Seed of the labels.

    Returns:
        Expected calibration error under calibration, 0 to 1.

    Raises:
        ValueError: If probs are not probabilities, or num_bins, strategy or num_resamples is not allowed.
    """
    return float(ece_null(probs, num_bins, strategy, num_resamples, seed).mean())


def interval_coverage(lower: Array, upper: Array, y: Array) -> float:
    """Share of targets inside their intervals, both ends included.

    Args:
        lower: Lower ends, shape (N, ...).
        upper: Upper ends, shape (N, ...).
        y: Targets, shape (N, ...).

    Returns:
        Coverage, 0 to 1; compare with the level of the intervals, and report the width with it.

    Raises:
        ValueError: If the shapes differ, a number is not finite, or a lower end is above its upper one.
    """
    low, high, targets = check_alike(lower=lower, upper=upper, y=y)
    _check_ends(low, high)
    return float(np.mean((low <= targets) & (targets <= high)))


def interval_width(lower: Array, upper: Array) -> float:
    """Mean width of the intervals: how sharp the prediction is.

    Args:
        lower: Lower ends, shape (N, ...).
        upper: Upper ends, shape (N, ...).

    Returns:
        Mean width, in the units of the targets.

    Raises:
        ValueError: If the shapes differ, a number is not finite, or a lower end is above its upper one.
    """
    low, high = check_alike(lower=lower, upper=upper)
    _check_ends(low, high)
    return float(np.mean(high - low))


def pit(cdf_values: Array) -> Uniformity:
    """Test whether the predictive distribution functions, each at its target, are uniform, as calibration implies.

    Args:
        cdf_values: Probability integral transforms, shape (N,).

    Returns:
        Statistic and p-value of Kolmogorov and Smirnov's two-sided test.

    Raises:
        ValueError: If cdf_values is not of shape (N,), or not between 0 and 1.
    """
    found = kstest(_check_cdf(cdf_values), "uniform")
    return Uniformity(float(found.statistic), float(found.pvalue))


def miscalibration_area(cdf_values: Array) -> float:
    r"""Area between the calibration curve and the diagonal, :math:`\int_0^1 |F_N(u) - u| du`.

    F is the empirical distribution function of the transforms: the share of targets below the u-quantile predicted
    for them.

    Args:
        cdf_values: Probability integral transforms, shape (N,).

    Returns:
        Area, 0 to 1/2.

    Raises:
        ValueError: If cdf_values is not of shape (N,), or not between 0 and 1.
    """
    values = np.sort(_check_cdf(cdf_values))
    ends = np.concatenate([[0.0], values, [1.0]])
    level = np.arange(len(values) + 1) / len(values)  # of the distribution function between two ends
    left, right = ends[:-1] - level, ends[1:] - level
    # Where the diagonal crosses a step, two triangles; else a trapezium.
    areas = np.where(left * right < 0, (left**2 + right**2) / 2, np.abs(right**2 - left**2) / 2)
    return float(areas.sum())


def _bins(confidence: Floats, right: NDArray[np.bool_], num_bins: int, strategy: Strategy) -> CalibrationBins:
    """Means of confidence and of right predictions over half-open bins of the confidence."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    inner = np.arange(1, num_bins) / num_bins
    if strategy == "quantile":
        inner = np.quantile(confidence, inner)
    elif strategy != "uniform":
        raise ValueError(f"strategy must be 'uniform' or 'quantile', got {strategy!r}")
    index = np.searchsorted(inner, confidence, side="right")
    count = np.bincount(index, minlength=num_bins)
    held = count > 0
    means = [
        np.bincount(index, weights=values, minlength=num_bins)[held] / count[held] for values in (confidence, right)
    ]
    return CalibrationBins(means[0], means[1], count[held])


def _expected_error(bins: CalibrationBins) -> float:
    """Gaps averaged over the data."""
    return float(bins.count @ np.abs(bins.gap) / bins.count.sum())


def _check_ends(low: Floats, high: Floats) -> None:
    """Refuse intervals that are turned round."""
    if (low > high).any():
        raise ValueError(f"lower must not exceed upper, but does for {int((low > high).sum())} of {low.size} intervals")


def _check_cdf(cdf_values: Array) -> Floats:
    """Transforms of shape (N,), between 0 and 1."""
    values = as_finite("cdf_values", cdf_values)
    if values.ndim != 1 or values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"cdf_values must have shape (N,) and lie between 0 and 1, got shape {values.shape} "
            f"and values from {values.min():g} to {values.max():g}"
        )
    return values
