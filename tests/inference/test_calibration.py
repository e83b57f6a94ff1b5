"""Calibration errors, coverage and uniformity against closed forms and slow obvious twins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from inference import scoring


def test_always_nine_tenths_sure_with_accuracy_seven_tenths_has_an_error_of_two_tenths() -> None:
    probs = np.tile([0.9, 0.1], (10, 1))
    labels = np.repeat([0, 1], [7, 3])
    for strategy in ("uniform", "quantile"):
        np.testing.assert_allclose(scoring.ece(probs, labels, strategy=strategy), 0.2)
        np.testing.assert_allclose(scoring.mce(probs, labels, strategy=strategy), 0.2)
    np.testing.assert_allclose(scoring.classwise_ece(probs, labels), 0.2)
    np.testing.assert_allclose(scoring.calibration_bins(probs, labels).gap, [-0.2])


def ece_twin(confidence: np.ndarray, right: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Expected and maximum calibration error by a loop over bins, of which only the last is closed on the right."""
    total, largest, found = 0.0, 0.0, 0
    for b in range(len(edges) - 1):
        last = b == len(edges) - 2
        inside = [i for i, c in enumerate(confidence) if edges[b] <= c and (last or c < edges[b + 1])]
        if inside:
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total, largest, found = total + gap * len(inside), max(largest, gap), found + len(inside)
    assert found == len(confidence)
    return total / found, largest


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 10**6), num_bins=st.integers(1, 20), num_classes=st.integers(2, 4))
def test_calibration_errors_equal_a_loop_over_bins(seed: int, num_bins: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(10, np.full(num_classes, 1 / num_classes), size=40)  # many on the edges
    probs, labels = counts / 10, rng.integers(num_classes, size=40)
    confidence, right = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    ece, mce = ece_twin(confidence, right, np.arange(num_bins + 1) / num_bins)
    np.testing.assert_allclose(scoring.ece(probs, labels, num_bins), ece, atol=1e-12)
    np.testing.assert_allclose(scoring.mce(probs, labels, num_bins), mce, atol=1e-12)
    ece, mce = ece_twin(confidence, right, np.quantile(confidence, np.arange(num_bins + 1) / num_bins))
    np.testing.assert_allclose(scoring.ece(probs, labels, num_bins, "quantile"), ece, atol=1e-12)
    np.testing.assert_allclose(scoring.mce(probs, labels, num_bins, "quantile"), mce, atol=1e-12)


def test_data_on_the_edges_of_bins_are_counted_once() -> None:
    positive = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    bins = scoring.calibration_bins(positive, np.ones(6), num_bins=10)
    np.testing.assert_array_equal(bins.count, [1, 1, 1, 1, 2])
    np.testing.assert_allclose(bins.confidence, [0.5, 0.6, 0.7, 0.8, 0.95])
    assert scoring.calibration_bins(positive, np.ones(6), 6, "quantile").count.tolist() == [1] * 6


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_calibration_errors_ignore_the_order_of_data_and_of_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, labels = rng.dirichlet(np.ones(3), size=30), rng.integers(3, size=30)
    order, relabel = rng.permutation(30), rng.permutation(3)
    for error in (scoring.ece, scoring.mce, scoring.classwise_ece):
        expected = error(probs, labels)
        np.testing.assert_allclose(error(probs[order], labels[order]), expected)
        np.testing.assert_allclose(error(probs[:, relabel], np.argsort(relabel)[labels]), expected)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_the_baseline_is_the_error_of_a_calibrated_prediction(strategy) -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(1000)
    errors = [scoring.ece(positive, rng.random(1000) < positive, 15, strategy) for _ in range(200)]
    null = scoring.ece_null(positive, 15, strategy, num_resamples=200)
    assert 0.01 < np.mean(errors) < np.sqrt(15 / 1000)
    np.testing.assert_allclose(null.mean(), np.mean(errors), atol=4 * np.std(errors) * np.sqrt(2 / 200))
    assert scoring.ece_baseline(positive, 15, strategy) == null.mean()
    assert scoring.ece_baseline(positive, 15, strategy, seed=1) != null.mean()


def test_an_overconfident_prediction_exceeds_its_baseline() -> None:
    rng = np.random.default_rng(1)
    positive = rng.random(1000)
    labels = rng.random(1000) < positive
    sharpened = positive**3 / (positive**3 + (1 - positive) ** 3)
    assert scoring.ece(sharpened, labels) > scoring.ece_null(sharpened).max()


def test_central_gaussian_intervals_cover_as_often_as_they_say() -> None:
    y = np.random.default_rng(2).normal(size=40_000)
    for level in (0.5, 0.68, 0.9, 0.95):
        half = np.full(y.shape, stats.norm.ppf((1 + level) / 2))
        error = 4 * np.sqrt(level * (1 - level) / y.size)
        np.testing.assert_allclose(scoring.interval_coverage(-half, half, y), level, atol=error)
        np.testing.assert_allclose(scoring.interval_width(-half, half), 2 * half[0])


def test_both_ends_of_an_interval_belong_to_it() -> None:
    assert scoring.interval_coverage([0.0] * 4, [1.0] * 4, [0.0, 1.0, 1.1, -0.1]) == 0.5


def test_the_transform_is_uniform_for_the_true_distribution_only() -> None:
    y = np.random.default_rng(3).normal(size=2000)
    assert scoring.pit(stats.norm.cdf(y)).pvalue > 0.01
    assert scoring.pit(stats.norm.cdf(y, scale=0.7)).pvalue < 1e-6
    found = scoring.pit(stats.norm.cdf(y, 0.1))
    expected = stats.kstest(y, stats.norm(0.1).cdf)
    np.testing.assert_allclose((found.statistic, found.pvalue), (expected.statistic, expected.pvalue))


def test_miscalibration_area_is_the_integral_against_the_diagonal() -> None:
    values = np.random.default_rng(4).beta(2, 1, size=37)
    grid = (np.arange(400_000) + 0.5) / 400_000
    curve = np.searchsorted(np.sort(values), grid, side="right") / 37
    np.testing.assert_allclose(scoring.miscalibration_area(values), np.abs(curve - grid).mean(), atol=1e-5)
    np.testing.assert_allclose(scoring.miscalibration_area(np.zeros(5)), 0.5)
    np.testing.assert_allclose(scoring.miscalibration_area([0.5]), 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.ece([[0.5, 0.6]], [0]), "sum to 1"),
        (lambda: scoring.ece([[0.5, 0.5]], [2]), "whole numbers"),
        (lambda: scoring.ece([[0.5, 0.5]], [0], num_bins=0), "num_bins must be >= 1"),
        (lambda: scoring.ece([[0.5, 0.5]], [0], strategy="equal"), "'uniform' or 'quantile', got 'equal'"),
        (lambda: scoring.ece_null([[0.5, 0.5]], num_resamples=0), "num_resamples must be >= 1"),
        (lambda: scoring.ece([[np.nan, 0.5]], [0]), "probs must be finite"),
        (lambda: scoring.interval_coverage([1.0], [0.0], [0.5]), "lower must not exceed upper"),
        (lambda: scoring.interval_width([0.0], [1.0, 2.0]), "must have one shape"),
        (lambda: scoring.pit([0.5, 1.5]), "between 0 and 1"),
        (lambda: scoring.miscalibration_area([[0.5]]), "between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
