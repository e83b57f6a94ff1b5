"""Pareto-smoothed importance sampling against ArviZ and closed forms."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inference.diagnostics import psis_khat, psis_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az


def gaussian_log_ratios(variance: float, num_draws: int, seed: int) -> np.ndarray:
    """Log ratios of N(0, 1) over N(0, variance) at draws of the latter, up to a constant."""
    draws = np.sqrt(variance) * np.random.default_rng(seed).normal(size=num_draws)
    return draws**2 / (2 * variance) - draws**2 / 2


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("num_draws", [26, 99, 100, 1000, 4321])
def test_khat_and_weights_equal_arviz(scale: float, num_draws: int) -> None:
    log_ratios = scale * np.random.default_rng(num_draws).normal(size=num_draws)
    log_weights, khat = az.psislw(log_ratios.copy())
    np.testing.assert_allclose(psis_khat(log_ratios), float(khat), rtol=1e-9)
    np.testing.assert_allclose(psis_weights(log_ratios), np.exp(log_weights), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("decimals", [0, 1])
def test_khat_equals_arviz_with_ties_and_excluded_draws(decimals: int) -> None:
    log_ratios = np.round(np.random.default_rng(1).normal(size=2000), decimals)
    log_ratios[::7] = -np.inf
    log_weights, khat = az.psislw(log_ratios.copy())
    np.testing.assert_allclose(psis_khat(log_ratios), float(khat), rtol=1e-9)
    # Tied draws share smoothed weights in an order of their own.
    np.testing.assert_allclose(np.sort(psis_weights(log_ratios)), np.sort(np.exp(log_weights)), rtol=1e-9)


@pytest.mark.parametrize(("variance", "expected"), [(0.5, 0.47), (0.3, 0.62), (0.2, 0.75)])
def test_khat_of_a_narrow_gaussian_guide_is_near_the_closed_form(variance: float, expected: float) -> None:
    found = [psis_khat(gaussian_log_ratios(variance, 20_000, seed)) for seed in range(40)]
    np.testing.assert_allclose(np.mean(found), expected, atol=0.035)
    assert np.mean(found) < 1 - variance


def test_khat_of_a_wide_gaussian_guide_is_negative() -> None:
    assert psis_khat(gaussian_log_ratios(1.5, 20_000, 0)) < 0


@pytest.mark.parametrize("constant", [0.0, -3.0, 12_345.678])
def test_a_perfect_guide_has_khat_minus_infinity_and_equal_weights(constant: float) -> None:
    log_ratios = constant * (1 + 1e-13 * np.random.default_rng(2).normal(size=1000))
    assert psis_khat(log_ratios) == -np.inf
    np.testing.assert_allclose(psis_weights(log_ratios), 1e-3, rtol=1e-6)


def test_too_few_draws_for_a_tail_give_khat_infinity_and_raw_weights() -> None:
    log_ratios = np.array([0.0, -1.0, -2.0])
    assert psis_khat(log_ratios) == np.inf
    np.testing.assert_allclose(psis_weights(log_ratios), np.exp(log_ratios) / np.exp(log_ratios).sum())


def test_a_tail_of_one_repeated_value_keeps_finite_weights() -> None:
    log_ratios = np.concatenate([np.random.default_rng(3).normal(size=1000) - 9, np.zeros(50)])
    weights = psis_weights(log_ratios)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 1.0)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    log_ratios=arrays(float, st.integers(1, 200), elements=st.floats(-50, 50)),
    constant=st.integers(-100, 100),
)
def test_weights_are_a_distribution_in_the_order_of_the_ratios(log_ratios: np.ndarray, constant: int) -> None:
    weights = psis_weights(log_ratios)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    assert weights.min() >= 0
    assert (np.diff(weights[np.argsort(log_ratios)])[np.diff(np.sort(log_ratios)) > 1e-6] >= -1e-12).all()


def test_khat_ignores_a_constant_and_takes_tensors() -> None:
    log_ratios = np.random.default_rng(4).normal(size=500)
    np.testing.assert_allclose(psis_khat(torch.from_numpy(log_ratios) + 1000), psis_khat(log_ratios), rtol=1e-8)


@pytest.mark.parametrize("bad", [[], [[0.0, 1.0]], [0.0, np.nan], [0.0, np.inf], [-np.inf, -np.inf]])
def test_impossible_log_ratios_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="log_ratios must"):
        psis_khat(bad)
