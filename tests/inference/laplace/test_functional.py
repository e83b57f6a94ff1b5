"""FunctionalLaplace: the dense posterior of the active data, reached through their function values."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

import inference
from inference import DenseLaplace, FunctionalLaplace, GaussianPosterior, compile_target
from inference.curvature import ggn
from inference.errors import ApproximationWarning, CapabilityError
from inference.hessians import prior_precision_diagonal
from inference.target import Target
from tests.cases import normal
from tests.conjugate import linear_regression
from tests.networks import HAND_WRITTEN, network
from tests.tolerances import z_limit

QUIET: dict[str, Any] = {"compile": False, "progress": False}
NOT_A_MODE = pytest.mark.filterwarnings("ignore:not at a mode")
LINEAR = linear_regression()


def _fit(name: str, *, seed: int = 0, **fields: Any) -> GaussianPosterior:
    target, theta = network(name)
    found = FunctionalLaplace(start=None, **QUIET, **fields).fit_to(target, init=theta, seed=seed)
    assert isinstance(found, GaussianPosterior)
    return found


def _precision(target: Target, theta: Tensor, x: Any) -> Tensor:
    return ggn(target, theta, x=x) + prior_precision_diagonal(target, theta).diag()


@NOT_A_MODE
@pytest.mark.parametrize("name", ["by_hand", "learnt_noise", "lenet", "encoder", "resnet"])
def test_with_all_data_active_it_is_dense_laplace(name: str) -> None:
    posterior, (target, theta) = _fit(name), network(name)
    dense = DenseLaplace(start=None, **QUIET).fit_to(target, init=theta)
    assert isinstance(dense, GaussianPosterior)
    torch.testing.assert_close(posterior.gaussian.covariance(), dense.gaussian.covariance(), rtol=1e-8, atol=1e-9)
    ours, theirs = posterior.predict(target.x), dense.predict(target.x)
    torch.testing.assert_close(ours.f_variance, theirs.f_variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-9)


def test_a_regression_with_all_data_active_predicts_as_dense_laplace() -> None:
    generator = torch.Generator().manual_seed(0)
    x, new = torch.randn(25, 2, generator=generator), torch.randn(9, 2, generator=generator)
    y = torch.sin(x.sum(-1)) + 0.3 * torch.randn(25, generator=generator)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w1, w2 = pyro.sample("w1", normal(2, 5)), pyro.sample("w2", normal(5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w1) @ w2, 0.3), obs=y)

    dense = DenseLaplace(**QUIET).fit(model, x, y)
    functional = FunctionalLaplace(start=None, **QUIET).fit(model, x, y, init=dense.mean_theta)
    ours, theirs = functional.predict(new), dense.predict(new)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-6, atol=1e-9)
    assert functional.log_evidence == pytest.approx(dense.log_evidence, abs=1e-6)


@NOT_A_MODE
@pytest.mark.parametrize("name", ["by_hand", "learnt_noise"])
def test_with_some_data_active_it_is_the_precision_of_those_data(name: str) -> None:
    target, theta = network(name)
    posterior = _fit(name, num_points=3, seed=4)
    chosen = torch.randperm(target.num_data, generator=torch.Generator().manual_seed(4))[:3]
    expected = torch.linalg.inv(_precision(target, theta, target.x[chosen]))
    torch.testing.assert_close(posterior.gaussian.covariance(), expected, rtol=1e-8, atol=1e-9)
    assert posterior.info.extra["active_points"] == 3


@NOT_A_MODE
def test_it_is_the_gaussian_process_with_the_kernel_of_the_linearised_network() -> None:
    target, theta = network("by_hand")
    posterior = _fit("by_hand")
    prior = prior_precision_diagonal(target, theta)
    new = target.x + 0.3
    old, fresh = (jacrev(lambda t, at=at: target.eta(t, at))(theta).flatten(0, 1) for at in (target.x, new))
    fisher = torch.block_diag(*target.family().fisher(target.parameters(theta)))
    cross, kernel = (fresh / prior) @ old.mT, (old / prior) @ old.mT
    # K_** - K_*M (I + Lambda K_MM)^-1 Lambda K_M*: no inverse of the softmax's singular Lambda
    inner = torch.linalg.solve(torch.eye(len(old)) + fisher @ kernel, fisher @ cross.mT)
    expected = (fresh / prior) @ fresh.mT - cross @ inner
    found = posterior.function_covariance(new).reshape(len(fresh), len(fresh))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@NOT_A_MODE
@pytest.mark.parametrize("name", ["by_hand", "lenet"])
def test_variances_fall_as_more_data_are_active(name: str) -> None:
    posteriors = [_fit(name, num_points=num) for num in (1, 2, 4, 6)]
    x = posteriors[0].target.x
    for fewer, more in zip(posteriors, posteriors[1:], strict=False):
        assert (more.gaussian.variance <= fewer.gaussian.variance + 1e-12).all()
        assert (more.predict(x).f_variance <= fewer.predict(x).f_variance + 1e-10).all()
        assert more.gaussian.variance.sum() < fewer.gaussian.variance.sum()


@NOT_A_MODE
def test_draws_have_the_stated_covariance_and_density() -> None:
    posterior = _fit("by_hand", num_points=2)
    draws, covariance = posterior.sample(20_000, seed=2), posterior.gaussian.covariance()
    variance = covariance.diagonal()
    spread = torch.outer(variance, variance) + covariance.square()
    z = (draws.T.cov(correction=0) - covariance) / (spread / len(draws)).sqrt()
    assert z.abs().max() < z_limit(covariance.numel())
    twin = torch.distributions.MultivariateNormal(posterior.mean_theta, covariance)
    torch.testing.assert_close(posterior.log_density(draws[:9]), twin.log_prob(draws[:9]), rtol=1e-8, atol=1e-8)


@NOT_A_MODE
def test_the_evidence_of_linear_regression_is_exact_also_away_from_the_mode() -> None:
    point = LINEAR.mode + torch.tensor([0.2, -0.1, 0.3])
    posterior = FunctionalLaplace(start=None, **QUIET).fit(LINEAR.model, LINEAR.x, LINEAR.y, init=point)
    assert posterior.log_evidence == pytest.approx(LINEAR.log_evidence, rel=1e-10)
    torch.testing.assert_close(posterior.gaussian.covariance(), LINEAR.covariance, rtol=1e-8, atol=1e-8)


def test_the_evidence_of_some_data_is_not_given_as_that_of_all() -> None:
    posterior = FunctionalLaplace(num_points=5, **QUIET).fit(LINEAR.model, LINEAR.x, LINEAR.y)
    torch.testing.assert_close(posterior.mean_theta, LINEAR.mode, rtol=1e-6, atol=1e-6)  # of all data
    with pytest.raises(CapabilityError, match="FunctionalLaplace gives no log evidence"):
        _ = posterior.log_evidence


def test_confident_data_add_nothing_and_divide_by_nothing() -> None:
    def certain(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(1, 3, scale=2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    x, y = torch.full((4, 1), 500.0), torch.zeros(4, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        posterior = FunctionalLaplace(start=None, **QUIET).fit(certain, x, y, init=torch.tensor([2.0, -2.0, -2.0]))
    assert torch.equal(posterior.gaussian.variance, torch.full((3,), 4.0))  # the prior's
    assert torch.isfinite(posterior.predict(x).probs).all()


@NOT_A_MODE
def test_the_same_seed_gives_the_same_data_and_a_file_keeps_them(tmp_path: Any) -> None:
    first, again, other = (_fit("by_hand", num_points=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.sample(3), again.sample(3))
    assert not torch.isclose(first.gaussian.variance, other.gaussian.variance).all()
    first.save(tmp_path)
    assert torch.equal(inference.load(tmp_path, HAND_WRITTEN["by_hand"]).sample(3), first.sample(3))


@NOT_A_MODE
def test_chunks_of_data_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _fit("lenet")
    monkeypatch.setattr("inference.laplace.functional.CHUNK_BYTES", 1)
    torch.testing.assert_close(_fit("lenet").gaussian.covariance(), whole.gaussian.covariance(), rtol=1e-9, atol=1e-10)


# -- one process per output ----------------------------------------------------------------------


@NOT_A_MODE
@pytest.mark.parametrize("num", [3, 100])
def test_independent_outputs_are_one_gaussian_process_each(num: int) -> None:
    target, theta = network("by_hand")
    posterior = _fit("by_hand", num_points=num, independent_outputs=True)
    prior = prior_precision_diagonal(target, theta)
    chosen = torch.arange(target.num_data)
    if num < target.num_data:
        chosen = torch.randperm(target.num_data, generator=torch.Generator().manual_seed(0))[:num]
    new = target.x + 0.3
    old, fresh = (jacrev(lambda t, at=at: target.eta(t, at))(theta) for at in (target.x[chosen], new))
    curvature = target.family().fisher(target.parameters(theta))[chosen].diagonal(dim1=-2, dim2=-1)
    found = posterior.function_covariance(new)
    expected = torch.zeros_like(found)
    for c in range(3):
        cross, kernel = (fresh[:, c] / prior) @ old[:, c].mT, (old[:, c] / prior) @ old[:, c].mT
        inner = torch.linalg.solve(kernel + (1 / curvature[:, c]).diag(), cross.mT)
        expected[:, c, :, c] = (fresh[:, c] / prior) @ fresh[:, c].mT - cross @ inner
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    variance = expected.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
    torch.testing.assert_close(posterior.predict(new).f_variance, variance, rtol=1e-7, atol=1e-9)
    probs = posterior.predict(new, link="probit").probs
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(new)))


@NOT_A_MODE
def test_outputs_that_are_independent_anyway_are_the_same_either_way() -> None:
    def two(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(4, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    both = [
        FunctionalLaplace(start=None, independent_outputs=flag, **QUIET).fit(two, x, x[:, :2], init=torch.zeros(8))
        for flag in (False, True)
    ]
    torch.testing.assert_close(both[0].function_covariance(x), both[1].function_covariance(x), rtol=1e-8, atol=1e-9)


@NOT_A_MODE
def test_independent_outputs_are_saved_and_have_gradients_but_no_theta(tmp_path: Any) -> None:
    posterior = _fit("by_hand", independent_outputs=True)
    x = posterior.target.x
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, HAND_WRITTEN["by_hand"])
    assert torch.equal(loaded.predict(x).probs, posterior.predict(x).probs)
    value = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: posterior.predict(v).f_variance, value)
    assert not posterior.has_log_density
    for ask in (lambda: posterior.sample(2), lambda: posterior.log_density(posterior.mean_theta)):
        with pytest.raises(CapabilityError, match="no Gaussian over theta has them"):
            ask()
    with pytest.raises(CapabilityError, match="FunctionalLaplace gives no log evidence"):
        _ = posterior.log_evidence
    with pytest.raises(ValueError, match=r'predictive="sampled" needs draws of theta'):
        FunctionalLaplace(independent_outputs=True, predictive="sampled")
    with pytest.raises(ValueError, match="`independent_outputs` must be True or False, got 1"):
        FunctionalLaplace(independent_outputs=1)  # type: ignore[arg-type]


# -- refusals ----------------------------------------------------------------------


def test_memory_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.laplace.memory.available_bytes", lambda device: 1000)
    target, _ = network("by_hand")
    with pytest.raises(
        ValueError, match=r"FunctionalLaplace with 5 active data of 3 outputs and P = 43 needs .* lower `num_points`"
    ):
        FunctionalLaplace(num_points=5).fit_to(target)


def test_a_flat_prior_is_refused_by_the_site() -> None:
    def flat(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        spare = pyro.sample("spare", dist.Laplace(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + spare, 1.0), obs=y)

    x = torch.ones(5, 3)
    with pytest.raises(ValueError, match="'spare'"):
        FunctionalLaplace(start=None, **QUIET).fit(flat, x, x.sum(-1), init=torch.full((4,), 0.3))


def test_a_prior_that_couples_weights_is_said_to_lose_it() -> None:
    def coupled(x: Tensor, y: Tensor | None = None) -> None:
        scale = torch.eye(3) + 0.5
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), scale.to(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ApproximationWarning, match="the prior couples entries of theta"):
        FunctionalLaplace(**QUIET).fit(coupled, x, x.sum(-1))


def test_an_exact_hessian_or_fisher_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`curvature` must be one of \"ggn\", got 'hessian'"):
        FunctionalLaplace(curvature="hessian")


@pytest.mark.parametrize("num", [0, -1, 2.5, True])
def test_a_number_of_data_is_a_whole_number_from_one(num: Any) -> None:
    with pytest.raises(ValueError, match="`num_points` must be an integer >= 1, got"):
        FunctionalLaplace(num_points=num)


def test_a_compiled_target_of_float32_keeps_its_dtype() -> None:
    target = compile_target(LINEAR.model, LINEAR.x.float(), LINEAR.y.float())
    posterior = FunctionalLaplace(**QUIET).fit_to(target)
    assert posterior.sample(2).dtype == torch.float32
    torch.testing.assert_close(posterior.gaussian.covariance().double(), LINEAR.covariance, rtol=1e-3, atol=1e-5)
