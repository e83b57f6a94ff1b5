"""Scores against SciPy, scikit-learn, closed forms and slow obvious twins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from inference import scoring

FINITE = st.floats(-100, 100, allow_subnormal=False)


def random_probs(rng: np.random.Generator, num_data: int, num_classes: int) -> np.ndarray:
    return rng.dirichlet(np.ones(num_classes), size=num_data)


# Proper scores


def test_gaussian_nll_is_the_negative_log_density() -> None:
    rng = np.random.default_rng(0)
    y, mean, stddev = rng.normal(size=(3, 20, 2))
    expected = -stats.norm.logpdf(y, mean, np.abs(stddev))
    np.testing.assert_allclose(scoring.gaussian_nll(y, mean, stddev**2), expected, rtol=1e-10)


def test_mixture_nll_is_the_negative_log_of_the_weighted_mean_density() -> None:
    rng = np.random.default_rng(1)
    log_probs, weights = rng.normal(size=(5, 7)), rng.random(5)
    np.testing.assert_allclose(scoring.mixture_nll(log_probs), -np.log(np.exp(log_probs).mean(axis=0)))
    expected = -np.log(weights @ np.exp(log_probs) / weights.sum())
    np.testing.assert_allclose(scoring.mixture_nll(log_probs, weights), expected)
    np.testing.assert_allclose(scoring.mixture_nll(log_probs - 5000), scoring.mixture_nll(log_probs) + 5000)


def test_mixture_nll_survives_draws_of_zero_density_and_zero_weight() -> None:
    log_probs = np.array([[-np.inf, -np.inf], [np.log(0.5), -np.inf]])
    np.testing.assert_array_equal(scoring.mixture_nll(log_probs), [np.log(4.0), np.inf])
    np.testing.assert_allclose(scoring.mixture_nll(log_probs[:, :1], [0, 3]), np.log(2))


def test_categorical_nll_of_a_mixture_is_the_log_loss_of_the_mean_probabilities() -> None:
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.ones(3), size=(6, 50))
    labels = rng.integers(3, size=50)
    found = scoring.mixture_nll(np.log(probs[:, np.arange(50), labels])).mean()
    np.testing.assert_allclose(found, log_loss(labels, probs.mean(axis=0), labels=[0, 1, 2]))


def test_rmse_and_accuracy_on_small_examples() -> None:
    np.testing.assert_allclose(scoring.rmse([0.0, 0.0], [3.0, 4.0]), np.sqrt(12.5))
    assert scoring.accuracy([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], [0, 0, 0]) == pytest.approx(2 / 3)
    assert scoring.accuracy(torch.tensor([0.9, 0.2]), torch.tensor([True, True])) == 0.5


def test_gaussian_crps_at_the_mean_is_the_closed_form() -> None:
    np.testing.assert_allclose(
        scoring.crps_gaussian([0.0, 7.0], [0.0, 7.0], [1.0, 3.0]), [0.233695, 0.701085], atol=2e-6
    )


def test_gaussian_crps_is_the_integral_of_the_squared_distance_of_distribution_functions() -> None:
    grid = np.linspace(-30, 30, 200_001)
    for y, mean, stddev in [(0.3, -1.0, 0.7), (-4.0, 1.0, 2.0), (2.0, 2.5, 0.1)]:
        integrand = (stats.norm.cdf(grid, mean, stddev) - (grid >= y)) ** 2
        found = scoring.crps_gaussian([y], [mean], [stddev])[0]
        np.testing.assert_allclose(found, np.trapezoid(integrand, grid), atol=2e-4)


def crps_twin(y: float, draws: np.ndarray, weights: np.ndarray) -> float:
    """The double sum over pairs of draws."""
    pairs = np.abs(draws[:, None] - draws[None, :])
    return float(weights @ np.abs(draws - y) - weights @ pairs @ weights / 2)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    draws=arrays(float, st.tuples(st.integers(1, 12), st.just(3)), elements=FINITE),
    y=arrays(float, 3, elements=FINITE),
    seed=st.integers(0, 99),
)
def test_sample_crps_is_the_double_sum_over_draws(draws: np.ndarray, y: np.ndarray, seed: int) -> None:
    equal = np.full(len(draws), 1 / len(draws))
    weights = np.random.default_rng(seed).dirichlet(equal)
    for found, w in ((scoring.crps_sample(y, draws), equal), (scoring.crps_sample(y, draws, 3 * weights), weights)):
        expected = [crps_twin(y[i], draws[:, i], w) for i in range(3)]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_sample_crps_of_many_gaussian_draws_is_the_gaussian_crps() -> None:
    draws = np.random.default_rng(3).normal(1.0, 2.0, size=(400_000, 2))
    y = np.array([0.0, 6.0])
    np.testing.assert_allclose(scoring.crps_sample(y, draws), scoring.crps_gaussian(y, [1, 1], [2, 2]), atol=0.015)


def test_sample_crps_in_blocks_keeps_the_shape_of_the_targets() -> None:
    rng = np.random.default_rng(4)
    draws, y = rng.normal(size=(20_000, 5, 4)), rng.normal(size=(5, 4))
    found = scoring.crps_sample(y, draws)
    assert found.shape == (5, 4)
    np.testing.assert_allclose(found[3, 1], scoring.crps_sample(y[3, 1:2], draws[:, 3, 1:2])[0])


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(draws=arrays(float, (9, 2), elements=FINITE), shift=st.integers(-9, 9), scale=st.integers(1, 9))
def test_sample_crps_moves_and_scales_with_the_data(draws: np.ndarray, shift: int, scale: int) -> None:
    y = np.array([0.5, -2.0])
    found = scoring.crps_sample(scale * y + shift, scale * draws[::-1] + shift)
    np.testing.assert_allclose(found, scale * scoring.crps_sample(y, draws), rtol=1e-8, atol=1e-9)


def test_brier_runs_from_zero_to_two_and_is_twice_the_binary_score() -> None:
    np.testing.assert_allclose(scoring.brier(np.eye(3), [0, 1, 0]), [0, 0, 2])
    rng = np.random.default_rng(5)
    positive, labels = rng.random(40), rng.integers(2, size=40)
    np.testing.assert_allclose(scoring.brier(positive, labels).mean(), 2 * brier_score_loss(labels, positive))


# Distance to a reference


def test_a_prediction_agrees_with_itself_and_opposite_ones_are_at_total_variation_one() -> None:
    probs = random_probs(np.random.default_rng(6), 30, 4)
    assert scoring.agreement(probs, probs) == 1
    assert scoring.total_variation(probs, probs) == 0
    assert scoring.agreement([[1.0, 0.0]], [[0.0, 1.0]]) == 0
    assert scoring.total_variation([[1.0, 0.0]], [[0.0, 1.0]]) == 1


@pytest.mark.parametrize(("num_draws", "num_reference"), [(50, 50), (1, 1), (1, 9), (7, 13), (40, 60), (64, 1)])
def test_wasserstein_distance_equals_scipy_at_every_datum(num_draws: int, num_reference: int) -> None:
    rng = np.random.default_rng(num_draws)
    a, b = np.round(rng.normal(size=(num_draws, 8)), 1), rng.standard_cauchy(size=(num_reference, 8))
    expected = [stats.wasserstein_distance(a[:, i], b[:, i]) for i in range(8)]
    np.testing.assert_allclose(scoring.wasserstein1(a, b), expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    a=arrays(float, st.tuples(st.integers(1, 9), st.just(1)), elements=FINITE),
    b=arrays(float, st.tuples(st.integers(1, 9), st.just(1)), elements=FINITE),
    shift=st.integers(-20, 20),
)
def test_wasserstein_distance_is_a_distance_and_moves_with_a_shift(a: np.ndarray, b: np.ndarray, shift: int) -> None:
    found = scoring.wasserstein1(a, b)
    np.testing.assert_allclose(found, scoring.wasserstein1(b, a), atol=1e-9)
    np.testing.assert_allclose(found, stats.wasserstein_distance(a[:, 0], b[:, 0]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scoring.wasserstein1(a, a + shift), [abs(shift)], atol=1e-9)
    assert scoring.wasserstein1(np.repeat(a, 3, axis=0), a) == pytest.approx(0, abs=1e-12)


def test_wasserstein_distance_in_blocks_keeps_the_shape_of_the_data() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(6000, 20, 2)), rng.normal(size=(5000, 20, 2))
    found = scoring.wasserstein1(a, b)
    assert found.shape == (20, 2)
    np.testing.assert_allclose(found[11, 1], stats.wasserstein_distance(a[:, 11, 1], b[:, 11, 1]))


def test_variance_ratio_is_the_square_of_the_ratio_of_scales() -> None:
    draws = np.random.default_rng(8).normal(size=(30, 5))
    np.testing.assert_allclose(scoring.variance_ratio(3 * draws, draws[::-1] + 1), np.full(5, 9.0))
    with pytest.raises(ValueError, match="reference must vary"):
        scoring.variance_ratio(draws, np.ones((4, 5)))
    with pytest.raises(ValueError, match="at least 2 draws"):
        scoring.variance_ratio(draws[:1], draws)


# Out-of-distribution detection


def test_reversed_scores_give_one_minus_auroc_and_ties_count_one_half() -> None:
    rng = np.random.default_rng(9)
    scores, is_ood = np.round(rng.normal(size=300), 1), rng.random(300) < 0.3
    np.testing.assert_allclose(scoring.auroc(scores, is_ood), 1 - scoring.auroc(-scores, is_ood))
    np.testing.assert_allclose(scoring.auroc(scores, is_ood), roc_auc_score(is_ood, scores))
    inside, outside = scores[~is_ood], scores[is_ood]
    pairs = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
    np.testing.assert_allclose(scoring.auroc(scores, is_ood), pairs)


def test_a_constant_score_detects_nothing() -> None:
    is_ood = np.array([True, False, False, False])
    assert scoring.auroc(np.ones(4), is_ood) == 0.5
    assert scoring.fpr95(np.ones(4), is_ood) == 1
    assert scoring.aupr(np.ones(4), is_ood) == 0.25


def test_a_perfect_score_detects_everything() -> None:
    scores, is_ood = np.array([0.1, 0.2, 0.9, 0.8]), np.array([0, 0, 1, 1])
    assert (scoring.auroc(scores, is_ood), scoring.aupr(scores, is_ood), scoring.fpr95(scores, is_ood)) == (1, 1, 0)


def test_fpr95_counts_the_data_above_the_threshold_that_finds_95_per_cent() -> None:
    rng = np.random.default_rng(10)
    inside, outside = rng.normal(size=2000), rng.normal(1.5, 1, size=1000)
    threshold = np.sort(outside)[50]  # 950 of 1000 lie at or above it
    found = scoring.fpr95(np.concatenate([inside, outside]), np.repeat([False, True], [2000, 1000]))
    assert found == np.mean(inside >= threshold)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(scores=arrays(float, 12, elements=st.integers(-5, 5).map(float)))
def test_detection_scores_ignore_increasing_transforms(scores: np.ndarray) -> None:
    is_ood = np.arange(12) % 3 == 0
    for score in (scoring.auroc, scoring.aupr, scoring.fpr95):
        assert score(scores**3 + 2 * scores, is_ood) == score(scores, is_ood)


# Refusals

ONE = np.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.rmse(ONE, [1.0, np.nan, 1.0]), "mean must be finite, got 1 of 3"),
        (lambda: scoring.rmse(ONE, np.ones((3, 1))), "must have one shape"),
        (lambda: scoring.rmse([], []), "at least one entry"),
        (lambda: scoring.rmse(["a"], ["b"]), "must be real numbers"),
        (lambda: scoring.gaussian_nll(ONE, ONE, 0 * ONE), "variance must be > 0"),
        (lambda: scoring.crps_gaussian(ONE, ONE, -ONE), "stddev must be > 0"),
        (lambda: scoring.crps_sample(ONE, np.ones((5, 4))), "put the draws first"),
        (lambda: scoring.crps_sample(ONE, np.ones((2, 3)), [1.0, -1.0]), "weights must be >= 0"),
        (lambda: scoring.crps_sample(ONE, np.ones((2, 3)), ONE), r"weights must have shape \(2,\)"),
        (lambda: scoring.mixture_nll(ONE), r"must have shape \(S, N\)"),
        (lambda: scoring.mixture_nll([[np.nan]]), "finite or minus infinity"),
        (lambda: scoring.mixture_nll([[np.inf]]), "finite or minus infinity"),
        (lambda: scoring.brier([[2.0, -3.0]], [0]), "pass probabilities, not logits"),
        (lambda: scoring.brier([[0.5, 0.4]], [0]), "sum to 1"),
        (lambda: scoring.accuracy([[1.0]], [0]), "K >= 2"),
        (lambda: scoring.accuracy([[0.5, 0.5]], [2]), "whole numbers from 0 to 1"),
        (lambda: scoring.accuracy([[0.5, 0.5]], [0.5]), "whole numbers from 0 to 1"),
        (lambda: scoring.accuracy([[0.5, 0.5]], [0, 1]), r"labels must have shape \(1,\)"),
        (lambda: scoring.agreement(np.eye(2), np.eye(3)), "must have one shape"),
        (lambda: scoring.wasserstein1(np.ones((3, 2)), np.ones((3, 4))), "must agree on the data"),
        (lambda: scoring.auroc(ONE, ONE), "is_ood must hold both 0 and 1"),
        (lambda: scoring.fpr95(ONE, [0, 1, 2]), "nothing else"),
        (lambda: scoring.aupr(ONE, [0, 1]), r"must both have shape \(N,\)"),
    ],
)
def test_impossible_arguments_are_refused_with_the_reason(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
