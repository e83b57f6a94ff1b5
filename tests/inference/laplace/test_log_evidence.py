"""The log evidence as a function of prior precisions and noise: its dense twin, its gradient, and what is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import (
    MAP,
    DenseLaplace,
    DiagonalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LaplaceEvidence,
    LowRankLaplace,
    Subset,
    compile_target,
    laplace_evidence,
)
from inference.curvature import ggn
from inference.laplace.redeclared import RedeclaredModel
from inference.laplace.tuned import redeclared
from inference.target import Target
from tests.cases import normal
from tests.networks import network

QUIET: dict[str, Any] = {"compile": False, "progress": False}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(3, 4)), pyro.sample("b1", normal(4, scale=2.0))
    w2 = pyro.sample("w2", dist.Normal(0.3, torch.full((4, 3), 0.5)).to_event(2))
    b2 = pyro.sample("b2", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 + b1) @ w2 + b2), obs=y)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    """A network with known noise that differs from datum to datum, and a gain outside the layers."""
    w1, b1 = pyro.sample("w1", normal(3, 4)), pyro.sample("b1", normal(4, scale=2.0))
    w2, gain = pyro.sample("w2", normal(4, 2, scale=0.5)), pyro.sample("gain", normal(2, scale=3.0))
    noise = (0.3 + 0.2 * x[:, :1].square()).expand(len(x), 2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(gain * (torch.tanh(x @ w1 + b1) @ w2), noise).to_event(1), obs=y)


def _data(model: Any) -> tuple[Tensor, Tensor]:
    x = _random(12, 3)
    return (x, torch.arange(12) % 3) if model is classes else (x, _random(12, 2, seed=5))


FITS: dict[str, Callable[[], Any]] = {
    "dense": lambda: DenseLaplace(start=None, **QUIET),
    "diagonal": lambda: DiagonalLaplace(start=None, **QUIET),
    "kronecker": lambda: KroneckerLaplace(start=None, **QUIET),
    "low_rank": lambda: LowRankLaplace(start=None, rank=1000, **QUIET),
}


@functools.cache
def _target(model: Any) -> Target:
    return compile_target(model, *_data(model))


@functools.cache
def _posterior(structure: str, model: Any) -> GaussianPosterior:
    target = _target(model)
    found = FITS[structure]().fit_to(target, init=0.4 * _random(target.dim, seed=2))
    assert isinstance(found, GaussianPosterior)
    return found


def _moved(evidence: LaplaceEvidence) -> tuple[Tensor, Tensor | None]:
    """Precisions and noise far from the declared ones."""
    a = evidence.groups.start + 1.5 * _random(evidence.groups.num_groups, seed=7)
    return a, None if evidence.noise is None else torch.tensor(evidence.noise.log_scale - 0.4)


@pytest.mark.parametrize("model", [classes, regression], ids=lambda m: m.__name__)
@pytest.mark.parametrize("structure", FITS)
def test_with_the_declared_prior_it_is_the_evidence_of_the_fit(structure: str, model: Any) -> None:
    posterior = _posterior(structure, model)
    for groups in ("all", "site"):
        found = laplace_evidence(posterior, groups=groups)
        assert float(found()) == pytest.approx(posterior.log_evidence, abs=1e-8)
        torch.testing.assert_close(
            found.gaussian(found.groups.start).covariance(), posterior.gaussian.covariance(), **TIGHT
        )


@pytest.mark.parametrize("model", [classes, regression], ids=lambda m: m.__name__)
@pytest.mark.parametrize("groups", ["all", "site", "weight"])
def test_it_equals_a_fit_of_the_model_declared_with_those_priors(groups: Any, model: Any) -> None:
    twin: Target | None = None
    for structure in FITS:
        if (structure, groups) == ("kronecker", "weight"):
            continue  # refused, below
        evidence = laplace_evidence(_posterior(structure, model), groups=groups)
        a, log_noise = _moved(evidence)
        twin = twin or compile_target(redeclared(evidence, a, log_noise), *_data(model))
        _same_as_a_fit(evidence, a, log_noise, structure, twin)


@pytest.mark.parametrize("model", [classes, regression], ids=lambda m: m.__name__)
@pytest.mark.parametrize("structure", FITS)
def test_with_the_g_prior_it_equals_such_a_fit_too(structure: str, model: Any) -> None:
    evidence = laplace_evidence(_posterior(structure, model), scaling="g_prior")
    a, log_noise = _moved(evidence)
    twin = compile_target(redeclared(evidence, a, log_noise), *_data(model))
    _same_as_a_fit(evidence, a, log_noise, structure, twin)


def _same_as_a_fit(
    evidence: LaplaceEvidence, a: Tensor, log_noise: Tensor | None, structure: str, target: Target
) -> None:
    twin = FITS[structure]().fit_to(target, init=evidence.theta)
    assert float(evidence(a, log_noise)) == pytest.approx(twin.log_evidence, abs=1e-7)
    covariance = evidence.gaussian(a, log_noise).covariance()
    torch.testing.assert_close(covariance, twin.gaussian.covariance(), rtol=1e-7, atol=1e-9)


def _by_brute_force(evidence: LaplaceEvidence, matrix: Tensor, a: Tensor, log_noise: Tensor | None) -> Tensor:
    """The formula with one dense matrix."""
    target, theta, groups = evidence.target, evidence.theta, evidence.groups
    tau = torch.ones(())
    value = target.log_likelihood(theta).sum()
    if log_noise is not None and evidence.noise is not None:
        tau = (2 * (evidence.noise.log_scale - log_noise)).exp()
        value = value + 0.5 * evidence.noise.squares * (1 - tau) + 0.5 * evidence.noise.count * tau.log()
    precision = torch.stack([a[g] for g in groups.index.tolist()]).exp() * groups.base
    prior = dist.Normal(groups.prior.mean, precision.rsqrt()).log_prob(theta).sum()
    volume = 0.5 * len(theta) * math.log(2 * math.pi) - 0.5 * torch.logdet(tau * matrix + precision.diag())
    return value + prior + volume


@pytest.mark.parametrize("model", [classes, regression], ids=lambda m: m.__name__)
@pytest.mark.parametrize("structure", FITS)
def test_its_gradient_is_that_of_the_dense_twin_and_passes_gradcheck(structure: str, model: Any) -> None:
    posterior = _posterior(structure, model)
    evidence = laplace_evidence(posterior, groups="site")
    matrix = ggn(posterior.target, posterior.mean_theta)
    if structure == "diagonal":
        matrix = matrix.diagonal().diag()
    if structure == "kronecker":  # what its covariance says, at the declared prior
        precision = evidence.groups.precision(evidence.groups.start)
        matrix = torch.linalg.inv(posterior.gaussian.covariance()) - precision.diag()
    inputs = [v.detach().requires_grad_() for v in _moved(evidence) if v is not None]
    inputs = inputs if len(inputs) == 2 else [*inputs, None]  # type: ignore[list-item]
    given = [v for v in inputs if v is not None]
    found = torch.autograd.grad(evidence(*inputs), given)
    expected = torch.autograd.grad(_by_brute_force(evidence, matrix, *inputs), given)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(lambda *v: evidence(*v), given)


@pytest.mark.parametrize("structure", FITS)
def test_effective_parameters_are_the_trace_of_covariance_times_curvature(structure: str) -> None:
    evidence = laplace_evidence(_posterior(structure, regression), sites=["w1", "w2", "gain"])
    a, log_noise = _moved(evidence)
    by_group, total = evidence.effective_parameters(a, log_noise)
    precision = evidence.groups.precision(a)
    shrinkage = 1 - precision * evidence.gaussian(a, log_noise).variance  # of each weight: sums to the trace
    torch.testing.assert_close(by_group, evidence.groups.total(shrinkage), rtol=1e-8, atol=1e-8)
    assert total == pytest.approx(float(shrinkage.sum()), rel=1e-8)
    assert (by_group > 0).all()
    assert total < evidence.target.dim


def test_a_learnt_noise_scale_keeps_its_prior_and_its_place_in_theta() -> None:
    target, theta = network("learnt_noise")
    for backend in (DenseLaplace, KroneckerLaplace):
        posterior = backend(start=None, **QUIET).fit_to(target, init=theta)
        evidence = laplace_evidence(posterior, sites="[wb]*")
        assert evidence.groups.names == ("w1", "b1", "w2")
        assert float(evidence()) == pytest.approx(posterior.log_evidence, abs=1e-8)
        model = redeclared(evidence, evidence.groups.start + 1.0, None)
        twin = backend(start=None, **QUIET).fit(model, target.x, target.y, init=theta)
        assert float(evidence(evidence.groups.start + 1.0)) == pytest.approx(twin.log_evidence, abs=1e-7)


@pytest.mark.parametrize("name", ["resnet", "grouped", "encoder", "cross_attention", "shared_weight"])
def test_any_network_has_the_evidence_of_such_a_fit(name: str) -> None:
    target, theta = network(name)
    evidence = laplace_evidence(KroneckerLaplace(start=None, **QUIET).fit_to(target, init=theta))  # type: ignore[arg-type]
    a, _ = _moved(evidence)
    twin = compile_target(redeclared(evidence, a, None), target.x, target.y)
    _same_as_a_fit(evidence, a, None, "kronecker", twin)


def test_a_part_of_the_network_has_the_evidence_given_the_rest() -> None:
    posterior = Subset(DenseLaplace(start=None, **QUIET), sites="*2", rest=None).fit_to(
        _target(classes), init=_posterior("dense", classes)
    )
    evidence = laplace_evidence(posterior)
    assert evidence.groups.names == ("w2", "b2")
    assert float(evidence()) == pytest.approx(posterior.log_evidence, abs=1e-8)


def test_float32_models_are_measured_in_float64() -> None:
    x, y = _data(regression)
    single = compile_target(regression, x.float(), y.float())
    theta = 0.4 * _random(single.dim, seed=2).float()
    posterior = KroneckerLaplace(start=None, **QUIET).fit_to(single, init=theta)
    evidence = laplace_evidence(posterior)
    reference = laplace_evidence(_posterior("kronecker", regression))
    assert evidence().dtype == torch.float64
    assert float(evidence()) == pytest.approx(float(reference()), abs=1e-3)
    assert evidence.gaussian(evidence.groups.start).loc.dtype == torch.float32


def test_the_other_model_can_be_declared_again_without_a_second_wrapper() -> None:
    posterior = _posterior("dense", regression)
    evidence = laplace_evidence(posterior)
    once = redeclared(evidence, evidence.groups.start + 1.0, torch.tensor(0.0))
    target = compile_target(once, *_data(regression))
    again = laplace_evidence(DenseLaplace(start=None, **QUIET).fit_to(target, init=posterior))  # type: ignore[arg-type]
    torch.testing.assert_close(again.groups.start, evidence.groups.start + 1.0, **TIGHT)
    assert again.noise is not None
    assert again.noise.log_scale == pytest.approx(0.0, abs=1e-12)
    twice = redeclared(again, again.groups.start - 1.0, torch.tensor(0.5))
    assert not isinstance(twice.model, RedeclaredModel)
    assert math.log(twice.noise_factor) == pytest.approx(0.5 - laplace_noise(posterior), abs=1e-12)


def laplace_noise(posterior: GaussianPosterior) -> float:
    noise = laplace_evidence(posterior).noise
    assert noise is not None
    return noise.log_scale


def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))
    b = pyro.sample("b", normal(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def correlated(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), 0.5 * torch.eye(3) + 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def heavy_tailed(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.StudentT(3.0, torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize(("model", "site"), [(hierarchical, "tau"), (correlated, "w"), (heavy_tailed, "w")])
def test_a_prior_that_is_no_independent_gaussian_is_refused_by_name(model: Any, site: str) -> None:
    target = compile_target(model, _random(12, 3), _random(12))
    posterior = DenseLaplace(start=None, **QUIET).fit_to(target, init=torch.full((target.dim,), 0.1))
    with pytest.raises(ValueError, match=f"the prior of site '{site}' is not a Gaussian of known mean"):
        laplace_evidence(posterior)


def test_a_site_tied_to_others_cannot_keep_its_prior() -> None:
    target = compile_target(hierarchical, _random(12, 3), _random(12))
    posterior = DenseLaplace(start=None, **QUIET).fit_to(target, init=torch.full((target.dim,), 0.1))
    with pytest.raises(ValueError, match="'tau' is tied to other entries .* fix that site with Subset"):
        laplace_evidence(posterior, sites="b")


def test_bad_arguments_are_refused() -> None:
    posterior = _posterior("kronecker", classes)
    with pytest.raises(ValueError, match="`groups` must be one of 'all', 'site', 'weight', got 'layer'"):
        laplace_evidence(posterior, groups="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`scaling` must be one of 'declared', 'g_prior', got 'g'"):
        laplace_evidence(posterior, scaling="g")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no site matches 'w9'; the posterior has \['w1'"):
        laplace_evidence(posterior, sites="w9")
    with pytest.raises(ValueError, match="`sites` is empty"):
        laplace_evidence(posterior, sites=[])
    with pytest.raises(ValueError, match="one for the bias of a layer, but those of 'w1' are in 16 groups"):
        laplace_evidence(posterior, groups="weight")
    evidence = laplace_evidence(posterior)
    with pytest.raises(ValueError, match=r"one entry for each of the 4 groups, got shape \(2,\)"):
        evidence(torch.zeros(2))
    with pytest.raises(ValueError, match="only the noise of a Normal likelihood of known scale .* is Categorical"):
        evidence(None, torch.tensor(0.0))


def test_posteriors_without_such_an_evidence_are_refused() -> None:
    target, init = _target(classes), torch.zeros(31)
    with pytest.raises(ValueError, match="posterior fitted by DenseLaplace, DiagonalLaplace"):
        laplace_evidence(MAP(num_steps=1, polish=False, **QUIET).fit_to(target))  # type: ignore[arg-type]
    tempered = DiagonalLaplace(start=None, temperature=0.5, **QUIET).fit_to(target, init=init)
    with pytest.raises(ValueError, match="a tempered posterior has no evidence"):
        laplace_evidence(tempered)  # type: ignore[arg-type]
    damped = KroneckerLaplace(start=None, damping=True, **QUIET).fit_to(target, init=init)
    with pytest.raises(ValueError, match=r"KroneckerLaplace \(without damping\)"):
        laplace_evidence(damped)  # type: ignore[arg-type]
