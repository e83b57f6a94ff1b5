"""The seam against Pyro itself: densities, gradients, minibatches, starting points, refusals."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.poutine import condition, trace
from torch import Tensor
from torch.func import grad, jvp, vmap

from inference.data import index, map_tree
from inference.errors import UnsupportedModelError
from inference.target import Target, compile_target
from tests.cases import CASES, Case, N, X, Y, by_hand, hierarchical, normal, plain_twin_of_subsampling, subsampling
from tests.conjugate import Conjugate, linear_regression, problems
from tests.tolerances import seed

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@cache
def compiled(name: str) -> Target:
    case = next(c for c in CASES if c.name == name)
    return compile_target(case.model(), case.x, case.y)


def points(target: Target, num: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed(7))
    return 0.5 * torch.randn(num, target.dim, generator=generator, dtype=target.dtype)


def pyro_log_density(target: Target, model: Callable[..., Any], x: Any, y: Tensor, theta: Tensor) -> Tensor:
    """The slow twin: Pyro's conditioned trace, plus the Jacobian of every site by autograd."""
    values, jacobian = {}, torch.zeros(())
    for site in target.sites:
        flat = theta[site.start : site.stop]
        values[site.name] = site.constrain(flat)
        jacobian = jacobian + site.log_abs_det_jacobian(flat)
    found = trace(condition(model, data=values)).get_trace(x, y)
    found.compute_log_prob()
    return found.log_prob_sum() + jacobian


def twin_model(case: Case) -> Callable[..., Any]:
    """The case's model; for those that subsample, the plain twin (Pyro itself would draw a random batch)."""
    return plain_twin_of_subsampling if "subsampling" in case.name else case.model()


@every_case
def test_log_density_is_pyros_trace_plus_log_jacobians(case: Case) -> None:
    target = compiled(case.name)
    for theta in points(target):
        expected = pyro_log_density(target, twin_model(case), case.x, case.y, theta)
        torch.testing.assert_close(target.log_density(theta), expected, **EXACT)


@every_case
def test_float32_agrees_with_pyro_to_single_precision(case: Case) -> None:
    torch.set_default_dtype(torch.float32)
    x, y = map_tree(lambda t: t.float() if t.is_floating_point() else t, (case.x, case.y))
    model = twin_model(case)
    model = model.float() if isinstance(model, torch.nn.Module) else model
    target = compile_target(model, x, y)
    assert target.dtype == torch.float32
    theta = points(target, 1)[0]
    torch.testing.assert_close(
        target.log_density(theta), pyro_log_density(target, model, x, y, theta), rtol=2e-5, atol=2e-4
    )


@every_case
def test_log_jacobians_are_those_of_the_unraveling_map(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 1)[0]
    for site in target.sites:
        flat = theta[site.start : site.stop]
        jacobian = torch.func.jacrev(lambda t, s=site: s.constrain(t).reshape(-1))(flat)
        # on a manifold (simplex, correlations) the density is over the first entries that determine the rest
        if site.name in ("weights",):
            jacobian = jacobian[: site.size]
        elif site.name in ("corr", "factor"):
            rows, columns = torch.tril_indices(*site.shape, offset=-1 if site.name == "corr" else 0)
            jacobian = jacobian.reshape(*site.shape, -1)[rows, columns]
        torch.testing.assert_close(site.log_abs_det_jacobian(flat), torch.linalg.slogdet(jacobian)[1], **EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if not c.local], ids=lambda c: c.name)
def test_mean_over_disjoint_minibatches_is_the_full_value(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 1)[0]
    parts = torch.randperm(target.num_data, generator=torch.Generator().manual_seed(1)).chunk(min(3, target.num_data))
    estimates = [target.log_density_estimate(theta, index(case.x, rows), case.y[rows]) for rows in parts]
    torch.testing.assert_close(torch.stack(estimates).mean(), target.log_density(theta), **EXACT)


@pytest.mark.parametrize("name", ["subsampling", "subsampling_by_index"])
def test_subsampling_plates_give_the_target_of_plain_ones(name: str) -> None:
    target, twin = compiled(name), compile_target(plain_twin_of_subsampling, X, Y)
    theta = points(target, 1)[0]
    torch.testing.assert_close(target.log_likelihood(theta), twin.log_likelihood(theta), **EXACT)
    estimate = target.log_density_estimate(theta, X[:3], Y[:3])
    torch.testing.assert_close(estimate, twin.log_density_estimate(theta, X[:3], Y[:3]), **EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if not c.local], ids=lambda c: c.name)
def test_order_of_the_data_does_not_matter(case: Case) -> None:
    target = compiled(case.name)
    rows = torch.randperm(target.num_data, generator=torch.Generator().manual_seed(3))
    shuffled = compile_target(case.model(), index(case.x, rows), case.y[rows])
    theta = points(target, 1)[0]
    torch.testing.assert_close(shuffled.log_density(theta), target.log_density(theta), **EXACT)
    torch.testing.assert_close(shuffled.log_likelihood(theta), target.log_likelihood(theta)[rows], **EXACT)


@every_case
def test_ravel_undoes_unravel(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 3)
    sites = target.unravel(theta)
    assert {k: v.shape[1:] for k, v in sites.items()} == {s.name: s.shape for s in target.sites}
    torch.testing.assert_close(target.ravel(sites), theta, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-4, 4), min_size=9, max_size=9))
def test_ravel_undoes_unravel_for_any_theta(values: list[float]) -> None:
    target = compiled("corr_cholesky")
    theta = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(target.ravel(target.unravel(theta)), theta, rtol=1e-6, atol=1e-6)


@every_case
def test_vmap_is_the_loop(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 3)
    looped = torch.stack([target.log_density(t) for t in theta])
    torch.testing.assert_close(vmap(target.log_density)(theta), looped, **EXACT)
    looped = torch.stack([target.log_likelihood(t) for t in theta])
    torch.testing.assert_close(vmap(target.log_likelihood)(theta), looped, **EXACT)


@every_case
def test_gradient_is_that_of_the_pyro_trace(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 1)[0]
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pyro_log_density(target, twin_model(case), case.x, case.y, leaf), leaf)
    torch.testing.assert_close(grad(target.log_density)(theta), expected, rtol=1e-8, atol=1e-8)
    direction = torch.ones_like(theta)
    _, slope = jvp(target.log_density, (theta,), (direction,))
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("case", "num"), [(c, 1 + 2 * (i % 2)) for i, c in enumerate(CASES)], ids=lambda v: getattr(v, "name", str(v))
)
def test_log_density_and_grad_is_value_and_gradient(case: Case, num: int) -> None:
    target = compiled(case.name).tempered(2.0, 0.5)
    theta = points(target, num)
    values, grads = target.log_density_and_grad(num)(theta)
    torch.testing.assert_close(values, vmap(target.log_density)(theta), **EXACT)
    torch.testing.assert_close(grads, vmap(grad(target.log_density))(theta), rtol=1e-9, atol=1e-9)


def test_tempering_divides_the_energy_and_the_likelihood() -> None:
    target = compiled("by_hand")
    theta = points(target, 1)[0]
    prior, likelihood = target.log_prior(theta), target.log_likelihood(theta).sum()
    torch.testing.assert_close(target.tempered(4.0, 0.5).log_density(theta), (prior + likelihood / 0.5) / 4.0, **EXACT)
    with pytest.raises(ValueError, match="`temperature` must be > 0, got 0"):
        target.tempered(0.0)


@pytest.mark.parametrize("problem", problems(), ids=lambda p: p.name)
def test_conjugate_answers_agree_with_the_target(problem: Conjugate) -> None:
    target = compile_target(problem.model, problem.x, problem.y)
    for theta in points(target, 3):
        exact = problem.log_density(theta) + problem.log_evidence
        torch.testing.assert_close(target.log_density(theta), exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad(target.log_density)(problem.mode), torch.zeros(target.dim), rtol=0, atol=1e-8)
    hessian = -torch.func.hessian(target.log_density)(problem.mode)
    torch.testing.assert_close(hessian, problem.precision, rtol=1e-8, atol=1e-8)


# -- parts of theta ------------------------------------------------------------------------------------------------


def test_restricted_target_is_the_full_one_with_the_rest_fixed() -> None:
    target = compiled("by_hand")
    at, other = points(target, 2)
    small = target.restrict(["w2", "b*"], at)
    assert [s.name for s in small.sites] == ["b1", "w2", "b2"]
    assert small.dim == 5
    theta = small.reduce(other)
    full = small.expand(theta)
    torch.testing.assert_close(small.reduce(full), theta)
    torch.testing.assert_close(small.log_density(theta), target.log_density(full), **EXACT)
    torch.testing.assert_close(grad(small.log_density)(theta), small.reduce(grad(target.log_density)(full)), **EXACT)
    torch.testing.assert_close(small.reduce(at), small.ravel(target.unravel(at)))
    torch.testing.assert_close(small.expand(theta.expand(3, 5)), full.expand(3, target.dim))
    torch.testing.assert_close(small.unravel(theta)["w1"], target.unravel(at)["w1"])


def test_restrict_names_what_does_not_match() -> None:
    target = compiled("by_hand")
    at = points(target, 1)[0]
    with pytest.raises(ValueError, match=r"no site matches 'v\*'.*w1"):
        target.restrict("v*", at)
    with pytest.raises(ValueError, match=r"`at` must have shape \(12,\), got \(3,\)"):
        target.restrict("w1", at[:3])
    with pytest.raises(ValueError, match="restricted already"):
        target.restrict("w1", at).restrict("w1", at)


def test_ravel_names_missing_misshapen_and_impossible_sites() -> None:
    target = compiled("positive_scale")
    good = target.unravel(points(target, 1)[0])
    with pytest.raises(ValueError, match="no value for site 'noise'"):
        target.ravel({"w": good["w"]})
    with pytest.raises(ValueError, match="site 'w' has shape"):
        target.ravel({**good, "w": good["w"][:2]})
    with pytest.raises(ValueError, match="site 'noise' holds values outside its support"):
        target.ravel({**good, "noise": torch.tensor(-1.0)})


# -- starting points -------------------------------------------------------------------------------------------------


def test_random_starts_differ_by_index_and_repeat_by_seed() -> None:
    target = compiled("by_hand")
    few, many = target.initial(2, seed=3), target.initial(5, seed=3)
    torch.testing.assert_close(many[:2], few, rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in many}) == 5
    assert not torch.equal(target.initial(2, seed=4), few)


def test_random_starts_are_scaled_by_fan_in() -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w1 = pyro.sample("w1", normal(3, 400, scale=10.0))
        w2 = pyro.sample("w2", normal(400, 1, scale=10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((torch.tanh(x @ w1) @ w2).squeeze(-1), 1.0), obs=y)

    target = compile_target(wide, X, Y)
    sites = target.unravel(target.initial(1)[0])
    assert sites["w1"].std().item() == pytest.approx(3**-0.5, rel=0.1)
    assert sites["w2"].std().item() == pytest.approx(400**-0.5, rel=0.2)


def test_starting_points_come_from_sites_tensors_and_the_models_own() -> None:
    target = compiled("positive_scale")
    theta = points(target, 2)
    torch.testing.assert_close(target.initial(3, init=theta[0]), theta[0].expand(3, 4))
    torch.testing.assert_close(target.initial(2, init=theta), theta)
    torch.testing.assert_close(target.initial(2, init=target.unravel(theta[0])), theta[0].expand(2, 4))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        next(c for c in CASES if c.name == "positive_scale").model()(x, y)

    model.initial_sites = lambda: {"w": torch.tensor([1.0, 2.0, 3.0])}  # type: ignore[attr-defined]
    own = compile_target(model, X, Y).initial(2)
    torch.testing.assert_close(own[0, :3], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(own[1], target.initial(2)[1])


def test_unusable_starting_points_are_refused() -> None:
    target = compiled("positive_scale")
    with pytest.raises(ValueError, match=r"`init` must have shape \(4,\) or \(2, 4\), got \(3,\)"):
        target.initial(2, init=torch.zeros(3))
    with pytest.raises(ValueError, match="`init` must be a posterior, a dict of sites or a tensor, got str"):
        target.initial(2, init="zero")
    with pytest.raises(ValueError, match="`init` holds NaN"):
        target.initial(2, init=torch.full((4,), float("nan")))


def test_prior_draws_have_the_priors_moments() -> None:
    target = compiled("positive_scale")
    sites = target.unravel(target.sample_prior(2000, seed=seed(0)))
    assert sites["noise"].mean().item() == pytest.approx(1.0, abs=5 * (0.5 / 2000) ** 0.5)
    assert sites["w"].var().item() == pytest.approx(1.0, abs=5 * (2 / 6000) ** 0.5)
    assert torch.equal(target.sample_prior(3, seed=5), target.sample_prior(3, seed=5))


def test_streams_do_not_depend_on_how_many_run_beside_them() -> None:
    target = compiled("by_hand")
    alone = torch.randn(4, generator=target.stream(1, 2))
    beside = torch.randn(4, generator=target.streams(1, 5)[2])
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, torch.randn(4, generator=target.stream(1, 3)))
    assert not torch.equal(alone, torch.randn(4, generator=target.stream(2, 2)))


# -- the observed distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if not c.local], ids=lambda c: c.name)
def test_likelihood_at_new_inputs_is_the_models_own(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 1)[0]
    x = index(case.x, torch.arange(min(5, target.num_data)))
    values = target.unravel(theta)
    expected = trace(condition(twin_model(case), data=values)).get_trace(x).nodes["y"]["fn"]
    found = target.likelihood(theta, x)
    y = case.y[: min(5, target.num_data)]
    assert found.batch_shape == (len(y),)
    expected_log_prob = expected.log_prob(y)
    torch.testing.assert_close(found.log_prob(y), expected_log_prob.reshape(len(y), -1).sum(-1), **EXACT)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_family_log_prob_is_the_log_likelihood(case: Case) -> None:
    target = compiled(case.name)
    theta = points(target, 2)
    params = vmap(target.parameters)(theta)
    log_prob = target.family().distribution(params).log_prob(case.y)
    likelihood = vmap(target.log_likelihood)(theta)
    if case.name == "factor_per_datum":
        likelihood = likelihood + 0.1 * (case.x @ theta.T).T.square()
    torch.testing.assert_close(log_prob, likelihood, **EXACT)


def test_latents_per_datum_work_on_all_data_and_refuse_minibatches() -> None:
    target = compiled("local_effects")
    theta = points(target, 1)[0]
    assert torch.isfinite(target.log_density(theta))
    with pytest.raises(UnsupportedModelError, match="'effect' has one value per datum.*batch_size=None"):
        target.log_density_estimate(theta, X[:3], Y[:3])


def test_a_factor_on_the_data_outside_the_plate_refuses_minibatches() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        pyro.factor("smooth", -(x @ w).square().sum())
        plain_twin = pyro.plate("data", len(x))
        with plain_twin:
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    target = compile_target(model, X, Y)
    theta = points(target, 1)[0]
    torch.testing.assert_close(target.log_density(theta), pyro_log_density(target, model, X, Y, theta), **EXACT)
    with pytest.raises(UnsupportedModelError, match="minibatches would not add up"):
        target.log_density_estimate(theta, X[:3], Y[:3])


def test_strides_of_theta_and_data_do_not_matter() -> None:
    target = compiled("conv")
    case = next(c for c in CASES if c.name == "conv")
    theta = points(target, 2)
    strided, images = theta.T.contiguous().T, case.x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    expected = target.log_likelihood(theta[0])
    torch.testing.assert_close(target.log_likelihood(strided[0], images, case.y), expected, **EXACT)
    torch.testing.assert_close(vmap(target.log_density)(strided), vmap(target.log_density)(theta), **EXACT)
    torch.testing.assert_close(target.log_density_and_grad(2)(strided), target.log_density_and_grad(2)(theta), **EXACT)


@pytest.mark.parametrize(
    "outer", [grad, torch.func.jacrev, lambda f: vmap(grad(f)), lambda f: vmap(torch.func.hessian(f))]
)
def test_first_use_inside_a_transform_records_the_same_graph(outer: Callable[..., Any]) -> None:
    x, y = X[:5], Y[:5]
    fresh, used = compile_target(by_hand, X, Y), compiled("by_hand")
    used.log_density_estimate(points(used, 1)[0], x, y)
    used.eta(points(used, 1)[0], x)
    theta = points(used, 2) if "lambda" in outer.__name__ else points(used, 1)[0]

    def scalar(target: Target) -> Callable[[Tensor], Tensor]:
        return lambda t: target.log_density_estimate(t, x, y) + target.eta(t, x).sum()

    torch.testing.assert_close(outer(scalar(fresh))(theta), outer(scalar(used))(theta), **EXACT)


def test_a_thousand_thetas_at_once_give_a_thousand_densities() -> None:
    target = compiled("by_hand")
    values = vmap(target.log_density)(points(target, 1000))
    assert values.shape == (1000,)
    assert torch.isfinite(values).all()


# -- leaving no trace -------------------------------------------------------------------------------------------------


def _surroundings() -> tuple[Any, ...]:
    return (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002 (the global state is what is looked at)
        torch.get_default_dtype(),
        dict(pyro.get_param_store().items()),
        torch.distributions.Distribution._validate_args,
        torch.distributions.Distribution._validate_sample,
    )


def test_compiling_changes_nothing_around_it() -> None:
    pyro.param("mine", torch.ones(2))
    before = _surroundings()
    target = compile_target(by_hand, X.float(), Y.float())
    target.initial(2)
    target.sample_prior(3)
    target.likelihood(torch.zeros(12, dtype=torch.float32))
    after = _surroundings()
    assert str(after) == str(before)


def test_failing_to_compile_changes_nothing_either() -> None:
    def broken(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.param("p", torch.ones(()))
        raise KeyError("mine")

    before = _surroundings()
    with pytest.raises(KeyError, match="mine"):
        compile_target(broken, X.float(), Y.float())
    assert str(_surroundings()) == str(before)


def test_the_model_keeps_its_parameters_and_buffers() -> None:
    model = next(c for c in CASES if c.name == "frozen_features").model()
    assert isinstance(model, torch.nn.Module)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    target = compile_target(model, X, Y)
    target.log_density(torch.zeros(target.dim))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not target.log_density(torch.zeros(target.dim)).requires_grad


def test_hard_coded_plate_sizes_follow_the_batch() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    target, twin = compile_target(model, X, Y), compile_target(plain_twin_of_subsampling, X, Y)
    theta = points(target, 1)[0]
    torch.testing.assert_close(
        target.log_density_estimate(theta, X[:4], Y[:4]), twin.log_density_estimate(theta, X[:4], Y[:4]), **EXACT
    )


def test_only_one_of_x_and_y_is_refused() -> None:
    target = compile_target(subsampling, X, Y)
    with pytest.raises(ValueError, match="x and y must be given together"):
        target.log_likelihood(torch.zeros(3), X)


def test_sites_keep_the_models_order_and_cover_theta() -> None:
    target = compile_target(hierarchical, X, Y)
    assert [(s.name, s.start, s.stop) for s in target.sites] == [("tau", 0, 1), ("w", 1, 4), ("noise", 4, 5)]
    assert (target.dim, target.num_data, target.observed) == (5, N, "y")


def test_linear_regression_prediction_is_the_closed_form() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    found = target.likelihood(problem.mean, problem.x[:4])
    torch.testing.assert_close(found.mean, problem.x[:4] @ problem.mean, **EXACT)
