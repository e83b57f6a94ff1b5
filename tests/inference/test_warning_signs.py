"""Reasons not to believe a run of chains: each appears past its limit, with number and remedy, and not before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inference import warning_signs as signs


def only(found: list[str]) -> str:
    """The one sentence."""
    (text,) = found
    return text


def test_rhat_is_judged_by_both_limits_at_one_in_twenty_scalars() -> None:
    good = np.full(100, 1.001)
    assert signs.mixing_signs("predictions", good) == []
    few = np.where(np.arange(100) < 5, 1.5, good)
    assert signs.mixing_signs("predictions", few) == []
    bad = np.where(np.arange(100) < 6, 1.5, good)
    text = only(signs.mixing_signs("predictions", bad))
    assert text.startswith(
        "R-hat of the predictions is above 1.1 at 6% of them (95 % quantile 1.5): the chains disagree"
    )
    close = np.where(np.arange(100) < 50, 1.05, good)
    text = only(signs.mixing_signs("predictions", close))
    assert "is above 1.01 at 50% of them (95 % quantile 1.05)" in text
    assert "run longer" in text
    assert signs.mixing_signs("predictions", close, nested=True) == []
    assert "95 % quantile inf" in only(signs.mixing_signs("predictions", np.full(10, math.inf)))
    assert signs.mixing_signs("predictions", np.full(10, math.nan)) == []


def test_effective_sizes_are_asked_for_per_chain_with_the_draws_that_would_do() -> None:
    enough, half = np.full(50, 400.0), np.full(50, 200.0)
    assert signs.size_signs("predictions", enough, enough, chains=4, length=1000) == []
    text = only(signs.size_signs("predictions", enough, half, chains=4, length=1000))
    assert "below 100 per chain at 100% of them (5 % quantile 200 of 4000 draws)" in text
    assert "about 2,000 draws per chain would do" in text
    assert signs.size_signs("predictions", np.full(3, math.nan), half[:3], chains=4, length=10) == []


def test_low_bfmi_names_its_chains() -> None:
    assert signs.energy_signs(np.array([0.31, 1.0])) == []
    text = only(signs.energy_signs(np.array([0.29, 1.0, 0.12])))
    assert "BFMI is 0.12 (limit 0.3) in chains 0, 2" in text
    assert "reparameterise" in text
    assert "0, 1, 2, 3, 4, 5, 6, 7, ..." in only(signs.energy_signs(np.full(20, 0.1)))


@pytest.mark.parametrize(
    ("acceptance", "target", "text"),
    [
        ([0.6, 0.8], 0.8, "acceptance is 0.60 in chain 0 where warm-up aimed at 0.8: the steps are too large"),
        ([0.3, 0.8], None, "acceptance is 0.30 in chain 0: the steps are too large"),
        ([0.999, 0.8], 0.651, "acceptance is 1.00 in chain 0 where warm-up aimed at 0.651: the steps are smaller"),
    ],
)
def test_acceptance_far_from_its_aim_is_told(acceptance: list[float], target: float | None, text: str) -> None:
    assert text in only(signs.acceptance_signs(np.array(acceptance), target))


@pytest.mark.parametrize(
    ("acceptance", "target"), [(0.7, 0.8), (0.95, 0.8), (0.999, None), (0.45, None), (0.75, 0.651)]
)
def test_acceptance_near_its_aim_is_not_told(acceptance: float, target: float | None) -> None:
    assert signs.acceptance_signs(np.array([acceptance]), target) == []


def test_step_sizes_that_differ_five_fold_are_told() -> None:
    assert signs.step_size_signs(np.array([0.1, 0.4])) == []
    assert "differ 6-fold between chains (0.1 to 0.6)" in only(signs.step_size_signs(np.array([0.1, 0.6, 0.2])))


def test_saturation_divergences_and_khat_have_their_limits() -> None:
    assert signs.saturation_signs(0.1, 10) == []
    assert "11% of the draws hit max_tree_depth=10" in only(signs.saturation_signs(0.11, 10))
    assert signs.divergence_signs(0, 100) == []
    assert "3 of 100 draws diverged" in only(signs.divergence_signs(3, 100))
    assert signs.khat_signs(0.7) == signs.khat_signs(math.nan) == signs.khat_signs(-math.inf) == []
    assert "k-hat is 0.71 (limit 0.7)" in only(signs.khat_signs(0.71))
    assert "k-hat cannot be computed" in only(signs.khat_signs(math.inf))
