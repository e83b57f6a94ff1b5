import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from inference.backend import Batches
from inference.bridges import PyroGuideVI
from inference.errors import NonFiniteError
from inference.target import Target, compile_target
from inference.variational import MeanFieldVI
from inference.variational.free_energy import GaussianPrior, free_energy, gaussian_prior
from inference.variational.mean_field import estimate_elbo, make_step, starting_scale
from tests.cases import tanh_network
from tests.conjugate import Conjugate, correlated_gaussian, linear_regression

QUICK = MeanFieldVI(num_steps=600, num_particles=8, step_size=0.02, progress=False)
network = tanh_network(2, 5)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_data(num: int = 20) -> tuple[Tensor, Tensor]:
    x = normal(num, 2)
    return x, torch.sin(x[:, 0]) + 0.1 * normal(num, seed=2)


def params_at(target: Target, scale: float = 0.3) -> Tensor:
    return torch.cat([0.3 * normal(target.dim, seed=3), torch.full((target.dim,), math.log(math.expm1(scale)))])


def gap(problem: Conjugate) -> float:
    """KL of the best independent Gaussian from the exact posterior."""
    precision = problem.precision
    best = MultivariateNormal(problem.mode, torch.diag(1 / precision.diag()))
    return float(kl_divergence(best, MultivariateNormal(problem.mode, precision_matrix=precision)))


@pytest.mark.parametrize("problem", [linear_regression(), correlated_gaussian()], ids=lambda p: p.name)
def test_gaussian_posteriors_get_their_mean_and_one_over_the_diagonal_precision(problem: Conjugate) -> None:
    posterior = QUICK.fit(problem.model, problem.x, problem.y)
    scale = problem.precision.diag().rsqrt()
    torch.testing.assert_close(
        (posterior.gaussian.loc - problem.mode) / scale, torch.zeros_like(scale), rtol=0, atol=0.08
    )
    torch.testing.assert_close(posterior.gaussian.scale / scale, torch.ones_like(scale), rtol=0, atol=0.04)


@pytest.mark.parametrize("problem", [linear_regression(), correlated_gaussian()], ids=lambda p: p.name)
def test_the_elbo_is_below_the_log_evidence_by_the_kl_divergence(problem: Conjugate) -> None:
    posterior = QUICK.fit(problem.model, problem.x, problem.y)
    error = posterior.info.extra["elbo_standard_error"]
    assert posterior.log_evidence < problem.log_evidence
    assert problem.log_evidence - posterior.log_evidence == pytest.approx(gap(problem), abs=4.5 * error + 2e-3)


def test_two_dimensions_with_correlation_nine_tenths_have_variance_019_and_kl_083() -> None:
    problem = correlated_gaussian(correlation=0.9, num=4)
    posterior = QUICK.fit(problem.model, problem.x, problem.y)
    assert gap(problem) == pytest.approx(0.8304, abs=1e-4)
    torch.testing.assert_close(5 * posterior.gaussian.variance, torch.full((2,), 0.19), rtol=0.04, atol=0)


def test_the_elbo_equals_the_log_evidence_for_a_diagonal_posterior() -> None:
    x = torch.linalg.qr(normal(20, 3))[0] * 4
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + 0.5 * normal(20, seed=2)

    def linear(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    marginal = MultivariateNormal(torch.zeros(20), 1.5**2 * x @ x.T + 0.25 * torch.eye(20))
    posterior = QUICK.fit(linear, x, y)
    assert posterior.log_evidence == pytest.approx(float(marginal.log_prob(y)), abs=0.01)


def many_priors(x: Tensor, y: Tensor | None = None) -> None:
    kind = {"dtype": x.dtype}
    pyro.sample("wide", dist.Normal(torch.zeros(3, **kind), torch.tensor([0.01, 1.0, 300.0], **kind)).to_event(1))
    pyro.sample("shifted", dist.Normal(torch.tensor(5.0, **kind), 2.0))
    pyro.sample("laplace", dist.Laplace(torch.zeros(3, **kind), 1.0).to_event(1))
    pyro.sample("student", dist.StudentT(torch.tensor(30.0, **kind), 0.0, 1.0).expand([4]).to_event(1))
    pyro.sample("correlated", dist.MultivariateNormal(torch.zeros(2, **kind), torch.eye(2, **kind) + 0.9))
    pyro.sample("positive", dist.HalfNormal(torch.tensor(1.0, **kind)))
    pyro.sample("gamma", dist.Gamma(torch.tensor(2.0, **kind), 1.0))
    pyro.sample("bounded", dist.Uniform(torch.tensor(-1.0, **kind), 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(1.0, **kind)))
    pyro.sample("horseshoe", dist.Normal(torch.zeros(300, **kind), tau).to_event(1))
    centre = pyro.sample("centre", dist.Normal(torch.tensor(0.0, **kind), 1.0))
    pyro.sample("around", dist.Normal(centre.expand(300), torch.ones(300, **kind)).to_event(1))
    pyro.sample("last", dist.Normal(torch.zeros(50, **kind), 0.3).to_event(1))
    pyro.sample("logs", dist.LogNormal(torch.tensor(0.0, **kind), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x, torch.ones((), **kind)), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gaussian_coordinates_of_a_prior_are_found_and_no_others(dtype: torch.dtype) -> None:
    target = compile_target(many_priors, torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype))
    found = gaussian_prior(target)
    names = [site.name for site in target.sites if found.mask[site.start : site.stop].all()]
    assert names == ["wide", "shifted", "last", "logs"]  # the logarithm of a log-normal is normal
    assert int(found.mask.sum()) == 3 + 1 + 50 + 1
    assert not found.everywhere
    expected = torch.cat([torch.tensor([1e4, 1.0, 1 / 9e4, 0.25]), torch.full((50,), 1 / 0.09), torch.tensor([0.25])])
    torch.testing.assert_close(found.precision[found.mask], expected.to(dtype), rtol=1e-3, atol=0)
    assert found.precision[~found.mask].abs().sum() == 0


def test_the_closed_form_kl_equals_its_monte_carlo_estimate() -> None:
    target = compile_target(network, *small_data())
    closed, params = gaussian_prior(target), params_at(target)
    assert closed.mask.sum() == 15
    sampled = GaussianPrior(torch.zeros_like(closed.mask), torch.zeros_like(closed.precision), False)
    eps = normal(4000, target.dim, seed=5)
    values = [
        torch.func.vmap(lambda e, p=p: free_energy(target, p, params, e[None], target.x, target.y, 1.0))(eps)
        for p in (closed, sampled)
    ]
    difference = values[0] - values[1]
    assert float(difference.std()) > 1e-3  # the two are different estimators
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / math.sqrt(4000)


def test_the_closed_form_kl_equals_torch_on_a_gaussian_prior() -> None:
    problem = linear_regression()
    target = compile_target(problem.model, problem.x, problem.y)
    params, eps = params_at(target), torch.zeros(1, target.dim)
    q = Normal(params[: target.dim], torch.nn.functional.softplus(params[target.dim :]))
    kl = kl_divergence(q, Normal(torch.zeros(target.dim), 1.5)).sum()
    got = free_energy(target, gaussian_prior(target), params, eps, target.x, target.y, 1.0) * target.num_data
    expected = kl - target.log_likelihood(params[: target.dim]).sum()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_the_weight_multiplies_the_kl_alone() -> None:
    target = compile_target(network, *small_data())
    prior, params, eps = gaussian_prior(target), params_at(target), normal(2, target.dim)
    none, half, full = (free_energy(target, prior, params, eps, target.x, target.y, w) for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2, rtol=1e-12, atol=0)
    theta = params[: target.dim] + torch.nn.functional.softplus(params[target.dim :]) * eps
    likelihood = torch.func.vmap(target.log_likelihood)(theta).sum(1).mean()
    torch.testing.assert_close(none, -likelihood / target.num_data, rtol=1e-12, atol=0)


def test_the_mean_over_disjoint_minibatches_is_the_full_objective() -> None:
    target = compile_target(network, *small_data())
    prior, params, eps = gaussian_prior(target), params_at(target), normal(2, target.dim)
    full = free_energy(target, prior, params, eps, target.x, target.y, 0.7)
    parts = [free_energy(target, prior, params, eps, target.x[i::4], target.y[i::4], 0.7) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), full, rtol=1e-10, atol=0)


def test_several_particles_are_the_mean_of_single_ones() -> None:
    target = compile_target(network, *small_data())
    prior, params, eps = gaussian_prior(target), params_at(target), normal(3, target.dim)
    grads = [
        torch.func.grad(lambda p, e=e: free_energy(target, prior, p, e, target.x, target.y, 1.0))(params)
        for e in (eps, eps[:1], eps[1:2], eps[2:])
    ]
    torch.testing.assert_close(grads[0], torch.stack(grads[1:]).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("annealing", [0.0, 1.0])
def test_the_reported_elbo_has_kl_weight_one(annealing: float) -> None:
    posterior = MeanFieldVI(num_steps=30, kl_annealing=annealing).fit(network, *small_data())
    target, gaussian = posterior.target, posterior.gaussian
    eps = normal(4000, target.dim, seed=8)
    params = torch.cat([gaussian.loc, gaussian.scale.expm1().log()])
    prior = gaussian_prior(target)
    values = torch.func.vmap(lambda e: free_energy(target, prior, params, e[None], target.x, target.y, 1.0))(eps)
    values = -values * target.num_data
    error = math.hypot(float(values.std()) / math.sqrt(4000), posterior.info.extra["elbo_standard_error"])
    assert abs(float(values.mean()) - posterior.log_evidence) < 4.5 * error
    assert posterior.info.extra["elbo"] == posterior.log_evidence


def test_annealing_starts_without_the_prior_and_ends_with_it() -> None:
    x, y = small_data()

    def far(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.01).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    init = torch.tensor([0.5, 0.5])
    one_step = [MeanFieldVI(num_steps=1, kl_annealing=a, step_size=0.1).fit(far, x, y, init=init) for a in (0.0, 1.0)]
    target = one_step[0].target
    assert float(target.log_prior(one_step[0].gaussian.loc)) > float(target.log_prior(init))
    posterior = MeanFieldVI(num_steps=500, kl_annealing=0.5, step_size=0.03).fit(far, x, y, init=init)
    assert posterior.gaussian.loc.abs().max() < 0.05


@pytest.mark.compiler
@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_compiled_step_is_the_eager_step(batch_size: int | None) -> None:
    target = compile_target(network, *small_data())
    steps = []
    for compile in (False, True):
        batches = Batches(target, batch_size, [target.stream(0)])
        step = make_step(target, batches, 2, params_at(target), compile, 10)
        generator = torch.Generator().manual_seed(4)
        for t in range(5):
            eps = torch.randn(2, target.dim, generator=generator)
            x, y = batches.next()
            x, y = (x, y) if batches.full else (x[0], y[0])  # type: ignore[index]
            value = step(eps, x, y, 0.2 * (t + 1), 0.01 / (t + 1))
        steps.append((step.params, value))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-10, atol=1e-12)


def test_one_eager_step_is_adams() -> None:
    target = compile_target(network, *small_data())
    start = params_at(target)
    step = make_step(target, Batches(target, None, [target.stream(0)]), 1, start, False, 10)
    twin = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([twin])
    for t, rate in enumerate((0.1, 0.05, 0.2)):
        eps = normal(1, target.dim, seed=t)
        step(eps, target.x, target.y, 1.0, rate)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        free_energy(target, gaussian_prior(target), twin, eps, target.x, target.y, 1.0).backward()
        optimiser.step()
    torch.testing.assert_close(step.params, twin.detach(), rtol=1e-10, atol=1e-12)


def test_temperatures_scale_the_covariance_and_the_number_of_data() -> None:
    problem = linear_regression()
    plain = problem.precision
    full = replace(QUICK, temperature=4.0).fit(problem.model, problem.x, problem.y).gaussian
    torch.testing.assert_close(full.scale * plain.diag().sqrt(), torch.full((3,), 2.0), rtol=0.02, atol=0)
    prior = torch.eye(3) / 1.5**2
    fewer = (plain - prior) / 4 + prior
    mean = torch.linalg.solve(fewer, (plain @ problem.mode) / 4)
    likelihood = replace(QUICK, likelihood_temperature=4.0).fit(problem.model, problem.x, problem.y).gaussian
    torch.testing.assert_close(likelihood.scale * fewer.diag().sqrt(), torch.ones(3), rtol=0.02, atol=0)
    torch.testing.assert_close((likelihood.loc - mean) * fewer.diag().sqrt(), torch.zeros(3), rtol=0, atol=0.08)


def test_minibatches_reach_the_same_answer() -> None:
    problem = linear_regression()
    posterior = replace(QUICK, batch_size=10, num_steps=1000).fit(problem.model, problem.x, problem.y)
    scale = problem.precision.diag().rsqrt()
    torch.testing.assert_close((posterior.gaussian.loc - problem.mode) / scale, torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(posterior.gaussian.scale / scale, torch.ones(3), rtol=0.1, atol=0)
    assert posterior.info.gradients == pytest.approx(1000 * 8 / 3)


def test_same_seed_same_answer_and_the_global_random_state_is_left_alone() -> None:
    quick = MeanFieldVI(num_steps=20, batch_size=7)
    state = torch.get_rng_state()
    first, again, other = (quick.fit(network, *small_data(), seed=s).gaussian.loc for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1, got 0"),
        ({"num_particles": -2}, "`num_particles` must be an integer >= 1, got -2"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer >= 1, got 2.5"),
        ({"step_size": -0.1}, "`step_size` must be > 0, got -0.1"),
        ({"init_scale": 0.0}, "`init_scale` must be > 0, got 0.0"),
        ({"kl_annealing": 1.5}, "`kl_annealing` must be between 0 and 1, got 1.5"),
        ({"kl_annealing": math.nan}, "`kl_annealing` must be between 0 and 1, got nan"),
        ({"temperature": 0}, "`temperature` must be > 0, got 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanFieldVI(**fields)


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 1000.0])
def test_the_starting_scale_is_what_was_asked_for(scale: float) -> None:
    problem = linear_regression()
    posterior = MeanFieldVI(num_steps=1, step_size=1e-12, init_scale=scale).fit(problem.model, problem.x, problem.y)
    torch.testing.assert_close(posterior.gaussian.scale, torch.full((3,), scale), rtol=1e-6, atol=0)


def test_wide_layers_start_with_less_noise_than_narrow_ones() -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([200, 5]).to_event(2))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w) @ v, noise), obs=y)

    target = compile_target(wide, normal(4, 200), normal(4))
    scale = target.unravel(starting_scale(target))
    torch.testing.assert_close(scale["w"], torch.full((200, 5), 0.7 / math.sqrt(200)), rtol=1e-12, atol=0)
    torch.testing.assert_close(scale["v"], torch.full((5,), 0.1), rtol=1e-12, atol=0)
    assert float(scale["noise"].log()) == pytest.approx(0.1)
    posterior = MeanFieldVI(num_steps=1, step_size=1e-12).fit_to(target)
    torch.testing.assert_close(posterior.gaussian.scale, starting_scale(target), rtol=1e-6, atol=0)


def test_a_free_energy_that_is_not_finite_stops_with_step_and_site() -> None:
    def explodes(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("calm", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((1e3 * w).exp() * x, 1.0), obs=y)

    ones = torch.ones(3)
    with pytest.raises(NonFiniteError, match="at step 0, first at site 'w'; lower `step_size`, now 0.03"):
        MeanFieldVI(num_steps=5).fit(explodes, ones, ones, init=torch.tensor([0.0, 1.0]))


@pytest.mark.slow
def test_pyros_own_guide_reaches_the_same_elbo() -> None:
    x, y = small_data()
    ours = MeanFieldVI(num_steps=3000, num_particles=4).fit(network, x, y, init=None)
    init = ours.sample_sites(1)
    pyros = PyroGuideVI("AutoNormal", num_steps=3000, num_particles=4).fit(network, x, y, init=init)
    assert ours.log_evidence == pytest.approx(pyros.log_evidence, abs=0.5)
    spread = pyros.flat_draws.std(0)
    torch.testing.assert_close(ours.gaussian.scale, spread, rtol=0.25, atol=0)


def test_the_elbo_estimate_says_how_uncertain_it_is() -> None:
    target = compile_target(network, *small_data())
    gaussian = MeanFieldVI(num_steps=10).fit_to(target).gaussian
    runs = torch.tensor([estimate_elbo(target, gaussian, target.stream(s)) for s in range(30)])
    assert float(runs[:, 0].std()) == pytest.approx(float(runs[:, 1].mean()), rel=0.5)
