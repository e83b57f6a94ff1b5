"""Tests of uniformity: right level on uniform ranks, and the shape of a deviation in words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from inference.uniformity import envelope, histogram, uniformity
from tests.tolerances import z_limit


def ranks(seed: int, num: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).random(num)


def test_p_values_of_uniform_ranks_are_uniform() -> None:
    found = [uniformity("f", ranks(seed)) for seed in range(400)]
    for values in ([t.chi_square for t in found], [t.envelope for t in found]):
        for level in (0.1, 0.5):
            share = np.mean(np.array(values) < level)
            assert abs(share - level) < z_limit() * (level * (1 - level) / 400) ** 0.5
    for values in ([t.shift for t in found], [t.spread for t in found]):
        assert abs(np.mean(values)) < z_limit() / 20
        assert np.std(values) == pytest.approx(1, abs=z_limit() / 28)
    assert np.mean([t.pvalue < 0.01 for t in found]) < 0.04


def test_the_envelope_holds_the_whole_function_with_its_level() -> None:
    points, low, high = envelope(150, 0.9)
    inside = 0
    for seed in range(1000):
        below = np.searchsorted(np.sort(ranks(seed, 150)), points, side="right") / 150
        inside += bool(((below >= low) & (below <= high)).all())
    # The envelope's own level is estimated from 10,000 samples.
    assert abs(inside / 1000 - 0.9) < z_limit() * (0.09 * (1 / 1000 + 1 / 10_000)) ** 0.5
    pointwise = stats.binom.ppf(0.95, 150, points) / 150
    assert (high >= pointwise).all()


@pytest.mark.parametrize(
    ("bend", "shape"),
    [
        (lambda u: stats.norm.cdf(1.6 * stats.norm.ppf(u)), "too narrow"),
        (lambda u: stats.norm.cdf(0.6 * stats.norm.ppf(u)), "too wide"),
        (lambda u: stats.norm.cdf(stats.norm.ppf(u) + 0.5), "shifted down"),
        (lambda u: stats.norm.cdf(stats.norm.ppf(u) - 0.5), "shifted up"),
    ],
)
def test_a_wrong_width_or_place_is_seen_and_named(bend: object, shape: str) -> None:
    found = uniformity("f", bend(ranks(1)))  # type: ignore[operator]
    assert found.pvalue < 1e-3
    assert found.shape == shape


def test_ratio_is_three_for_ranks_at_the_ends_and_one_for_uniform_ones() -> None:
    ends = uniformity("f", np.tile([0.001, 0.999], 100))
    assert ends.ratio == pytest.approx(3, abs=0.02)
    assert ends.chi_square < 1e-10
    assert uniformity("f", (np.arange(200) + 0.5) / 200).ratio == pytest.approx(1, abs=1e-4)
    assert uniformity("f", ranks(2)).shape == "no clear shape"


def test_bins_grow_with_the_number_of_ranks() -> None:
    assert [len(histogram(ranks(0, n))) for n in (30, 100, 200, 1000)] == [4, 6, 13, 20]
    assert histogram(ranks(0, 100)).sum() == 100


@pytest.mark.parametrize("pit", [np.full(10, 0.5), np.full(30, 1.5), np.full((30, 2), 0.5)])
def test_too_few_ranks_or_values_outside_zero_and_one_are_refused(pit: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at least 20 numbers in \[0, 1\]"):
        uniformity("f", pit)


def test_a_level_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`level` must be between 0 and 1, got 1.0"):
        envelope(50, 1.0)
