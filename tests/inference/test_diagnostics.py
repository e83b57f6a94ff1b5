"""Convergence diagnostics against ArviZ, closed forms and invariances."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inference import diagnostics

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

TWINS: dict[str, tuple[Callable, Callable]] = {
    "rhat": (diagnostics.rhat, az.rhat),
    "ess_bulk": (diagnostics.ess_bulk, lambda x: az.ess(x, method="bulk")),
    "ess_tail": (diagnostics.ess_tail, lambda x: az.ess(x, method="tail")),
    "ess_mean": (diagnostics.ess_mean, lambda x: az.ess(x, method="mean")),
    "mcse_mean": (diagnostics.mcse_mean, lambda x: az.mcse(x, method="mean")),
    "mcse_sd": (diagnostics.mcse_sd, lambda x: az.mcse(x, method="sd")),
    "ess_quantile": (
        lambda x: diagnostics.ess_quantile(x, 0.1),
        lambda x: az.ess(x, method="quantile", prob=0.1),
    ),
    "mcse_quantile": (
        lambda x: diagnostics.mcse_quantile(x, 0.9),
        lambda x: az.mcse(x, method="quantile", prob=0.9),
    ),
}


@pytest.fixture(autouse=True)
def _quiet_arviz() -> Iterator[None]:
    """ArviZ logs each NaN and each short chain, and divides by zero aloud."""
    logging.disable(logging.WARNING)
    with np.errstate(all="ignore"):
        yield
    logging.disable(logging.NOTSET)


def agrees(name: str, draws: np.ndarray) -> None:
    ours, theirs = TWINS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = [float(theirs(np.ascontiguousarray(draws[:, :, i], dtype=float))) for i in range(draws.shape[2])]
    # Of constant draws only rounding is left of a standard error.
    atol = 1e-9 * np.abs(draws[np.isfinite(draws)]).max(initial=0.0) if name.startswith("mcse") else 0.0
    np.testing.assert_allclose(ours(draws), expected, rtol=1e-8, atol=atol)


def autoregressive(rng: np.random.Generator, shape: tuple[int, ...], rho: float) -> np.ndarray:
    draws = rng.normal(size=shape)
    for t in range(1, shape[1]):
        draws[:, t] = rho * draws[:, t - 1] + np.sqrt(1 - rho**2) * draws[:, t]
    return draws


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("chains", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 11, 60, 101, 250])
def test_figures_equal_arviz_for_any_numbers_of_chains_and_draws(name: str, chains: int, length: int) -> None:
    rng = np.random.default_rng(chains + 10 * length)
    agrees(name, autoregressive(rng, (chains, length, 4), 0.7))


def kinds_of_draws(rng: np.random.Generator, chains: int, length: int) -> dict[str, np.ndarray]:
    normal = rng.normal(size=(chains, length, 6))
    holes = normal.copy()
    holes[rng.random(normal.shape) < 0.03] = np.nan
    infinite = normal.copy()
    infinite[rng.random(normal.shape) < 0.2] = np.inf
    return {
        "drifting": normal.cumsum(axis=1),
        "rounded": np.round(normal),
        "two values": (normal > 0.8).astype(float),
        "rounded walk": np.round(normal.cumsum(axis=1)),
        "constant": np.full_like(normal, 0.1),
        "small constant": np.full_like(normal, 1e-300),
        "heavy tails": rng.standard_cauchy(normal.shape) * 1e80,
        "tiny": normal * 1e-12,
        "far from zero": normal + 1e9,
        "alternating": normal * 0.1 + np.where(np.arange(length) % 2, 1.0, -1.0)[:, None],
        "with NaN": holes,
        "with infinities": infinite,
        "skewed": np.exp(3 * normal),
    }


KINDS = list(kinds_of_draws(np.random.default_rng(0), 2, 4))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chains", "length"), [(4, 100), (3, 37)])
def test_figures_equal_arviz_for_draws_of_any_kind(name: str, kind: str, chains: int, length: int) -> None:
    agrees(name, kinds_of_draws(np.random.default_rng(1), chains, length)[kind])


@pytest.mark.parametrize("name", ["rhat", "ess_bulk", "ess_tail", "ess_mean"])
def test_stuck_chains_equal_arviz(name: str) -> None:
    stuck = np.repeat(np.random.default_rng(2).normal(size=(4, 1, 6)), 50, axis=1)
    one_moves = stuck.copy()
    one_moves[0] = np.random.default_rng(3).normal(size=(50, 6))
    agrees(name, stuck)
    agrees(name, one_moves)


@pytest.mark.parametrize("name", ["rhat", "ess_bulk", "ess_tail"])
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_figures_equal_arviz_for_draws_that_hypothesis_invents(name: str, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 14), st.just(2)))
    few = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 3.0])
    any_float = st.floats(-1e100, 1e100, allow_subnormal=False)
    agrees(name, data.draw(arrays(float, shape, elements=data.draw(st.sampled_from([few, any_float])))))


def test_convergence_gives_the_same_figures_as_the_functions() -> None:
    draws = np.random.default_rng(4).normal(size=(4, 51, 3, 2)).cumsum(axis=1)
    found = diagnostics.convergence(draws)
    for name in ("rhat", "ess_bulk", "ess_tail", "mcse_mean"):
        np.testing.assert_array_equal(getattr(found, name), TWINS[name][0](draws))
        assert getattr(found, name).shape == (3, 2)


def test_independent_chains_have_rhat_one_and_a_shift_of_half_of_them_is_seen() -> None:
    draws = np.random.default_rng(5).normal(size=(4, 1000, 200))
    np.testing.assert_allclose(diagnostics.rhat(draws).mean(), 1.0, atol=2e-3)
    draws[2:] += 1
    # Four of eight half chains are shifted: R^2 = 1 + (2 / 7) d^2 / w, where d is the difference of the groups' mean
    # normal scores and w the variance in each group: by quadrature over the mixture, 0.893313 and 0.800498.
    expected = np.sqrt(1 + 2 / 7 * 0.893313**2 / 0.800498)
    np.testing.assert_allclose(diagnostics.rhat(draws).mean(), expected, atol=4 * 0.0083 / np.sqrt(200))


def test_folding_sees_chains_that_differ_in_scale_only() -> None:
    draws = np.random.default_rng(6).normal(size=(4, 1000))
    draws[2:] *= 3
    assert diagnostics.rhat(draws) > 1.1


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_effective_size_of_an_autoregression_is_the_closed_form(rho: float) -> None:
    draws = autoregressive(np.random.default_rng(7), (4, 2000, 150), rho)
    share = diagnostics.ess_mean(draws) / 8000
    # Geyer's sequence has a bias of a few per cent; the Monte-Carlo error of the mean is below one.
    np.testing.assert_allclose(share.mean(), (1 - rho) / (1 + rho), rtol=0.06)


def test_standard_error_of_the_mean_is_the_spread_of_means_over_replicates() -> None:
    draws = autoregressive(np.random.default_rng(8), (4, 500, 1000), 0.6)
    spread = draws.mean(axis=(0, 1)).std()
    np.testing.assert_allclose(diagnostics.mcse_mean(draws).mean(), spread, rtol=4 / np.sqrt(2 * 1000))
    spread = draws.std(axis=(0, 1)).std()
    np.testing.assert_allclose(diagnostics.mcse_sd(draws).mean(), spread, rtol=4 / np.sqrt(2 * 1000))


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(draws=arrays(float, (3, 9, 2), elements=st.integers(-20, 20).map(float)), order=st.permutations(range(3)))
def test_rank_figures_do_not_change_under_permuted_chains_or_increasing_transforms(
    draws: np.ndarray, order: list[int]
) -> None:
    assume(np.unique(draws).size > 4)
    for figure in (diagnostics.rhat, diagnostics.ess_tail):
        np.testing.assert_allclose(figure(draws[order]), figure(draws), rtol=1e-8)
    np.testing.assert_allclose(diagnostics.ess_bulk(draws**3 + draws), diagnostics.ess_bulk(draws), rtol=1e-12)
    np.testing.assert_allclose(diagnostics.rhat(-5 * draws), diagnostics.rhat(draws), rtol=1e-8)


def test_tensors_float32_and_integers_are_taken_and_computed_in_float64() -> None:
    draws = np.random.default_rng(9).normal(size=(2, 40, 3)).astype(np.float32)
    expected = diagnostics.convergence(draws.astype(float))
    found = diagnostics.convergence(torch.from_numpy(draws).requires_grad_())
    np.testing.assert_array_equal(found.ess_tail, expected.ess_tail)
    np.testing.assert_array_equal(found.mcse_mean, expected.mcse_mean)
    whole = np.round(draws * 3).astype(int)
    np.testing.assert_array_equal(diagnostics.rhat(whole), diagnostics.rhat(whole.astype(float)))


def test_a_nan_spoils_its_own_scalar_only() -> None:
    draws = np.random.default_rng(10).normal(size=(4, 50, 5))
    clean = diagnostics.rhat(draws)
    draws[1, 7, 2] = np.nan
    found = diagnostics.rhat(draws)
    assert np.isnan(found[2])
    np.testing.assert_array_equal(np.delete(found, 2), np.delete(clean, 2))


def test_progress_counts_up_to_all_scalars_and_blocks_leave_no_trace() -> None:
    draws = np.random.default_rng(11).normal(size=(4, 500, 70))
    seen: list[tuple[int, int]] = []
    found = diagnostics.rhat(draws, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70, 70)
    assert len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    np.testing.assert_array_equal(found, [diagnostics.rhat(draws[:, :, i]) for i in range(70)])


@pytest.mark.parametrize("shape", [(4, 20, 0), (4, 20, 3, 0)])
def test_no_scalars_give_no_figures(shape: tuple[int, ...]) -> None:
    assert diagnostics.rhat(np.zeros(shape)).shape == shape[2:]


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((0, 5, 2)), np.array([["a", "b"]]), np.zeros((2, 9)) * 1j])
def test_draws_of_the_wrong_shape_or_type_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"draws must be real numbers of shape \(C, S, ...\)"):
        diagnostics.rhat(bad)


def test_bfmi_equals_arviz_and_needs_chains() -> None:
    energy = np.random.default_rng(12).normal(size=(4, 300)).cumsum(axis=1)
    np.testing.assert_allclose(diagnostics.bfmi(energy), az.bfmi(energy), rtol=1e-12)
    independent = np.random.default_rng(13).normal(size=(4, 20_000))
    np.testing.assert_allclose(diagnostics.bfmi(independent), 2.0, rtol=0.05)
    with pytest.raises(ValueError, match="one row per chain"):
        diagnostics.bfmi(energy[0])


MEMORY_SCRIPT = """
import resource, sys
import numpy as np
from inference import diagnostics
draws = np.random.default_rng(0).standard_normal((4, {length}, {scalars}), dtype=np.float32)
diagnostics.convergence(draws[:, :, :50])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = diagnostics.convergence(draws)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert 0.999 < np.median(found.rhat) < 1.2
"""


@pytest.mark.parametrize(("length", "scalars"), [(10, 100_000), pytest.param(250, 200_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_scalars(length: int, scalars: int) -> None:
    script = MEMORY_SCRIPT.format(length=length, scalars=scalars)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    results = 4 * 8 * scalars / 1024
    assert int(done.stdout) < results + 20_000  # kB


def test_standard_errors_are_those_of_the_functions_with_the_worse_tail() -> None:
    draws = autoregressive(np.random.default_rng(14), (4, 200, 5), 0.5)
    found = diagnostics.standard_errors(draws)
    np.testing.assert_array_equal(found.mean, diagnostics.mcse_mean(draws))
    np.testing.assert_array_equal(found.sd, diagnostics.mcse_sd(draws))
    tails = [diagnostics.mcse_quantile(draws, level) for level in (0.05, 0.95)]
    np.testing.assert_array_equal(found.quantile, np.maximum(*tails))


def test_standard_error_of_a_quantile_is_the_spread_of_quantiles_over_replicates() -> None:
    draws = autoregressive(np.random.default_rng(15), (4, 500, 1000), 0.6)
    spread = np.quantile(draws, 0.9, axis=(0, 1)).std()
    np.testing.assert_allclose(diagnostics.mcse_quantile(draws, 0.9).mean(), spread, rtol=4 / np.sqrt(2 * 1000))


@pytest.mark.parametrize("level", [0.0, 1.0, -0.2])
def test_a_quantile_level_outside_zero_and_one_is_refused(level: float) -> None:
    for figure in (diagnostics.mcse_quantile, diagnostics.ess_quantile):
        with pytest.raises(ValueError, match=r"`probability` must be between 0 and 1, got"):
            figure(np.zeros((2, 9)), level)


def test_effective_size_grows_in_proportion_to_the_draws_of_chains_that_mix() -> None:
    draws = autoregressive(np.random.default_rng(16), (4, 2000, 60), 0.5)
    lengths, sizes = diagnostics.ess_evolution(draws, 4)
    np.testing.assert_array_equal(lengths, [500, 1000, 1500, 2000])
    np.testing.assert_array_equal(sizes[1], diagnostics.ess_bulk(draws[:, :1000]))
    np.testing.assert_allclose(sizes.mean(axis=1) / sizes[-1].mean(), lengths / 2000, rtol=0.06)
    apart = draws + 5.0 * np.arange(4)[:, None, None]
    assert diagnostics.ess_evolution(apart, 4)[1].max() < 10  # and never grows for chains that disagree
    with pytest.raises(ValueError, match="S >= 4, got 10 and"):
        diagnostics.ess_evolution(np.zeros((2, 3, 1)))


def nested_rhat_by_hand(draws: np.ndarray, ids: np.ndarray) -> float:
    """The definition in loops, for one scalar of shape (C, S)."""
    means, within = [], []
    for superchain in np.unique(ids):
        members = draws[ids == superchain]
        means.append(members.mean())
        between = members.mean(axis=1).var(ddof=1) if len(members) > 1 else 0.0
        inside = np.mean([row.var(ddof=1) for row in members]) if draws.shape[1] > 1 else 0.0
        within.append(between + inside)
    return float(np.sqrt(1 + np.var(means, ddof=1) / np.mean(within)))


@pytest.mark.parametrize(("chains", "length", "count"), [(8, 5, 2), (12, 1, 4), (6, 30, 6)])
def test_nested_rhat_is_its_definition_for_given_and_for_consecutive_superchains(
    chains: int, length: int, count: int
) -> None:
    rng = np.random.default_rng(17)
    draws = rng.normal(size=(chains, length, 3)) + rng.normal(size=(chains, 1, 3))
    ids = np.repeat(np.arange(count), chains // count)
    expected = [nested_rhat_by_hand(draws[:, :, i], ids) for i in range(3)]
    np.testing.assert_allclose(diagnostics.nested_rhat(draws, count), expected, rtol=1e-12)
    order = rng.permutation(chains)
    np.testing.assert_allclose(diagnostics.nested_rhat(draws[order], ids[order]), expected, rtol=1e-12)


def test_nested_rhat_of_single_draws_is_the_closed_form_and_sees_starts_that_were_not_forgotten() -> None:
    draws = np.random.default_rng(18).normal(size=(64, 1, 4000))
    # With W = B_tilde the ratio of variances of 8 means of 8 is F distributed; its mean is 56 / 54 / 8.
    np.testing.assert_allclose(np.square(diagnostics.nested_rhat(draws, 8)).mean(), 1 + 56 / 54 / 8, rtol=0.005)
    apart = draws + np.repeat(np.random.default_rng(19).normal(size=8), 8)[:, None, None]
    assert np.median(diagnostics.nested_rhat(apart, 8)) > 1.3


@pytest.mark.parametrize("superchains", [1, 3, np.array([0, 0, 0, 1]), np.array([0, 1]), np.zeros(4)])
def test_superchains_that_do_not_fit_the_chains_are_refused(superchains: int | np.ndarray) -> None:
    with pytest.raises(ValueError, match="superchains"):
        diagnostics.nested_rhat(np.zeros((4, 5, 2)), superchains)
