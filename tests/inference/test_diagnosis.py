"""Diagnoses: figures equal to ArviZ's, warnings that carry their numbers, and a summary that JSON can hold."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
from torch import Tensor

from inference.backend import FitInfo
from inference.diagnosis import diagnose, function_draws, pareto_khat
from inference.distributions import DenseGaussian, DiagonalGaussian
from inference.posterior import DrawsPosterior, GaussianPosterior
from inference.target import Target, compile_target
from tests.cases import CASES, Case
from tests.conjugate import linear_regression


class Chains:
    """Stands in for a sampler."""

    capabilities = frozenset({"chains"})
    max_tree_depth = 3


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def chains(name: str, shift: float = 0.0, length: int = 50, **options: Any) -> DrawsPosterior:
    target = target_of(name)
    values = 0.3 * torch.randn(4, length, target.dim, generator=torch.Generator().manual_seed(0))
    values[0] += shift
    return DrawsPosterior(target, values, backend=Chains(), **options)


def exact(problem: Any, target: Target) -> GaussianPosterior:
    return GaussianPosterior(target, DenseGaussian.from_covariance(problem.mode, problem.covariance), backend="exact")


@pytest.mark.parametrize("name", ["by_hand", "two_outputs", "categorical", "local_effects"])
def test_rhat_and_ess_of_functions_equal_arviz(name: str) -> None:
    posterior = chains(name, shift=0.2)
    values = function_draws(posterior, case_named(name).x)
    assert values.shape[:3] == (4, 50, 12)
    found = diagnose(posterior)
    data = az.convert_to_dataset({"f": values, "theta": posterior.draws.numpy()})
    for figure, expected in (
        (found.rhat_functions, az.rhat(data).f),
        (found.rhat_weights, az.rhat(data).theta),
        (found.ess_bulk_functions, az.ess(data).f),
        (found.ess_tail_functions, az.ess(data, method="tail").f),
    ):
        np.testing.assert_allclose(figure, expected.to_numpy(), rtol=1e-8)


def test_function_draws_are_those_of_the_network() -> None:
    posterior = chains("two_outputs")
    x = torch.randn(5, 3)
    sites = posterior.target.unravel(posterior.draws)
    np.testing.assert_allclose(function_draws(posterior, x), torch.einsum("nd,csdk->csnk", x, sites["w"]), rtol=1e-10)


def test_chains_that_agree_raise_no_warning_and_chains_that_do_not_are_told_with_numbers() -> None:
    assert diagnose(chains("by_hand", length=1000)).trusted
    found = diagnose(chains("by_hand", shift=3.0))
    assert not found.trusted
    share = (found.rhat_functions > 1.1).mean()
    assert any(f"above 1.1 at {share:.0%}" in w for w in found.warnings)


def test_divergences_and_saturated_trees_are_counted_and_fit_warnings_repeated() -> None:
    stats = {"diverging": torch.zeros(4, 50, dtype=torch.bool), "tree_depth": torch.full((4, 50), 3)}
    stats["diverging"][1, :7] = True
    stats["tree_depth"][:2] = 2
    info = FitInfo(warnings=[("ConvergenceWarning", "42 steps short"), ("DivergenceWarning", "7 diverged in the fit")])
    found = diagnose(chains("by_hand", sample_stats=stats, info=info))
    assert found.divergences == 7
    assert found.depth_saturated == 0.5
    text = "\n".join(found.warnings)
    assert "7 of 200 draws diverged" in text
    assert "50% of the draws hit max_tree_depth=3" in text
    assert "42 steps short" in text
    assert text.count("diverged") == 1


def test_too_few_draws_for_rhat_are_named_and_not_refused() -> None:
    target = target_of("by_hand")
    found = diagnose(DrawsPosterior(target, torch.randn(2, 3, target.dim), backend=Chains()))
    assert any("3 draws per chain are too few" in w for w in found.warnings)
    assert found.summary()["rhat_functions_median"] is None


def test_probe_inputs_are_the_callers_or_spread_over_the_training_data() -> None:
    posterior = chains("by_hand")
    assert diagnose(posterior).rhat_functions.shape == (12,)
    assert diagnose(posterior, torch.randn(5, 3)).rhat_functions.shape == (5,)
    assert posterior.diagnose(torch.randn(3, 3)).rhat_functions.shape == (3,)
    with pytest.raises(ValueError, match="rows of shape"):
        diagnose(posterior, torch.randn(5, 4))
    problem = linear_regression(num=1_000)
    target = compile_target(problem.model, problem.x, problem.y)
    large = DrawsPosterior(target, torch.randn(2, 10, target.dim), backend=Chains())
    found = diagnose(large).rhat_functions
    assert found.shape == (200,)
    spread = problem.x[torch.linspace(0, 999, 200).round().long()]
    np.testing.assert_array_equal(found, diagnose(large, spread).rhat_functions)


def test_draws_that_are_no_chains_are_not_judged_by_rhat() -> None:
    target = target_of("by_hand")
    found = diagnose(DrawsPosterior(target, torch.randn(1, 5, target.dim), backend="ensemble"))
    assert found.trusted
    assert all(value is None for value in found.summary().values())


def test_khat_is_small_for_the_exact_posterior_and_large_for_one_that_is_too_narrow() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    right = exact(problem, target)
    assert not pareto_khat(right) > 0.5  # constant ratios up to rounding have no tail
    assert diagnose(right).trusted
    narrow = DenseGaussian.from_covariance(problem.mode, 0.05 * problem.covariance)
    found = diagnose(GaussianPosterior(target, narrow, backend="narrow"))
    assert found.khat > 0.7
    assert f"k-hat is {found.khat:.2f}" in found.warnings[0]
    assert found.summary()["khat"] == found.khat


def test_khat_approaches_one_minus_the_variance_ratio() -> None:
    problem = linear_regression(dim=1)
    target = compile_target(problem.model, problem.x, problem.y)
    narrow = GaussianPosterior(
        target, DenseGaussian.from_covariance(problem.mode, 0.4 * problem.covariance), backend="n"
    )
    assert pareto_khat(narrow, num_samples=20_000) == pytest.approx(0.6, abs=0.1)


def test_khat_says_so_where_the_density_is_not_finite() -> None:
    target = target_of("poisson")
    wide = DiagonalGaussian(torch.zeros(target.dim), torch.full((target.dim,), 1e200))
    found = diagnose(GaussianPosterior(target, wide, backend="wide"))
    assert math.isinf(found.khat)
    assert "k-hat cannot be computed" in found.warnings[0]
    assert found.summary()["khat"] == "inf"  # strict JSON has no infinity


def test_a_restricted_posterior_is_diagnosed_over_its_own_weights() -> None:
    whole = target_of("by_hand")
    small = whole.restrict("w2", torch.linspace(-1, 1, whole.dim))
    posterior = DrawsPosterior(small, torch.randn(4, 20, small.dim), backend=Chains())
    found = diagnose(posterior)
    assert found.rhat_weights.shape == (2,)
    assert found.rhat_functions.shape == (12,)
    gaussian = GaussianPosterior(small, DiagonalGaussian(torch.zeros(2), torch.ones(2)), backend="R")
    assert math.isfinite(pareto_khat(gaussian))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagnosis_works_in_both_dtypes_and_its_summary_is_json(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    case = case_named("by_hand")
    target = compile_target(case.model(), case.x.to(dtype), case.y.to(dtype))
    values: Tensor = torch.randn(2, 20, target.dim)
    stats = {"diverging": torch.ones(2, 20, dtype=torch.bool)}
    for posterior in (
        DrawsPosterior(target, values, backend=Chains(), sample_stats=stats),
        GaussianPosterior(target, DiagonalGaussian(values[0, 0], torch.full((target.dim,), 0.1)), backend="G"),
    ):
        found = posterior.diagnose()
        back = json.loads(json.dumps(found.summary(), allow_nan=False))
        assert back == found.summary()
        assert any(value is not None for value in back.values())


def test_the_report_prints_figures_and_warnings() -> None:
    text = str(diagnose(chains("by_hand", shift=3.0)))
    assert text.startswith("Chains: read the warnings")
    assert "functions at probes" in text
    assert "R-hat  " in text
    assert "\n  ! R-hat of the predictions" in text
    assert "khat" not in text
    assert str(diagnose(chains("by_hand", length=1000))).startswith("Chains: nothing to worry about found")


def test_constant_chains_do_not_break_the_summary() -> None:
    target = target_of("by_hand")
    values = torch.ones(2, 10, target.dim) * torch.tensor([0.0, 1.0])[:, None, None]
    found = diagnose(DrawsPosterior(target, values, backend=Chains()))
    json.dumps(found.summary(), allow_nan=False)
    assert not found.trusted


class Sampler(Chains):
    """One that adapts its step size."""

    target_accept = 0.8
    adapt_step_size = True


def energies(rho: float, seed: int = 3) -> Tensor:
    """Energies of four chains whose successive differences carry a share of about 2 - 2 rho of the variance."""
    noise = torch.randn(4, 400, generator=torch.Generator().manual_seed(seed))
    values = [noise[:, 0]]
    for t in range(1, 400):
        values.append(rho * values[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
    return torch.stack(values, 1)


def test_what_the_sampler_recorded_is_shown_per_chain_and_bad_figures_are_told_with_the_remedy() -> None:
    stats = {
        "diverging": torch.zeros(4, 400, dtype=torch.bool),
        "acceptance_rate": torch.tensor([0.8, 0.5, 0.82, 0.79]).unsqueeze(1).expand(4, 400),
        "step_size": torch.tensor([0.1, 0.1, 0.1, 0.9]).unsqueeze(1).expand(4, 400),
        "energy": torch.cat([energies(0.0)[:3], energies(0.95)[3:]]),
    }
    target = target_of("by_hand")
    values = 0.3 * torch.randn(4, 400, target.dim, generator=torch.Generator().manual_seed(0))
    found = diagnose(DrawsPosterior(target, values, backend=Sampler(), sample_stats=stats))
    np.testing.assert_allclose(found.bfmi, az.bfmi(stats["energy"].numpy()), rtol=1e-12)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.acceptance, [0.8, 0.5, 0.82, 0.79])  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.chain_divergences, [0, 0, 0, 0])  # type: ignore[arg-type]
    text = "\n".join(found.warnings)
    assert "acceptance is 0.50 in chain 1 where warm-up aimed at 0.8" in text
    assert "step sizes differ 9-fold between chains (0.1 to 0.9)" in text
    assert f"BFMI is {found.bfmi.min():.2f} (limit 0.3) in chain 3" in text  # type: ignore[union-attr]
    assert len(found.warnings) == 3
    lines = str(found).splitlines()
    assert any(line.split()[:5] == ["acceptance", "0.8", "0.5", "0.82", "0.79"] for line in lines)
    assert found.summary()["bfmi_min"] == found.bfmi.min()  # type: ignore[union-attr]


def test_a_sampler_without_an_aim_is_not_told_that_it_accepts_too_much() -> None:
    stats = {"acceptance_rate": torch.full((4, 1000), 0.999)}
    assert diagnose(chains("by_hand", length=1000, sample_stats=stats)).trusted


def test_standard_errors_are_in_posterior_standard_deviations() -> None:
    found = diagnose(chains("by_hand", length=1000))
    # Independent draws: 1/sqrt(4000) for the mean, 1/sqrt(8000) for the standard deviation.
    for errors, shape in ((found.functions.errors, (12,)), (found.weights.errors, (12,))):
        assert errors.mean.shape == shape
        np.testing.assert_allclose(errors.mean, 4000**-0.5, rtol=0.35)
    np.testing.assert_allclose(found.weights.errors.sd, 8000**-0.5, rtol=0.35)
    assert 0.02 < found.weights.errors.quantile.min() < found.weights.errors.quantile.max() < 0.06
    data = az.convert_to_dataset({"theta": chains("by_hand", length=1000).draws.numpy()})
    np.testing.assert_allclose(found.weights.ess_tail, az.ess(data, method="tail").theta.to_numpy(), rtol=1e-8)


def test_many_short_chains_are_judged_by_nested_rhat_of_superchains() -> None:
    target = target_of("by_hand")
    values = 0.3 * torch.randn(64, 5, target.dim, generator=torch.Generator().manual_seed(0))
    found = diagnose(DrawsPosterior(target, values, backend=Chains()))
    assert found.functions.nested.shape == (12,)
    assert found.trusted
    apart = values + torch.randn(8, 1, target.dim).repeat_interleave(8, 0)  # eight starts that were not forgotten
    worse = diagnose(DrawsPosterior(target, apart, backend=Chains()))
    assert worse.warnings[0].startswith("nested R-hat of the predictions is above 1.1 at")
    mixed = torch.arange(64) % 8  # the same chains, but each superchain has one of every start
    assert diagnose(DrawsPosterior(target, apart, backend=Chains()), superchains=mixed).trusted
    single = diagnose(DrawsPosterior(target, values[:, :1], backend=Chains()))
    assert single.trusted
    assert "nested R-hat" in str(single)


def test_weights_that_cannot_be_swapped_are_warned_about_and_others_noted() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    values = 0.3 * torch.randn(4, 1000, 3, generator=torch.Generator().manual_seed(0))
    values[0, :, 1] += 3
    found = diagnose(DrawsPosterior(target, values, backend=Chains()))
    assert any(w.startswith("R-hat of the weights is above 1.1 at 33% of them") for w in found.warnings)
    assert not found.notes
