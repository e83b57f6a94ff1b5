"""Predictive mixtures against the obvious way: a loop over draws with the model's own Pyro distributions, and SciPy."""

from __future__ import annotations

import functools
import math
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from inference import chunking, prediction
from inference.data import num_data
from inference.errors import CapabilityError
from inference.posterior import DrawsPosterior
from inference.prediction import DrawSource, Prediction
from inference.target import Target, compile_target
from tests.cases import CASES, Case

S = 7
REGRESSION = ["by_hand", "student_t", "heteroscedastic", "two_outputs", "two_plates", "dict_inputs", "tuple_inputs"]


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def target_of(name: str) -> Target:
    """Recorded once for all tests: it holds no state."""
    case = case_named(name)
    return compile_target(case.model(), case.x, case.y)


def made(name: str, weighted: bool = False, **options: Any) -> tuple[Prediction, list[Any], Tensor, Tensor]:
    """A prediction of S draws, the distribution of every draw (from Pyro), the weights and targets."""
    case = case_named(name)
    target = target_of(name)
    thetas = 0.7 * torch.randn(S, target.dim, generator=torch.Generator().manual_seed(3))
    weights = torch.arange(1.0, S + 1) if weighted else torch.ones(S)
    weights = weights / weights.sum()
    predicted = Prediction(DrawSource(target, thetas, weights, case.x, **options), num_data(case.x))
    return predicted, [observed(case, target.unravel(t)) for t in thetas], weights, case.y


def observed(case: Case, sites: dict[str, Tensor]) -> Any:
    conditioned = pyro.poutine.condition(case.model(), data=sites)
    return pyro.poutine.trace(conditioned).get_trace(case.x, case.y).nodes["y"]["fn"]


def per_datum(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).sum(-1)


def student(df: float, locs: list[float], scales: list[float]) -> Prediction:
    """A Student-t mixture with given components at one input."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(df, loc.expand(len(x)), scale), obs=y)

    target = compile_target(model, torch.zeros(2, 1), torch.zeros(2))
    thetas = torch.tensor([locs, [math.log(s) for s in scales]]).T
    weights = torch.full((len(locs),), 1 / len(locs))
    return Prediction(DrawSource(target, thetas, weights, torch.zeros(1, 1)), 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*REGRESSION, "poisson", "categorical", "bernoulli"])
def test_log_prob_is_that_of_the_mixture(name: str, weighted: bool) -> None:
    predicted, twins, weights, y = made(name, weighted)
    components = torch.stack([per_datum(fn.log_prob(y)) for fn in twins])
    expected = torch.logsumexp(components + weights.log()[:, None], 0)
    torch.testing.assert_close(predicted.log_prob(y), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(predicted.component_log_prob(y), components, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*REGRESSION, "poisson"])
def test_moments_obey_the_law_of_total_variance(name: str, weighted: bool) -> None:
    predicted, twins, weights, y = made(name, weighted)
    means, variances = torch.stack([f.mean for f in twins]), torch.stack([f.variance for f in twins])
    mean = torch.tensordot(weights, means, 1)
    second = torch.tensordot(weights, variances + means.square(), 1)
    assert predicted.mean.shape == y.shape
    torch.testing.assert_close(predicted.mean, mean)
    torch.testing.assert_close(predicted.variance, second - mean.square(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predicted.aleatoric_variance, torch.tensordot(weights, variances, 1))
    torch.testing.assert_close(predicted.stddev.square(), predicted.variance)
    torch.testing.assert_close(predicted.component_means(), means)
    assert (predicted.epistemic_variance > 0).all()


@pytest.mark.parametrize("name", ["by_hand", "heteroscedastic", "two_outputs", "student_t"])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.95])
def test_quantiles_are_those_of_the_mixture(name: str, q: float) -> None:
    predicted, twins, weights, y = made(name, weighted=True)
    found = predicted.quantile(q)
    assert found.shape == y.shape
    torch.testing.assert_close(predicted.cdf(found), torch.full_like(found, q), rtol=0, atol=1e-9)
    base = [f.base_dist if isinstance(f, torch.distributions.Independent) else f for f in twins]
    frozen = [
        scipy.stats.t(
            df=float(f.df.flatten()[0]), loc=f.loc.flatten()[0], scale=f.scale.expand(f.batch_shape).flatten()[0]
        )
        if name == "student_t"
        else scipy.stats.norm(f.loc.flatten()[0], f.scale.expand(f.batch_shape).flatten()[0])
        for f in base
    ]

    def excess(at: float) -> float:
        return sum(float(w) * f.cdf(at) for w, f in zip(weights, frozen, strict=True)) - q

    expected = scipy.optimize.brentq(excess, -200, 200, xtol=1e-12)
    assert float(found.flatten()[0]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("df", [0.5, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("q", [1e-4, 0.3, 0.999])
def test_quantiles_of_heavy_tails_have_no_need_of_a_variance(df: float, q: float) -> None:
    predicted = student(df, [0.0, 3.0], [1.0, 0.5])
    found = predicted.quantile(q)
    total = 0.5 * scipy.stats.t.cdf(float(found), df) + 0.5 * scipy.stats.t.cdf(float(found), df, loc=3.0, scale=0.5)
    assert total == pytest.approx(q, rel=1e-6)


def test_a_student_with_two_degrees_of_freedom_has_infinite_aleatoric_variance() -> None:
    predicted = student(2.0, [0.0, 1.0], [1.0, 1.0])
    assert torch.isinf(predicted.aleatoric_variance).all()
    torch.testing.assert_close(predicted.epistemic_variance, torch.tensor([0.25]))
    torch.testing.assert_close(predicted.f_variance, torch.tensor([0.25]))


@pytest.mark.parametrize("q", [0.001, 0.05, 0.37, 0.5, 0.95, 0.9999])
def test_quantiles_of_counts_are_the_smallest_integer_that_reaches_q(q: float) -> None:
    predicted, twins, weights, _ = made("poisson", weighted=True)
    found = predicted.quantile(q)
    for n in range(len(found)):
        rates = [float(f.rate[n]) for f in twins]

        def below(k: int, rates: list[float] = rates) -> float:
            return sum(float(w) * scipy.stats.poisson.cdf(k, r) for w, r in zip(weights, rates, strict=True))

        k = int(found[n])
        assert k == float(found[n])
        assert below(k) >= q
        assert k == 0 or below(k - 1) < q


def test_an_interval_is_a_pair_of_quantiles_and_covers_its_level() -> None:
    predicted, _, _, _ = made("by_hand")
    low, high = predicted.interval(0.8)
    torch.testing.assert_close(low, predicted.quantile(0.1))
    torch.testing.assert_close(high, predicted.quantile(0.9))
    inside = (predicted.sample(20_000) > low) & (predicted.sample(20_000) < high)
    assert (inside.double().mean(0) - 0.8).abs().max() < 4.5 * math.sqrt(0.16 / 20_000)


@pytest.mark.parametrize("name", ["by_hand", "heteroscedastic", "two_outputs", "poisson", "bernoulli"])
def test_samples_have_the_moments_of_the_mixture(name: str) -> None:
    predicted, _, _, y = made(name, weighted=True)
    draws = predicted.sample(20_000)
    assert draws.shape == (20_000, *y.shape)
    z = (draws.mean(0) - predicted.mean) / (predicted.variance / 20_000).sqrt()
    assert z.abs().max() < 4.5
    fourth = (draws - predicted.mean).pow(4).mean(0)
    spread = ((fourth - predicted.variance.square()) / 20_000).sqrt()
    assert ((draws - predicted.mean).square().mean(0) - predicted.variance).abs().le(4.5 * spread).all()


def test_samples_repeat_with_their_seed_and_leave_the_global_state_alone() -> None:
    predicted, _, _, _ = made("by_hand")
    before = torch.random.get_rng_state()
    first = predicted.sample(50, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, predicted.sample(50, seed=1))
    assert not torch.equal(first, predicted.sample(50, seed=2))


def test_one_sample_uses_one_theta_at_every_input() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(level.expand(len(x)), 1e-6), obs=y)

    target = compile_target(model, torch.zeros(3, 1), torch.zeros(3))
    thetas = torch.tensor([[-1.0], [1.0]])
    predicted = Prediction(DrawSource(target, thetas, torch.tensor([0.5, 0.5]), torch.zeros(50, 1)), 50)
    draws = predicted.sample(200)
    assert draws.std(1).max() < 1e-4
    assert set(draws.mean(1).round().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "conv"])
def test_class_probabilities_and_entropies_match_a_loop_over_draws(name: str) -> None:
    predicted, twins, weights, y = made(name, weighted=True)
    probs = torch.stack([torch.stack([1 - f.probs, f.probs], -1) if name == "bernoulli" else f.probs for f in twins])
    mean = torch.tensordot(weights, probs, 1)
    within = torch.tensordot(weights, -(probs * probs.log()).sum(-1), 1)
    torch.testing.assert_close(predicted.probs, mean)
    torch.testing.assert_close(predicted.component_probs(), probs)
    torch.testing.assert_close(predicted.entropy, -(mean * mean.log()).sum(-1))
    torch.testing.assert_close(predicted.aleatoric_entropy, within)
    torch.testing.assert_close(predicted.mutual_information, predicted.entropy - within)
    assert torch.equal(predicted.labels, mean.argmax(-1))
    assert (predicted.mutual_information > 0).all()
    torch.testing.assert_close(predicted.log_prob(y), mean.gather(-1, y.long()[:, None])[:, 0].log())


def multilabel(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def test_several_labels_per_datum_keep_their_dimension() -> None:
    x, y = torch.randn(5, 2), torch.ones(5, 3)
    target = compile_target(multilabel, x, y)
    thetas = torch.randn(4, 6)
    predicted = Prediction(DrawSource(target, thetas, torch.full((4,), 0.25), x), 5)
    probs = torch.stack([(x @ t.reshape(2, 3)).sigmoid() for t in thetas])
    torch.testing.assert_close(predicted.probs[..., 1], probs.mean(0))
    torch.testing.assert_close(predicted.mean, probs.mean(0))
    assert predicted.labels.shape == predicted.entropy.shape == predicted.mutual_information.shape == (5, 3)
    torch.testing.assert_close(predicted.log_prob(y), probs.log().sum(-1).exp().mean(0).log())


def coins(*logits: float) -> Prediction:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logit.expand(len(x))), obs=y)

    target = compile_target(model, torch.zeros(2, 1), torch.ones(2))
    weights = torch.full((len(logits),), 1 / len(logits))
    return Prediction(DrawSource(target, torch.tensor(logits)[:, None], weights, torch.zeros(1, 1)), 1)


def test_two_certain_members_that_disagree_have_a_mutual_information_of_log_two() -> None:
    assert float(coins(1e3, -1e3).mutual_information) == pytest.approx(math.log(2), abs=1e-12)


def test_mutual_information_is_zero_only_where_all_members_agree() -> None:
    assert float(coins(0.3, 0.3, 0.3).mutual_information) == pytest.approx(0, abs=1e-14)
    assert float(coins(0.3, 0.3, 0.31).mutual_information) > 1e-7


@pytest.mark.parametrize("name", ["by_hand", "categorical", "poisson", "heteroscedastic"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _, y = made(name, weighted=True)
    monkeypatch.setattr(prediction, "MAX_ROWS", 5)
    monkeypatch.setattr(prediction, "_KEEP_BYTES", 0)
    parts, _, _, _ = made(name, weighted=True, chunk_size=3)
    assert whole._kept is not None
    assert parts._kept is None
    assert len(parts._rows) == 3
    for field in ("mean", "aleatoric_variance", "epistemic_variance", "f_mean", "f_variance"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.log_prob(y), whole.log_prob(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.component_functions(), whole.component_functions(), rtol=0, atol=1e-12)
    if not whole.family.is_classification:
        torch.testing.assert_close(parts.quantile(0.3), whole.quantile(0.3), rtol=0, atol=1e-12)


def test_rows_are_cut_where_their_parameters_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_ROW_CHUNK_BYTES", 4 * S * 3 * 8)  # four inputs of three float64 logits
    predicted, _, _, _ = made("categorical")
    assert [r.stop - r.start for r in predicted._rows] == [4, 4, 4]


def test_identical_draws_leave_no_epistemic_variance_and_order_does_not_matter() -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    thetas, weights = torch.randn(S, target.dim), torch.rand(S)
    weights = weights / weights.sum()
    same = Prediction(DrawSource(target, thetas[:1].expand(S, -1), weights, case.x), 12)
    assert same.epistemic_variance.max() < 1e-28
    order = torch.randperm(S)
    a = Prediction(DrawSource(target, thetas, weights, case.x), 12)
    b = Prediction(DrawSource(target, thetas[order], weights[order], case.x), 12)
    torch.testing.assert_close(a.variance, b.variance, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(a.log_prob(case.y), b.log_prob(case.y), rtol=1e-12, atol=1e-12)


def test_integer_weights_are_repeated_draws() -> None:
    case, target = case_named("heteroscedastic"), target_of("heteroscedastic")
    thetas = torch.randn(2, target.dim)
    weighted = Prediction(DrawSource(target, thetas, torch.tensor([0.25, 0.75]), case.x), 12)
    repeated = Prediction(DrawSource(target, thetas[[0, 1, 1, 1]], torch.full((4,), 0.25), case.x), 12)
    torch.testing.assert_close(weighted.variance, repeated.variance)
    torch.testing.assert_close(weighted.quantile(0.9), repeated.quantile(0.9))
    torch.testing.assert_close(weighted.log_prob(case.y), repeated.log_prob(case.y))


def test_gaussian_log_prob_is_that_of_the_moments() -> None:
    predicted, _, _, y = made("two_outputs")
    expected = scipy.stats.norm(predicted.mean, predicted.stddev).logpdf(y).sum(-1)
    np.testing.assert_allclose(predicted.gaussian_log_prob(y), expected)
    counted, _, _, counts = made("poisson")
    assert counted.gaussian_log_prob(counts.long()).shape == counts.shape


def test_a_restricted_target_predicts_as_the_whole_model() -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    small = target.restrict("w2", torch.randn(target.dim))
    thetas, weights = torch.randn(S, small.dim), torch.full((S,), 1 / S)
    restricted = Prediction(DrawSource(small, thetas, weights, case.x), 12)
    whole = Prediction(DrawSource(target, small.expand(thetas), weights, case.x), 12)
    torch.testing.assert_close(restricted.mean, whole.mean)
    other = target.restrict("w2", torch.randn(target.dim))  # the fixed part is no constant of a shared graph
    again = Prediction(DrawSource(other, thetas, weights, case.x), 12)
    assert not torch.allclose(again.mean, whole.mean)


def test_a_model_with_latents_per_datum_predicts_at_its_own_inputs() -> None:
    predicted, twins, weights, _ = made("local_effects")
    torch.testing.assert_close(predicted.mean, torch.tensordot(weights, torch.stack([f.mean for f in twins]), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_model_whatever_the_default(dtype: torch.dtype, default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    case = case_named("by_hand")
    target = compile_target(case.model(), case.x.to(dtype), case.y.to(dtype))
    posterior = DrawsPosterior(target, 0.3 * torch.randn(2, 5, target.dim, dtype=dtype), backend=None)
    predicted = posterior.predict(case.x.to(dtype))
    low, high = predicted.interval(0.9)
    for value in (predicted.mean, predicted.variance, low, high, predicted.sample(3), predicted.log_prob(target.y)):
        assert value.dtype == dtype
    expected = torch.tensor([0.05, 0.95], dtype=dtype)[:, None].expand(2, 12)
    torch.testing.assert_close(torch.stack([predicted.cdf(low), predicted.cdf(high)]), expected, rtol=0, atol=1e-5)


def test_a_family_without_a_distribution_function_says_so() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Beta(1 + a.expand(len(x)), 2.0), obs=y)

    target = compile_target(model, torch.zeros(3, 1), torch.full((3,), 0.5))
    predicted = Prediction(DrawSource(target, torch.randn(4, 1), torch.full((4,), 0.25), torch.zeros(3, 1)), 3)
    with pytest.raises(CapabilityError, match="Beta has no distribution function"):
        predicted.quantile(0.5)
    assert predicted.sample(5).shape == (5, 3)


def test_quantiles_of_another_positive_family_match_scipy() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Gamma(a.expand(len(x)), 2.0), obs=y)

    target = compile_target(model, torch.zeros(3, 1), torch.full((3,), 0.5))
    predicted = Prediction(DrawSource(target, torch.zeros(1, 1), torch.ones(1), torch.zeros(3, 1)), 3)
    for q in (0.01, 0.5, 0.99):
        np.testing.assert_allclose(predicted.quantile(q), scipy.stats.gamma(1.0, scale=0.5).ppf(q), rtol=1e-8)


def test_bad_arguments_get_the_documented_errors() -> None:
    predicted, _, _, y = made("by_hand")
    with pytest.raises(ValueError, match=r"y must have shape \(12,\)"):
        predicted.log_prob(y[:5])
    with pytest.raises(ValueError, match=r"y must have shape \(12,\)"):
        predicted.cdf(y[:, None])
    with pytest.raises(ValueError, match="NaN in 1 places"):
        predicted.log_prob(torch.where(torch.arange(12) == 3, math.nan, y))
    with pytest.raises(TypeError, match=r"torch\.Tensor, got ndarray"):
        predicted.log_prob(y.numpy())
    for q in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="`q` must be inside"):
            predicted.quantile(q)
        with pytest.raises(ValueError, match="`level` must be inside"):
            predicted.interval(q)
    with pytest.raises(ValueError, match="`num_samples` must be >= 1"):
        predicted.sample(0)
    with pytest.raises(CapabilityError, match="needs class labels"):
        _ = predicted.probs
    with pytest.raises(ValueError, match="`chunk_size` must be >= 1"):
        made("by_hand", chunk_size=0)


def test_class_labels_outside_the_range_are_refused_and_have_no_quantiles() -> None:
    predicted, _, _, y = made("categorical")
    for wrong in (y + 1, y - 1, y + 0.5):
        with pytest.raises(ValueError, match="class labels 0 to 2"):
            predicted.log_prob(wrong)
    for call in (lambda: predicted.quantile(0.5), lambda: predicted.cdf(y), lambda: predicted.gaussian_log_prob(y)):
        with pytest.raises(CapabilityError, match=r"use `\.probs`"):
            call()


def test_new_inputs_must_look_like_the_training_inputs() -> None:
    case, target = case_named("by_hand"), target_of("by_hand")
    posterior = DrawsPosterior(target, torch.randn(1, 4, target.dim), backend=None)
    assert posterior.predict(case.x[:1]).mean.shape == (1,)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\)"):
        posterior.predict(case.x[:, :2])
    with pytest.raises(TypeError, match="float32"):
        posterior.predict(case.x.float())
    with pytest.raises(ValueError, match="NaN"):
        posterior.predict(case.x * math.nan)
    with pytest.raises(ValueError, match="empty"):
        posterior.predict(case.x[:0])
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        posterior.predict(case.x.numpy())


_MEMORY = """
import pyro, pyro.distributions as dist, resource, torch
torch.set_num_threads(1)
from inference.posterior import DrawsPosterior
from inference.target import compile_target

def model(x, y=None):
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([8, 50]).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(0.0, 1.0).expand([50]).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(0.0, 0.1).expand([50]).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2, s), obs=y)

target = compile_target(model, torch.randn(100, 8), torch.randn(100))
posterior = DrawsPosterior(target, 0.1 * torch.randn(4, 250, target.dim), backend=None)
x = torch.randn(100_000, 8)
posterior.predict(x[:10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prediction = posterior.predict(x)
assert prediction.mean.shape == (100_000,)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_thousand_draws_at_a_hundred_thousand_inputs_stay_under_500_megabytes() -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 500
