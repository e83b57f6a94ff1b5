"""Subnetworks of the weights with the largest marginal variance."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inference
from inference import (
    MAP,
    NUTS,
    SWAG,
    DenseLaplace,
    DiagonalLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    LargestVariance,
    MeanFieldVI,
    Subset,
    Target,
    compile_target,
)
from inference.curvature import ggn
from inference.hessians import prior_precision_diagonal
from inference.restriction import restrict_to_entries
from tests.cases import normal

QUIET: dict[str, Any] = {"compile": False, "progress": False}
DIAGONAL = DiagonalLaplace(**QUIET)
# A point at which nothing is a mode: subnetworks are compared at one theta, with the same prior.
pytestmark = pytest.mark.filterwarnings("ignore:not at a mode:inference.errors.ApproximationWarning")


def network(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("first.weight", normal(2, 6)), pyro.sample("first.bias", normal(6, scale=2.0))
    w2, b2 = pyro.sample("last.weight", normal(6, 3, scale=0.5)), pyro.sample("last.bias", normal(3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.tanh(x @ w1 + b1) @ w2 + b2), obs=y)


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


@functools.cache
def target() -> Target:
    return compile_target(network, X, Y)


@functools.cache
def mode() -> Tensor:
    return DenseLaplace(**QUIET).fit_to(target()).mean_theta


def subset(num: int, **fields: Any) -> GaussianPosterior:
    sites = LargestVariance(num, **{"by": DIAGONAL, **fields})
    backend = Subset(DenseLaplace(start=None, **QUIET), sites=sites, rest=None)
    found = backend.fit_to(target(), init=mode())
    assert isinstance(found, GaussianPosterior)
    return found


@functools.cache
def full() -> GaussianPosterior:
    found = DenseLaplace(start=None, **QUIET).fit_to(target(), init=mode())
    assert isinstance(found, GaussianPosterior)
    return found


def test_the_entries_of_largest_diagonal_variance_are_kept() -> None:
    posterior, whole = subset(10), full()
    variances = DiagonalLaplace(start=None, **QUIET).fit_to(target(), init=mode()).gaussian.variance
    expected = variances.argsort(descending=True)[:10].sort().values
    assert torch.equal(posterior.target.entries, expected)
    precision = ggn(whole.target, mode()) + prior_precision_diagonal(whole.target, mode()).diag()
    block = precision[expected[:, None], expected]
    torch.testing.assert_close(posterior.gaussian.covariance(), torch.linalg.inv(block), rtol=1e-8, atol=1e-10)
    assert posterior.sample_sites(2)["first.weight"].shape == (2, 2, 6)
    kept = posterior.target.expand(posterior.sample(3))
    fixed = torch.ones(len(mode()), dtype=torch.bool).index_fill(0, expected, False)
    assert torch.equal(kept[:, fixed], mode()[fixed].expand(3, -1))


@pytest.mark.parametrize("num", [1, 5, 20, 38])
def test_no_input_has_a_larger_variance_of_the_function_than_under_the_whole_network(num: int) -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    whole, part = full().predict(x).f_variance, subset(num).predict(x).f_variance
    assert (part <= whole + 1e-10).all()
    assert part.sum() < whole.sum()


def test_all_entries_are_the_whole_network() -> None:
    posterior, whole = subset(39), full()
    torch.testing.assert_close(posterior.gaussian.covariance(), whole.gaussian.covariance(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(posterior.predict(X).f_variance, whole.predict(X).f_variance, rtol=1e-8, atol=1e-10)
    assert posterior.log_evidence == pytest.approx(whole.log_evidence, abs=1e-8)


def test_the_last_layer_has_the_conditional_and_not_the_marginal_covariance() -> None:
    backend = Subset(DenseLaplace(start=None, **QUIET), sites="last.*", rest=None)
    posterior, whole = backend.fit_to(target(), init=mode()), full()
    last = torch.arange(18, 39)
    covariance = whole.gaussian.covariance()
    precision = torch.linalg.inv(covariance)
    conditional = torch.linalg.inv(precision[last[:, None], last])
    torch.testing.assert_close(posterior.gaussian.covariance(), conditional, rtol=1e-7, atol=1e-9)
    assert (conditional.diagonal() < covariance.diagonal()[last]).all()


def test_candidates_can_be_limited_by_name() -> None:
    posterior = subset(4, among=["last.*", "first.bias"])
    assert {s.name for s in posterior.target.sites} <= {"last.weight", "last.bias", "first.bias"}
    assert posterior.target.dim == 4


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "by",
    [SWAG(variant="diagonal", num_steps=200, **QUIET), KroneckerLaplace(**QUIET), MeanFieldVI(num_steps=200, **QUIET)],
    ids=lambda b: type(b).__name__,
)
def test_any_gaussian_posterior_can_choose(by: Any) -> None:
    posterior = subset(6, by=by)
    assert posterior.target.dim == 6
    assert torch.isfinite(posterior.predict(X).probs).all()


@pytest.mark.parametrize("inner", [KroneckerLaplace(start=None, **QUIET), DiagonalLaplace(start=None, **QUIET)])
def test_other_structures_run_on_the_entries_too(inner: Any) -> None:
    backend = Subset(inner, sites=LargestVariance(12, by=DIAGONAL), rest=None)
    posterior = backend.fit_to(target(), init=mode())
    exact = subset(12)
    torch.testing.assert_close(posterior.mean_theta, exact.mean_theta)
    precision = torch.linalg.inv(exact.gaussian.covariance())
    torch.testing.assert_close(
        torch.linalg.inv(posterior.gaussian.covariance()).diagonal(), precision.diagonal(), rtol=1e-7, atol=1e-9
    )


@pytest.mark.filterwarnings("ignore::inference.errors.ConvergenceWarning")
def test_chains_move_the_entries_alone() -> None:
    nuts = NUTS(num_samples=5, warmup_steps=5, num_chains=2, **QUIET)
    backend = Subset(nuts, sites=LargestVariance(5, by=DIAGONAL), rest=MAP(num_steps=200, **QUIET))
    posterior = backend.fit_to(target())
    assert posterior.draws.shape == (2, 5, 5)
    moved = posterior.target.expand(posterior.flat_draws).var(0) > 0
    assert torch.equal(moved.nonzero()[:, 0], posterior.target.entries)


def test_a_mass_matrix_of_other_entries_is_refused() -> None:
    held = subset(5)
    nuts = NUTS(num_samples=5, warmup_steps=5, num_chains=2, mass_matrix=held, **QUIET)
    with pytest.raises(ValueError, match="but the chains move"):
        nuts.fit_to(restrict_to_entries(full().target, 38 - held.target.entries, mode()))


def test_a_subnetwork_is_saved_and_loaded(tmp_path: Any) -> None:
    posterior = subset(7)
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, network)
    assert torch.equal(loaded.sample(3), posterior.sample(3))
    assert torch.equal(loaded.predict(X).f_variance, posterior.predict(X).f_variance)
    assert repr(loaded.backend) == repr(posterior.backend)


def test_the_repr_makes_it_again() -> None:
    backend = Subset(DenseLaplace(), sites=LargestVariance(3, by=SWAG(), among="last.*"))
    assert eval(repr(backend), vars(inference)) == backend


# -- refusals ----------------------------------------------------------------------


class Never(MAP):
    def fit_target(self, target: Any, run: Any) -> Any:
        raise AssertionError("the rest was fitted")


def test_what_cannot_be_chosen_is_refused_before_any_work() -> None:
    def fit(sites: LargestVariance, model: Any = network) -> Any:
        return Subset(DenseLaplace(), sites=sites, rest=Never()).fit(model, X, Y)

    with pytest.raises(ValueError, match="`num` must be at most the number of candidates, 39, got 40"):
        fit(LargestVariance(40, by=DIAGONAL))
    with pytest.raises(ValueError, match=r"no site matches 'head\.\*'; the model has"):
        fit(LargestVariance(2, by=DIAGONAL, among="head.*"))

    def simplex(x: Tensor, y: Tensor | None = None) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(p.expand(len(x), 3)), obs=y)

    with pytest.raises(ValueError, match="entries of site 'p' mean nothing alone, so it cannot be split; .* `among`"):
        fit(LargestVariance(1, by=DIAGONAL), simplex)


def test_a_backend_without_a_gaussian_cannot_choose() -> None:
    with pytest.raises(TypeError, match="`by` must give a Gaussian, .* MAP gives draws"):
        subset(3, by=MAP(num_steps=2, polish=False, **QUIET))


@pytest.mark.parametrize("num", [0, -1, 2.5, True])
def test_a_number_of_entries_is_a_whole_number_from_one(num: Any) -> None:
    with pytest.raises(ValueError, match="`num` must be an integer >= 1, got"):
        LargestVariance(num, by=DIAGONAL)


def test_the_backend_that_chooses_is_a_backend() -> None:
    with pytest.raises(TypeError, match=r"`by` must be a backend such as DiagonalLaplace\(\), got 'diagonal'"):
        LargestVariance(3, by="diagonal")  # type: ignore[arg-type]
