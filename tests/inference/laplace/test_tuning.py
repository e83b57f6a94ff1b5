"""Priors chosen by the evidence: exact on conjugate regression, the same by every method, and usable afterwards."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

import inference
from bnn_models import MLP, bayesianize, likelihoods, priors
from inference import (
    MAP,
    DenseLaplace,
    DiagonalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LaplaceEvidence,
    LargestVariance,
    LowRankLaplace,
    Subset,
    laplace_evidence,
    tune_at_linear_mode,
    tune_prior,
)
from inference.errors import ApproximationWarning, ConvergenceWarning
from inference.laplace.tuning import mackay, maximise
from tests.tolerances import z_limit

QUIET: dict[str, Any] = {"compile": False, "progress": False}
NOT_A_MODE = pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")
N, D = 20, 4
STRUCTURES = {
    "dense": DenseLaplace(**QUIET),
    "diagonal": DiagonalLaplace(**QUIET),
    "kronecker": KroneckerLaplace(**QUIET),
    "low_rank": LowRankLaplace(**QUIET),
}


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(scale: Any, noise: float = 0.5) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return model


def _regression() -> tuple[Tensor, Tensor]:
    x = _random(N, D)
    x[:, -1] = x[:, -1] + 0.8 * x[:, 0]
    return x, x @ torch.linspace(-1, 1, D) + 0.7 * _random(N, seed=5)


def exact_evidence(x: Tensor, y: Tensor, log_precision: Tensor, log_noise: Tensor) -> Tensor:
    """Marginal likelihood of Bayesian linear regression in closed form."""
    marginal = x @ x.T * (-log_precision).exp() + (2 * log_noise).exp() * torch.eye(len(x))
    return torch.distributions.MultivariateNormal(torch.zeros(len(x)), marginal).log_prob(y)


def _slopes(log_precision: Tensor, log_noise: float) -> Tensor:
    """Derivatives of the exact evidence."""
    x, y = _regression()
    point = torch.stack([log_precision.squeeze(), torch.tensor(log_noise)]).requires_grad_()
    return torch.autograd.grad(exact_evidence(x, y, point[0], point[1]), point)[0]


def test_the_evidence_before_is_that_of_bayesian_linear_regression() -> None:
    x, y = _regression()
    tuned = tune_prior(DenseLaplace(**QUIET).fit(linear(2.0), x, y))
    exact = exact_evidence(x, y, torch.tensor(-2 * math.log(2.0)), torch.tensor(math.log(0.5)))
    assert tuned.log_evidence_before == pytest.approx(float(exact), abs=1e-9)


@functools.cache
def _linear_evidence() -> LaplaceEvidence:
    posterior = DenseLaplace(**QUIET).fit(linear(2.0), *_regression())
    return laplace_evidence(posterior)  # type: ignore[arg-type]


def _until_it_stays(method: str, noise: bool) -> tuple[Tensor, Tensor, float]:
    """Mode, choice, mode with that choice, and so on: precision and noise (logarithms) and the log evidence there."""
    x, y = _regression()
    found = _linear_evidence()
    assert found.noise is not None
    a, log_noise = found.groups.start, torch.tensor(found.noise.log_scale)
    for _ in range(1000):
        theta = _ridge(x, y, a.exp(), log_noise)
        squares = (y - x @ theta).square().sum() / 0.25
        density = found.target.log_density(theta)
        found = replace(
            found,
            theta=theta,
            log_density=float(density),
            distances=theta.square(),
            noise=replace(found.noise, squares=float(squares)),
        )
        choose = {"gradient": maximise, "mackay": mackay}[method]
        moved, quieter, _, _ = choose(found, a, log_noise if noise else None, noise=noise, max_steps=100)
        change = float((moved - a).abs())
        a, log_noise = moved, log_noise if quieter is None else quieter
        if change < 1e-12:
            break
    return a, log_noise, float(found(a, log_noise))


def _ridge(x: Tensor, y: Tensor, precision: Tensor, log_noise: Tensor) -> Tensor:
    variance = (2 * log_noise).exp()
    return torch.linalg.solve(x.T @ x / variance + precision * torch.eye(D), x.T @ y / variance)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("method", ["gradient", "mackay"])
def test_both_methods_end_at_a_stationary_point_of_the_exact_evidence(method: str, noise: bool) -> None:
    a, log_noise, value = _until_it_stays(method, noise)
    slopes = _slopes(a, float(log_noise))
    assert abs(float(slopes[0])) < 1e-8
    assert abs(float(slopes[1])) < 1e-8 or not noise
    x, y = _regression()
    assert value == pytest.approx(float(exact_evidence(x, y, a[0], log_noise)), abs=1e-9)


def test_mackay_and_em_have_the_same_fixed_point() -> None:
    x, y = _regression()
    a = torch.tensor(0.25)
    for _ in range(3000):  # EM: a <- P / (|w|^2 + tr S)
        covariance = torch.linalg.inv(x.T @ x / 0.25 + a * torch.eye(D))
        mean = covariance @ x.T @ y / 0.25
        a = D / (mean.square().sum() + covariance.trace())
    found, _, _ = _until_it_stays("mackay", noise=False)
    assert float(found.exp()) == pytest.approx(float(a), rel=1e-9)
    assert abs(float(_slopes(a.log(), math.log(0.5))[0])) < 1e-8


def test_the_linear_mode_reaches_that_point_at_once() -> None:
    posterior = DenseLaplace(**QUIET).fit(linear(2.0), *_regression())
    tuned = tune_at_linear_mode(posterior, noise=True)  # type: ignore[arg-type]
    assert tuned.converged
    assert tuned.noise_scale is not None
    assert _slopes(tuned.log_precision, math.log(tuned.noise_scale)).abs().max() < 1e-8
    a, _, value = _until_it_stays("gradient", noise=True)
    assert float(tuned.log_precision) == pytest.approx(float(a), abs=1e-7)
    assert tuned.log_evidence == pytest.approx(value, abs=1e-8)


def test_fitting_the_tuned_model_and_tuning_again_climbs_to_that_point() -> None:
    x, y = _regression()
    model, values = linear(2.0), []
    for _ in range(3):
        tuned = tune_prior(DenseLaplace(**QUIET).fit(model, x, y))  # type: ignore[arg-type]
        model = tuned.model
        values.append(tuned.log_evidence)
    a, _, best = _until_it_stays("gradient", noise=False)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(best, abs=1e-4)
    assert float(tuned.log_precision) == pytest.approx(float(a), abs=0.02)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(2, 6), 1.0).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(6, 3), 1.0).to_event(2))
    b2 = pyro.sample("b2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 + b1) @ w2 + b2), obs=y)


def _classes() -> tuple[Tensor, Tensor]:
    x = _random(60, 2)
    return x, (x[:, 0] + 0.4 * _random(60, seed=9) > 0).long() + (x[:, 1] > 0.3).long()


@pytest.fixture(scope="module")
def fits() -> dict[str, GaussianPosterior]:
    torch.set_default_dtype(torch.float64)
    target = inference.compile_target(classes, *_classes())
    mode = DenseLaplace(start=MAP(num_steps=300, **QUIET), **QUIET).fit_to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # the low-rank one leaves something out
        at_mode = {name: replace(backend, start=None).fit_to(target, init=mode) for name, backend in STRUCTURES.items()}
    return at_mode  # type: ignore[return-value]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("groups", ["all", "site"])
def test_gradient_and_mackay_agree_and_raise_the_evidence(
    structure: str, groups: Any, fits: dict[str, GaussianPosterior]
) -> None:
    by_gradient = tune_prior(fits[structure], groups=groups)
    by_mackay = tune_prior(fits[structure], groups=groups, method="mackay", max_steps=5000)
    torch.testing.assert_close(by_gradient.log_precision, by_mackay.log_precision, rtol=0, atol=1e-5)
    assert by_gradient.log_evidence == pytest.approx(by_mackay.log_evidence, abs=1e-8)
    assert by_gradient.log_evidence > by_gradient.log_evidence_before + 0.1
    assert by_gradient.history[-1] == pytest.approx(by_gradient.log_evidence, abs=1e-9)
    evidence = laplace_evidence(fits[structure], groups=groups)
    point = by_gradient.log_precision.clone().requires_grad_()
    assert torch.autograd.grad(evidence(point), point)[0].abs().max() < 1e-6


@pytest.mark.parametrize("structure", ["dense", "diagonal", "low_rank"])
def test_a_precision_for_every_weight_prunes_weights(structure: str, fits: dict[str, GaussianPosterior]) -> None:
    tuned = tune_prior(fits[structure], groups="weight", max_steps=2000)
    assert tuned.log_evidence > tune_prior(fits[structure]).log_evidence
    assert tuned.prior_precision["w1"].shape == (2, 6)
    assert len(tuned.groups) == fits[structure].target.dim


def test_the_tuned_posterior_is_the_fit_of_the_tuned_model_at_the_same_mode() -> None:
    x, y = _regression()
    tuned = tune_prior(DenseLaplace(**QUIET).fit(linear(2.0), x, y), noise=True)  # type: ignore[arg-type]
    again = DenseLaplace(start=None, newton_steps=0, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # the mode is the declared prior's
        twin = again.fit(tuned.model, x, y, init=tuned.posterior.mean_theta)
    assert twin.log_evidence == pytest.approx(tuned.posterior.log_evidence, abs=1e-8)
    new = _random(3, D, seed=8)
    for name in ("mean", "variance", "f_variance"):
        found, expected = (getattr(p.predict(new), name) for p in (tuned.posterior, twin))
        torch.testing.assert_close(found, expected)
    theta = tuned.posterior.mean_theta
    torch.testing.assert_close(tuned.posterior.target.log_density(theta), twin.target.log_density(theta))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_tuned_posterior_predicts_and_is_saved_with_its_model(
    structure: str, tmp_path: Any, fits: dict[str, GaussianPosterior]
) -> None:
    tuned = tune_prior(fits[structure])
    assert type(tuned.posterior.gaussian) is type(fits[structure].gaussian)
    x = _classes()[0][:5]
    tuned.posterior.save(tmp_path)
    loaded = inference.load(tmp_path, tuned.model)
    assert torch.equal(loaded.predict(x).probs, tuned.posterior.predict(x).probs)
    assert loaded.log_evidence == tuned.log_evidence
    assert loaded.info.extra["prior_scales"] == tuned.scales
    assert tuned.log_evidence_before == fits[structure].log_evidence < tuned.log_evidence


def test_scales_fit_the_priors_of_bnn_models() -> None:
    x, y = _regression()
    model = MLP([D, 3, 1], prior=priors.Normal(scale="fan_in"), likelihood=likelihoods.Normal(0.5))
    posterior = KroneckerLaplace(**QUIET).fit(model, x, y)
    tuned = tune_prior(posterior, noise=True)  # type: ignore[arg-type]
    assert tuned.noise_scale is not None
    declared = MLP([D, 3, 1], prior=priors.Normal(tuned.scales), likelihood=likelihoods.Normal(tuned.noise_scale))
    target = inference.compile_target(declared, x, y)
    theta = posterior.mean_theta + 0.1
    torch.testing.assert_close(target.log_density(theta), tuned.posterior.target.log_density(theta))


def test_scales_fit_a_trained_module_with_sites_left_alone() -> None:
    x, y = _regression()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    model = bayesianize(net, likelihood=likelihoods.Normal(0.5))
    posterior = KroneckerLaplace(**QUIET).fit(model, x, y)
    tuned = tune_prior(posterior, sites="*.weight")  # type: ignore[arg-type]
    assert set(tuned.scales) == {"0.weight", "2.weight"}
    again = bayesianize(net, prior=priors.Normal({**tuned.scales, "*": 1.0}), likelihood=likelihoods.Normal(0.5))
    theta = posterior.mean_theta
    mine = tuned.posterior.target.log_density(theta)
    torch.testing.assert_close(inference.compile_target(again, x, y).log_density(theta), mine)
    twin = KroneckerLaplace(start=None, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        assert twin.fit(again, x, y, init=theta).log_evidence == pytest.approx(tuned.log_evidence, abs=1e-8)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_tuned_model_runs_in_pyro_with_its_priors_and_noise(parallel: bool) -> None:
    x, y = _regression()
    model = MLP([D, 3, 1], prior=priors.Normal(2.0), likelihood=likelihoods.Normal(3.0))
    tuned = tune_prior(DiagonalLaplace(**QUIET).fit(model, x, y), noise=True)  # type: ignore[arg-type]
    prior = Predictive(tuned.model, num_samples=400, parallel=parallel)(x)
    for name, scale in tuned.scales.items():
        values = prior[name].reshape(400, -1)
        z = (values.square().mean() / scale**2 - 1) * (values.numel() / 2) ** 0.5
        assert abs(float(z)) < z_limit()
    assert prior["y"].shape == (400, N)
    drawn = Predictive(tuned.model, guide=tuned.posterior, num_samples=6, parallel=parallel)(x)["y"]
    assert drawn.shape == (6, N)
    assert len(drawn[:, 0].unique()) == 6


def test_distributions_have_the_prior_means_and_shapes_of_the_sites() -> None:
    x, y = _regression()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(1.0, 2.0).expand([2, 2]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w.reshape(4), 0.5), obs=y)

    tuned = tune_prior(DenseLaplace(**QUIET).fit(model, x, y))  # type: ignore[arg-type]
    prior = tuned.distributions()["w"]
    assert prior.event_shape == (2, 2)
    torch.testing.assert_close(prior.mean, torch.ones(2, 2))
    torch.testing.assert_close(prior.variance, torch.full((2, 2), 1 / float(tuned.prior_precision["w"])))


def test_a_subset_is_tuned_and_predicts() -> None:
    x, y = _classes()
    posterior = Subset(DenseLaplace(**QUIET), sites="*2").fit(classes, x, y)
    tuned = tune_prior(posterior)  # type: ignore[arg-type]
    assert set(tuned.scales) == {"w2", "b2"}
    assert tuned.posterior.predict(x[:3]).probs.shape == (3, 3)
    assert tuned.posterior.target.dim == posterior.target.dim


def test_single_weights_are_tuned_and_the_rest_of_their_site_keeps_its_prior() -> None:
    x, y = _classes()
    backend = Subset(DenseLaplace(**QUIET), sites=LargestVariance(9, by=DiagonalLaplace(**QUIET)))
    posterior = backend.fit(classes, x, y)
    tuned = tune_prior(posterior, groups="all")  # type: ignore[arg-type]
    kept = posterior.target.entries
    assert kept is not None
    full = torch.cat([tuned.distributions()[s.name].stddev.flatten() if s.name in tuned.scales else torch.ones(s.size)
                      for s in posterior.target.all_sites])  # fmt: skip
    expected = torch.ones(len(full))
    expected[kept] = (-tuned.log_precision / 2).exp()
    torch.testing.assert_close(full, expected)
    assert tuned.posterior.predict(x[:3]).probs.shape == (3, 3)
    theta = posterior.mean_theta
    change = tuned.posterior.target.log_prior(theta) - posterior.target.log_prior(theta)
    old, new = (dist.Normal(0.0, s[kept]).log_prob(theta).sum() for s in (torch.ones(len(full)), expected))
    torch.testing.assert_close(change, new - old)


def test_validation_takes_the_best_of_the_grid(fits: dict[str, GaussianPosterior]) -> None:
    x, y = _classes()
    tuned = tune_prior(fits["kronecker"], groups="all", method="validation", validation=(x[:20], y[:20]))
    assert len(tuned.history) == 100
    assert min(tuned.history) == pytest.approx(-float(tuned.posterior.predict(x[:20]).log_prob(y[:20]).mean()))
    grid = torch.logspace(-4, 4, 100)
    assert float(tuned.prior_precision["w1"]) == pytest.approx(float(grid[tuned.history.index(min(tuned.history))]))


@NOT_A_MODE
def test_the_g_prior_does_not_depend_on_the_units_of_an_input() -> None:
    x, y = _regression()
    new = _random(3, D, seed=8)
    for factor, tolerance in ((1024.0, 1e-15), (10.0, 1e-13)):
        variances = {}
        for scaling in ("g_prior", "declared"):
            for units in (1.0, factor):
                column = torch.tensor([1.0, units, 1.0, 1.0])
                posterior = DenseLaplace(start=None, **QUIET).fit(linear(2.0), x * column, y, init=torch.zeros(D))
                evidence = laplace_evidence(posterior, groups="all", scaling=scaling)  # type: ignore[arg-type]
                gaussian = evidence.gaussian(torch.tensor([2.0]))
                variances[scaling, units] = gaussian.quadratic(new * column).diagonal()
        close = {"rtol": tolerance, "atol": 0.0}
        torch.testing.assert_close(variances["g_prior", factor], variances["g_prior", 1.0], **close)
        assert ((variances["declared", factor] / variances["declared", 1.0] - 1).abs() > 0.01).any()


def test_the_g_prior_of_inputs_that_are_never_used_is_the_mean_of_the_others() -> None:
    x, y = _regression()
    x = x.clone()
    x[:, 1] = 0.0
    for backend in (DenseLaplace(**QUIET), KroneckerLaplace(**QUIET)):
        evidence = laplace_evidence(backend.fit(linear(2.0), x, y), scaling="g_prior")  # type: ignore[arg-type]
        others = evidence.groups.base[[0, 2, 3]]
        assert float(evidence.groups.base[1]) == pytest.approx(float(others.log().mean().exp()), rel=1e-9)


@NOT_A_MODE
def test_a_precision_without_a_best_value_stops_at_the_end_of_the_range_and_is_named() -> None:
    x, y = _regression()
    posterior = DenseLaplace(start=None, **QUIET).fit(linear(2.0), x, y, init=torch.zeros(D))
    with pytest.warns(ApproximationWarning, match=r"ever more narrow prior in 1 of 1 groups \(in w\).* 1e\+10 times"):
        tune_prior(posterior, method="mackay")  # type: ignore[arg-type]


def test_too_few_steps_are_said_to_be() -> None:
    x, y = _regression()
    posterior = DenseLaplace(**QUIET).fit(linear(2.0), x, y)
    with pytest.warns(ConvergenceWarning, match="still move after 1 steps of 'mackay'"):
        tuned = tune_prior(posterior, method="mackay", max_steps=1)  # type: ignore[arg-type]
    assert not tuned.converged
    assert "NOT converged after 1 steps" in str(tuned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "em"}, "`method` must be one of 'gradient', 'mackay', 'validation', got 'em'"),
        ({"max_steps": 0}, "`max_steps` must be an integer >= 1, got 0"),
        ({"method": "validation"}, 'held-out data and method="validation" belong together'),
        ({"validation": (1, 2)}, 'held-out data and method="validation" belong together'),
        ({"method": "validation", "validation": (1, 2)}, 'searches one number: pass groups="all" and noise=False'),
        ({"noise": True}, "only the noise of a Normal likelihood of known scale is chosen here"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str, fits: dict[str, GaussianPosterior]) -> None:
    with pytest.raises(ValueError, match=message):
        tune_prior(fits["diagonal"], **options)
