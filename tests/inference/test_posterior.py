"""The three kinds of posterior: draws and weights, densities, starting points, and use as a Pyro guide."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

from inference.distributions import DenseGaussian, DiagonalGaussian, LowRankGaussian
from inference.errors import CapabilityError
from inference.posterior import DrawsPosterior, GaussianPosterior, MixturePosterior, Posterior
from inference.target import Target, compile_target
from tests.cases import CASES, Case

S = 6
GLOBAL = [c.name for c in CASES if not c.local]


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    """Recorded once for all tests: it holds no state."""
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def gaussian(name: str, seed: int = 0) -> GaussianPosterior:
    target = target_of(name)
    generator = torch.Generator().manual_seed(seed)
    loc = 0.3 * torch.randn(target.dim, generator=generator)
    return GaussianPosterior(target, DiagonalGaussian(loc, torch.full((target.dim,), 0.2)), backend="G()")


def draws(name: str, chains: int = 2, weights: Tensor | None = None) -> DrawsPosterior:
    target = target_of(name)
    generator = torch.Generator().manual_seed(1)
    values = 0.3 * torch.randn(chains, S, target.dim, generator=generator)
    return DrawsPosterior(target, values, backend="D()", weights=weights)


def mixture(name: str, weights: Tensor | None = None) -> MixturePosterior:
    return MixturePosterior(target_of(name), [gaussian(name), gaussian(name, 1)], backend="M()", weights=weights)


MAKERS: list[Callable[[str], Posterior]] = [gaussian, draws, mixture]


@pytest.mark.parametrize("maker", MAKERS)
def test_samples_have_their_shape_repeat_with_their_seed_and_leave_the_global_state_alone(maker: Any) -> None:
    posterior = maker("by_hand")
    before = torch.random.get_rng_state()
    first = posterior.sample(5, seed=3)
    assert first.shape == (5, posterior.target.dim)
    assert torch.equal(first, posterior.sample(5, seed=3))
    assert not torch.equal(first, posterior.sample(5, seed=4))
    assert torch.equal(before, torch.random.get_rng_state())
    sites = posterior.sample_sites(5, seed=3)
    torch.testing.assert_close(posterior.target.ravel(sites), first)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
            posterior.sample(wrong)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_repr_names_backend_and_sizes(maker: Any) -> None:
    assert repr(maker("by_hand")).endswith(f"P={target_of('by_hand').dim}, N=12)")


def test_draws_keep_their_chains_and_equal_weights_by_default() -> None:
    posterior = draws("by_hand")
    assert posterior.draws.shape == (2, S, posterior.target.dim)
    torch.testing.assert_close(posterior.weights, torch.full((2, S), 1 / 12))
    torch.testing.assert_close(posterior.mean_theta, posterior.draws.mean((0, 1)))
    assert len(posterior.sample(12).unique(dim=0)) == 12  # no draw twice where there are enough
    assert posterior.sample(40).shape == (40, posterior.target.dim)


def test_resampling_follows_the_weights() -> None:
    weights = torch.arange(12.0).reshape(2, S)
    posterior = draws("by_hand", weights=weights)
    share = weights.flatten() / weights.sum()
    torch.testing.assert_close(posterior.mean_theta, share @ posterior.flat_draws)
    picked = posterior.sample(20_000)
    counts = (picked[:, None] == posterior.flat_draws[None]).all(-1).double().mean(0)
    assert ((counts - share).abs() <= 4.5 * (share * (1 - share) / 20_000).sqrt()).all()
    assert counts[0] == 0


def test_components_are_all_draws_or_an_even_share_of_them() -> None:
    posterior = draws("by_hand")
    thetas, weights = posterior.components()
    assert torch.equal(thetas, posterior.flat_draws)
    assert float(weights.sum()) == pytest.approx(1)
    thinned, weights = posterior.components(4)
    assert len(thinned.unique(dim=0)) == 4
    first_chain = (thinned[:, None] == posterior.draws[0][None]).all(-1).any(-1)
    assert int(first_chain.sum()) == 2
    more, _ = posterior.components(36)
    _, counts = more.unique(dim=0, return_counts=True)
    assert counts.tolist() == [3] * 12


def test_thinning_weighted_draws_keeps_their_shares() -> None:
    posterior = draws("by_hand", weights=torch.tensor([[0.0, 3, 1, 0, 0, 0], [0, 0, 4, 0, 0, 0]]))
    thetas, weights = posterior.components(8)
    flat = posterior.flat_draws
    counts = (thetas[:, None] == flat[None]).all(-1).sum(0)
    assert counts.tolist() == [0, 3, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0]
    torch.testing.assert_close(weights @ thetas, posterior.mean_theta)


def test_weights_enter_the_prediction() -> None:
    case = case_named("by_hand")
    weights = torch.arange(12.0).reshape(2, S)
    posterior = draws("by_hand", weights=weights)
    predicted = posterior.predict(case.x)
    expected = torch.einsum("s,sn->n", weights.flatten() / weights.sum(), predicted.component_means())
    torch.testing.assert_close(predicted.mean, expected)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(3), "weights must have shape"),
        (-torch.ones(2, S), "none negative"),
        (torch.zeros(2, S), "not all zero"),
        (torch.full((2, S), math.nan), "finite"),
    ],
)
def test_unusable_weights_are_refused(weights: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draws("by_hand", weights=weights)


def test_misshapen_draws_and_gaussians_are_refused() -> None:
    target = target_of("by_hand")
    with pytest.raises(ValueError, match="draws must have shape"):
        DrawsPosterior(target, torch.zeros(3, target.dim), backend=None)
    with pytest.raises(ValueError, match="at least one draw"):
        DrawsPosterior(target, torch.zeros(1, 0, target.dim), backend=None)
    with pytest.raises(ValueError, match="must have"):
        GaussianPosterior(target, DiagonalGaussian(torch.zeros(2), torch.ones(2)), backend=None)
    with pytest.raises(ValueError, match="at least one component"):
        MixturePosterior(target, [], backend=None)
    with pytest.raises(ValueError, match="all parts must have"):
        MixturePosterior(target, [gaussian("one_number")], backend=None)
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\)"):
        mixture("by_hand", weights=torch.ones(3))


def test_missing_capabilities_are_named_with_the_backends_that_have_them() -> None:
    with pytest.raises(CapabilityError, match="NUTS"):
        _ = gaussian("by_hand").draws
    with pytest.raises(CapabilityError, match="DenseLaplace"):
        draws("by_hand").log_density(torch.zeros(target_of("by_hand").dim))
    with pytest.raises(CapabilityError, match="DenseLaplace"):
        _ = gaussian("by_hand").log_evidence
    assert not draws("by_hand").has_log_density


def test_a_mixture_adds_densities_and_its_variance_is_within_plus_between() -> None:
    weights = torch.tensor([1.0, 3.0])
    posterior = mixture("by_hand", weights)
    theta = torch.randn(5, posterior.target.dim)
    a, b = posterior.parts
    expected = (0.25 * a.log_density(theta).exp() + 0.75 * b.log_density(theta).exp()).log()
    torch.testing.assert_close(posterior.log_density(theta), expected)
    torch.testing.assert_close(posterior.log_density(theta[0]), expected[0])
    mean = 0.25 * a.mean_theta + 0.75 * b.mean_theta
    torch.testing.assert_close(posterior.mean_theta, mean)
    variance = 0.04 + 0.25 * (a.mean_theta - mean).square() + 0.75 * (b.mean_theta - mean).square()
    found = posterior.sample(40_000)
    z = (found.mean(0) - mean) / (variance / 40_000).sqrt()
    assert z.abs().max() < 4.5
    fourth = ((found - mean).pow(4).mean(0) - variance.square()) / 40_000
    assert ((found.var(0) - variance).abs() < 4.5 * fourth.sqrt()).all()


def test_a_mixture_of_draws_has_no_density_but_samples() -> None:
    posterior = MixturePosterior(target_of("by_hand"), [gaussian("by_hand"), draws("by_hand")], backend="M()")
    assert not posterior.has_log_density
    with pytest.raises(CapabilityError):
        posterior.log_density(torch.zeros(posterior.target.dim))
    assert posterior.sample(9).shape == (9, posterior.target.dim)


def test_other_seeds_of_a_mixture_share_no_noise() -> None:
    posterior = MixturePosterior(target_of("by_hand"), [gaussian("by_hand"), gaussian("by_hand")], backend="M()")
    everything = torch.cat([posterior.sample(50, seed=s) for s in range(4)])
    assert len(everything.unique(dim=0)) == 200


def test_starting_points_come_from_the_posterior_and_only_for_the_same_model() -> None:
    expected = [(s.name, s.shape) for s in target_of("by_hand").all_sites]
    assert torch.equal(gaussian("by_hand").starting_points(1, 0, expected)[0], gaussian("by_hand").mean_theta)
    assert len(gaussian("by_hand").starting_points(5, 0, expected).unique(dim=0)) == 5
    assert torch.equal(draws("by_hand").starting_points(12, 0, expected), draws("by_hand").flat_draws)
    assert draws("by_hand").starting_points(30, 0, expected).shape == (30, target_of("by_hand").dim)
    other = [(s.name, s.shape) for s in target_of("heteroscedastic").all_sites]
    for maker in MAKERS:
        with pytest.raises(ValueError, match="belongs to another model"):
            maker("by_hand").starting_points(1, 0, other)
        with pytest.raises(ValueError, match="belongs to another model: it has 5 sites, this model 4"):
            maker("by_hand").starting_points(1, 0, expected[:-1])


def restricted() -> GaussianPosterior:
    target = target_of("by_hand")
    small = target.restrict("w2", torch.linspace(-1, 1, target.dim))
    return GaussianPosterior(small, DiagonalGaussian(torch.zeros(small.dim), torch.ones(small.dim)), backend="R()")


def test_a_restricted_posterior_samples_every_site_and_fixes_the_others() -> None:
    posterior = restricted()
    full = target_of("by_hand").unravel(torch.linspace(-1, 1, target_of("by_hand").dim))
    sites = posterior.sample_sites(4)
    assert set(sites) == set(full)
    assert torch.equal(sites["w1"], full["w1"].expand(4, 3, 2))
    assert len(sites["w2"].unique(dim=0)) == 4
    expected = [(s.name, s.shape) for s in target_of("by_hand").all_sites]
    assert posterior.starting_points(3, 0, expected).shape == (3, target_of("by_hand").dim)
    traced = pyro.poutine.trace(posterior).get_trace(case_named("by_hand").x)
    assert torch.equal(traced.nodes["w1"]["value"], full["w1"])


# Pyro itself cannot evaluate "subsampling" on all of the data: its plate is smaller than them.
@pytest.mark.parametrize("name", [c.name for c in CASES if c.name != "subsampling"])
def test_every_model_takes_its_posterior_as_a_guide(name: str) -> None:
    case, posterior = case_named(name), gaussian(name)
    trace = pyro.poutine.trace(posterior).get_trace(case.x, case.y)
    for site in posterior.target.all_sites:
        assert tuple(trace.nodes[site.name]["value"].shape) == site.shape
    theta = posterior.target.ravel({s.name: trace.nodes[s.name]["value"] for s in posterior.target.sites})
    torch.testing.assert_close(theta, trace.nodes["_posterior_theta"]["value"])
    model = pyro.poutine.trace(pyro.poutine.replay(case.model(), trace=trace)).get_trace(case.x, case.y)
    assert bool(model.log_prob_sum().isfinite())


@pytest.mark.parametrize("name", GLOBAL)
def test_the_guide_density_is_that_of_the_sites(name: str) -> None:
    case, posterior = case_named(name), gaussian(name)
    trace = pyro.poutine.trace(posterior).get_trace(case.x, case.y)
    theta = trace.nodes["_posterior_theta"]["value"]
    jacobian = sum(s.log_abs_det_jacobian(theta[s.start : s.stop]) for s in posterior.target.sites)
    torch.testing.assert_close(trace.log_prob_sum(), posterior.log_density(theta) - jacobian)


@pytest.mark.parametrize("maker", [gaussian, mixture])
def test_the_elbo_of_the_guide_is_the_mean_log_ratio(maker: Any) -> None:
    case, posterior = case_named("by_hand"), maker("by_hand")
    loss = Trace_ELBO(num_particles=400).loss(case.model(), posterior, case.x, case.y)
    thetas = posterior.sample(4_000)
    target = posterior.target
    ratios = torch.stack([target.log_density(t) for t in thetas]) - posterior.log_density(thetas)
    assert abs(-loss - float(ratios.mean())) < 4.5 * float(ratios.std()) * math.sqrt(1 / 400 + 1 / 4_000)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ["by_hand", "pyro_module", "plated_weights", "hierarchical", "categorical"])
def test_sequential_predictive_gives_distinct_draws_that_agree_with_predict(maker: Any, name: str) -> None:
    case, posterior = case_named(name), maker(name)
    sites = posterior.target.sites
    model = case.model()
    found = Predictive(model, guide=posterior, num_samples=40, return_sites=[*(s.name for s in sites), "y"])(case.x)
    assert found["y"].shape == (40, 12)
    thetas = posterior.target.ravel({s.name: found[s.name].reshape(40, *s.shape) for s in sites})
    assert len(thetas.unique(dim=0)) == (40 if maker is not draws else min(12, len(thetas.unique(dim=0))))
    assert len(thetas.unique(dim=0)) > 6


@pytest.mark.parametrize("maker", MAKERS)
def test_parallel_predictive_gives_distinct_draws(maker: Any) -> None:
    case, posterior = case_named("broadcasting"), maker("broadcasting")
    predictive = Predictive(
        case.model(), guide=posterior, num_samples=S, parallel=True, return_sites=["w", "noise", "y"]
    )
    found = predictive(case.x)
    assert found["y"].shape[0] == S
    assert len(found["w"].reshape(S, -1).unique(dim=0)) == S
    assert len(found["noise"].reshape(S, -1).unique(dim=0)) == S


def two_sites_in_one_plate(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = (x * (w + z.sum(-1)).unsqueeze(-2)).sum(-1)
    with pyro.plate("data", x.shape[-2]):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
def test_sites_that_share_a_plate_work_in_predictive(parallel: bool) -> None:
    x = torch.randn(12, 3)
    target = compile_target(two_sites_in_one_plate, x, x.sum(-1))
    posterior = GaussianPosterior(target, DiagonalGaussian(torch.zeros(9), torch.ones(9)), backend="G()")
    predictive = Predictive(
        two_sites_in_one_plate, guide=posterior, num_samples=S, parallel=parallel, return_sites=["w", "z"]
    )
    found = predictive(x)
    assert found["w"].reshape(S, 3).unique(dim=0).shape == (S, 3)
    assert found["z"].reshape(S, 6).unique(dim=0).shape == (S, 6)


def test_predictive_and_predict_have_the_same_moments() -> None:
    case, posterior = case_named("broadcasting"), gaussian("broadcasting")
    found = Predictive(case.model(), guide=posterior, num_samples=20_000, parallel=True, return_sites=["y"])(case.x)[
        "y"
    ]
    predicted = posterior.predict(case.x, num_samples=20_000)
    mean_error = ((found.var(0) + predicted.epistemic_variance) / 20_000).sqrt()
    assert ((found.mean(0) - predicted.mean).abs() < 4.5 * mean_error).all()
    fourth = ((found - found.mean(0)).pow(4).mean(0) - found.var(0).square()) / 20_000
    assert ((found.var(0) - predicted.variance).abs() < 6.5 * fourth.sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guide_keeps_the_models_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    case = case_named("by_hand")
    x, y = case.x.to(dtype), case.y.to(dtype)
    target = compile_target(case.model(), x, y)
    posterior = GaussianPosterior(
        target, DiagonalGaussian(torch.zeros(target.dim), torch.ones(target.dim)), backend="G()"
    )
    found = Predictive(case.model(), guide=posterior, num_samples=3)(x)["y"]
    assert found.dtype == dtype
    assert posterior.predict(x).mean.dtype == dtype


def test_gaussians_of_every_kind_sample_and_have_a_density() -> None:
    target = target_of("one_number")
    for inner in (
        DiagonalGaussian(torch.zeros(1), torch.full((1,), 2.0)),
        LowRankGaussian(torch.zeros(1), torch.full((1,), 3.0), torch.ones(1, 1)),
        DenseGaussian(torch.zeros(1), scale_tril=torch.full((1, 1), 2.0)),
    ):
        posterior = GaussianPosterior(target, inner, backend="G()")
        theta = torch.randn(4, 1)
        torch.testing.assert_close(posterior.log_density(theta), dist.Normal(0.0, 2.0).log_prob(theta[:, 0]))


def test_prediction_counts_and_seeds_are_the_callers() -> None:
    case, posterior = case_named("by_hand"), gaussian("by_hand")
    predicted = posterior.predict(case.x, num_samples=9, seed=1)
    assert predicted.num_components == 9
    assert torch.equal(predicted.mean, posterior.predict(case.x, num_samples=9, seed=1).mean)
    assert not torch.equal(predicted.mean, posterior.predict(case.x, num_samples=9, seed=2).mean)
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        posterior.predict(case.x, num_samples=0)
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        draws("by_hand").predict(case.x, num_samples=0)
