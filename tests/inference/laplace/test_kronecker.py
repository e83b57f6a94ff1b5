"""KroneckerLaplace: exact on one layer, its dense twin elsewhere, and any network without special code."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

import inference
from inference import MAP, DenseLaplace, DiagonalLaplace, KroneckerLaplace, Subset
from inference.errors import ApproximationWarning
from inference.hessians import prior_precision_diagonal
from inference.jacobians import eta_and_jacobian, linearized_joint, linearized_moments
from inference.kronecker import kronecker_curvature
from inference.target import Target, compile_target
from tests.cases import normal
from tests.networks import HAND_WRITTEN, MODULES, NAMES, network
from tests.tolerances import z_limit

QUIET: dict[str, Any] = {"compile": False, "progress": False}
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(3, 2, scale=1.5)), pyro.sample("b", normal(2, scale=3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5).to_event(1), obs=y)


def two_layers(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(3, 6)), pyro.sample("b1", normal(6, scale=2.0))
    w2, b2 = pyro.sample("w2", normal(6, 3, scale=0.5)), pyro.sample("b2", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 + b1) @ w2 + b2), obs=y)


def _classes() -> tuple[Tensor, Tensor]:
    x = _random(40, 3)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _posterior(name: str, **fields: Any) -> inference.GaussianPosterior:
    target, theta = network(name)
    backend = KroneckerLaplace(start=None, **QUIET, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # theta is random: not a mode
        found = backend.fit_to(target, init=theta)
    assert isinstance(found, inference.GaussianPosterior)
    return found


def _dense_twin(target: Target, theta: Tensor) -> Tensor:
    """The covariance by brute force: products of the factors, the prior, one inverse of P x P."""
    curvature = kronecker_curvature(target, theta)
    precision = prior_precision_diagonal(target, theta).diag()
    for factors in curvature.layers:
        order = factors.positions.flatten()
        precision[order[:, None], order] += factors.dense()
    for entries, matrix in curvature.sites:
        precision[entries[:, None], entries] += matrix
    return torch.linalg.inv(precision)


def test_one_linear_layer_has_the_posterior_evidence_and_predictive_of_dense_laplace() -> None:
    x, y, new = _random(20, 3), _random(20, 2), _random(5, 3, seed=8)
    kronecker = KroneckerLaplace(newton_steps=20, **QUIET).fit(linear, x, y)
    dense = DenseLaplace(**QUIET).fit(linear, x, y)
    torch.testing.assert_close(kronecker.mean_theta, dense.mean_theta, **TIGHT)
    torch.testing.assert_close(kronecker.gaussian.covariance(), dense.gaussian.covariance(), **TIGHT)
    assert kronecker.log_evidence == pytest.approx(dense.log_evidence, abs=1e-8)
    assert kronecker.info.warnings == []
    for name in ("mean", "variance", "f_variance"):
        found, expected = (getattr(p.predict(new), name) for p in (kronecker, dense))
        torch.testing.assert_close(found, expected, **TIGHT)


def test_a_trained_two_layer_network_equals_its_brute_force_dense_twin() -> None:
    x, y = _classes()
    posterior = KroneckerLaplace(**QUIET).fit(two_layers, x, y)
    target, mode, new = posterior.target, posterior.mean_theta, _random(7, 3)
    covariance = _dense_twin(target, mode)
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(posterior.gaussian.covariance(), covariance, **close)
    _, jacobian = eta_and_jacobian(target, mode, new)
    found = linearized_moments(target, posterior.gaussian, mode, new)[1]
    torch.testing.assert_close(found, jacobian @ covariance @ jacobian.mT, **close)
    flat = jacobian.flatten(0, 1)
    joint = linearized_joint(target, posterior.gaussian, mode, new)[1].reshape(21, 21)
    torch.testing.assert_close(joint, flat @ covariance @ flat.mT, **close)
    volume = target.dim / 2 * torch.tensor(2 * torch.pi).log() + torch.logdet(covariance) / 2
    assert posterior.log_evidence == pytest.approx(float(target.log_density(mode) + volume), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_any_network_runs_without_special_code_and_equals_its_dense_twin(name: str) -> None:
    posterior = _posterior(name)
    target, theta = network(name)
    torch.testing.assert_close(posterior.gaussian.covariance(), _dense_twin(target, theta), rtol=1e-7, atol=1e-9)
    assert torch.isfinite(posterior.predict(target.x, num_samples=10).mean).all()


@pytest.mark.parametrize("name", ["learnt_noise", "lenet", "encoder"])
def test_draws_have_the_stated_covariance(name: str) -> None:
    posterior = _posterior(name)
    draws, covariance = posterior.sample(4000, seed=2), posterior.gaussian.covariance()
    variance = covariance.diagonal()
    spread = torch.outer(variance, variance) + covariance.square()
    z = (draws.T.cov(correction=0) - covariance) / (spread / 4000).sqrt()
    assert z.abs().max() < z_limit(covariance.numel())


@pytest.mark.parametrize(("name", "pattern"), [("lenet", "3.*"), ("lenet", "*.bias"), ("resnet", "last.*")])
def test_a_subset_has_the_conditional_covariance_of_its_sites(name: str, pattern: str) -> None:
    target, theta = network(name)
    part = target.restrict(pattern, theta)
    backend = Subset(KroneckerLaplace(start=None, **QUIET), sites=pattern, rest=None)
    with pytest.warns(ApproximationWarning, match="not at a mode"):
        posterior = backend.fit_to(target, init=theta)
    twin = _dense_twin(part, part.reduce(theta))
    torch.testing.assert_close(posterior.gaussian.covariance(), twin, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["learnt_noise", "lenet"])
def test_saved_and_loaded_it_predicts_and_guides_as_before(name: str, tmp_path: Any) -> None:
    from bnn_models import bayesianize, likelihoods

    posterior = _posterior(name)
    target, _ = network(name)
    posterior.save(tmp_path)
    torch.manual_seed(0)
    if name in MODULES:
        model: Any = bayesianize(MODULES[name][0]().double().eval(), likelihood=likelihoods.Categorical())
    else:
        model = HAND_WRITTEN[name]
    loaded = inference.load(tmp_path, model)
    assert torch.equal(loaded.sample(3), posterior.sample(3))
    assert torch.equal(loaded.predict(target.x).f_variance, posterior.predict(target.x).f_variance)
    assert Predictive(model, guide=loaded, num_samples=4)(target.x)["y"].shape[0] == 4


def test_k_hat_says_whether_draws_resemble_the_posterior() -> None:
    exact = KroneckerLaplace(newton_steps=20, **QUIET).fit(linear, _random(20, 3), _random(20, 2))
    assert exact.diagnose().khat < 0.5
    assert _posterior("learnt_noise").diagnose().khat > 0.7  # at a random point


def test_large_sites_outside_the_layers_are_named_in_a_warning() -> None:
    def gains(x: Tensor, y: Tensor | None = None) -> None:
        g, w = pyro.sample("gains", normal(70)), pyro.sample("w", normal(70))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * g).tanh() @ w, 0.5), obs=y)

    with pytest.warns(ApproximationWarning, match=r"diagonal covariance \(the exact GGN's\): gains"):
        KroneckerLaplace(start=MAP(num_steps=100, **QUIET), **QUIET).fit(gains, _random(20, 70), _random(20))


def test_a_prior_that_does_not_factor_is_named_in_a_warning() -> None:
    scale = torch.ones(3, 2)
    scale[0, 0] = 0.5

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), scale).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    with pytest.warns(ApproximationWarning, match=r"replaced by the nearest that is, .* in w \(by up to \d"):
        KroneckerLaplace(**QUIET).fit(model, _random(20, 3), _random(20, 2))


def test_a_hierarchical_prior_is_said_to_lose_its_correlations() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    with pytest.warns(ApproximationWarning, match="the prior couples entries of theta"):
        KroneckerLaplace(**QUIET).fit(model, _random(20, 3), _random(20))


@functools.cache
def _well_fitted() -> tuple[Target, Tensor]:
    target = compile_target(linear, _random(400, 3), 0.5 * _random(400, 2))
    return target, MAP(**QUIET).fit_to(target).mean_theta


@pytest.mark.parametrize("curvature", ["fisher", "monte_carlo"])
@pytest.mark.parametrize("backend", [DenseLaplace, DiagonalLaplace, KroneckerLaplace])
def test_fishers_from_labels_have_about_the_size_of_the_ggn(backend: type, curvature: str) -> None:
    target, mode = _well_fitted()
    kinds = ("ggn", curvature)
    fits = [backend(curvature=kind, start=None, **QUIET).fit_to(target, init=mode) for kind in kinds]
    fitted = [fit.gaussian.variance for fit in fits]
    assert ((fitted[1] / fitted[0]).log().abs() < 0.4).all()
    assert not torch.equal(*fitted)


def test_the_monte_carlo_fisher_of_a_seed_is_one_number() -> None:
    target, theta = network("by_hand")
    backend = KroneckerLaplace(curvature="monte_carlo", start=None, **QUIET)
    with pytest.warns(ApproximationWarning, match="not at a mode"):
        first, again, other = (backend.fit_to(target, init=theta, seed=seed).gaussian.variance for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_damping_widens_nothing_and_has_no_evidence() -> None:
    plain, damped = (_posterior("by_hand", damping=damping) for damping in (False, True))
    assert (damped.gaussian.variance < plain.gaussian.variance).all()
    assert plain.log_evidence_or_none is not None
    assert damped.log_evidence_or_none is None


def test_memory_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    target = compile_target(linear, _random(5, 3), _random(5, 2))
    message = r"KroneckerLaplace of P = 8 parameters needs about 0\.0 GB, .* use Subset\(KroneckerLaplace"
    monkeypatch.setattr("inference.laplace.memory.available_bytes", lambda device: 200)
    with pytest.raises(ValueError, match=message):
        KroneckerLaplace().fit_to(target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"curvature": "hessian"}, '`curvature` must be one of "ggn", "fisher", "monte_carlo", got \'hessian\''),
        ({"sharing": "mean"}, '`sharing` must be "expand" or "reduce", got \'mean\''),
        ({"damping": 0.1}, "`damping` must be True or False, got 0.1"),
        ({"newton_steps": -1}, "`newton_steps` must be an integer >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KroneckerLaplace(**fields)
