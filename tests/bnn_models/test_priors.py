"""Every prior is the density it says it is, on the tensors it says, in the dtype of the data."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from scipy.integrate import quad

from bnn_models import MLP, priors
from inference import compile_target


def slot(name: str = "layers.0.weight", shape: tuple[int, ...] = (3, 4), **changes: Any) -> priors.Slot:
    fields = {"fan_in": 4, "is_bias": False, "dtype": torch.float64, "device": torch.device("cpu")} | changes
    return priors.Slot(name=name, shape=shape, **fields)


ALL = [
    (priors.Normal(0.7), scipy.stats.norm(0, 0.7).pdf),
    (priors.Laplace(0.7), scipy.stats.laplace(0, 0.7).pdf),
    (priors.StudentT(0.7), scipy.stats.t(3, 0, 0.7).pdf),
    (priors.Logistic(0.7), scipy.stats.logistic(0, 0.7).pdf),
    (
        priors.ScaleMixture(0.25, (1.0, 0.1)),
        lambda w: 0.25 * scipy.stats.norm(0, 1).pdf(w) + 0.75 * scipy.stats.norm(0, 0.1).pdf(w),
    ),
]


@pytest.mark.parametrize(("prior", "density"), ALL)
def test_log_prob_is_the_sum_of_the_scalar_log_densities(prior: priors.Prior, density: Any) -> None:
    value = torch.randn(3, 4)
    actual = prior.distribution(slot()).log_prob(value)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(sum(math.log(density(w)) for w in value.flatten().tolist()), abs=1e-10)


@pytest.mark.parametrize(("prior", "density"), ALL)
def test_each_prior_integrates_to_one(prior: priors.Prior, density: Any) -> None:
    scalar = prior.distribution(slot(shape=()))
    mass = 2 * sum(
        quad(lambda w: scalar.log_prob(torch.tensor(w)).exp().item(), *ends)[0] for ends in [(0, 1), (1, 1e3)]
    )
    assert mass == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("prior", [*(prior for prior, _ in ALL), priors.Hierarchical(dist.HalfNormal(1.0))])
def test_every_prior_compiles_to_its_own_density(prior: priors.Prior) -> None:
    x = torch.randn(5, 4)
    target = compile_target(MLP([4, 3, 1], prior=prior), x, x[:, 0])
    theta = target.initial(1, seed=0)[0]
    recorded = poutine.trace(poutine.condition(target.model, target.unravel(theta))).get_trace(x)
    recorded.compute_log_prob(lambda name, _: name != "y")
    expected = sum(node["log_prob_sum"] for name, node in recorded.nodes.items() if "log_prob_sum" in node)
    scales = theta[[s.start for s in target.sites if s.name.endswith("_scale")]]  # in logarithms: Jacobian exp
    assert target.log_prior(theta).item() == pytest.approx((expected + scales.sum()).item(), abs=1e-9)


@pytest.mark.parametrize(
    "prior",
    [
        priors.Normal("fan_in", 2.0),
        priors.Laplace("fan_in", 2.0),
        priors.StudentT("fan_in", 2.0),
        priors.Logistic("fan_in", 2.0),
    ],
)
def test_fan_in_sets_the_standard_deviation_of_weights_and_biases(prior: priors.Prior) -> None:
    weight = prior.distribution(slot()).base_dist.variance
    bias = prior.distribution(slot(is_bias=True, shape=(3,))).base_dist.variance
    torch.testing.assert_close(weight, torch.full((3, 4), 4.0 / 4))
    torch.testing.assert_close(bias, torch.full((3,), 4.0))


def test_scale_patterns_choose_the_first_match() -> None:
    prior = priors.Normal({"*.bias": 3.0, "layers.0.*": "fan_in", "*": 0.5})
    assert prior.scale_at(slot("layers.0.bias")) == 3.0
    assert prior.scale_at(slot("layers.0.weight")) == 0.5 * 4 / 4
    assert prior.scale_at(slot("layers.1.weight")) == 0.5


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_hierarchical_marginal_variance_follows_the_scale_prior(family: str) -> None:
    prior = priors.Hierarchical(dist.Gamma(4.0, 2.0), family=family, fan_in=True)  # type: ignore[arg-type]
    with poutine.trace() as recorded:
        prior.sample(slot(shape=(2, 4)))
    assert [name for name in recorded.trace.nodes if not name.startswith("_")] == [
        "layers.0.weight_scale",
        "layers.0.weight",
    ]
    num = 100_000
    with pyro_plate(num):
        draws = prior.sample(slot(shape=(1, 1)))
    assert draws.shape == (num, 1, 1)
    squares = draws.flatten() ** 2
    # E[tau^2] = Var + mean^2 = 1 + 4; fan-in 4; a Laplace variable of scale b has variance 2 b^2.
    expected = 5.0 / 4 * (2 if family == "laplace" else 1)
    assert abs(squares.mean().item() - expected) < 4 * squares.std().item() / math.sqrt(num)


def pyro_plate(num: int) -> Any:
    return pyro.plate("draws", num, dim=-1)


def test_hierarchical_log_prob_is_scale_plus_conditional() -> None:
    prior = priors.Hierarchical(dist.HalfCauchy(0.5))
    value, scale = torch.randn(3, 4), torch.tensor(0.8)
    conditioned = poutine.condition(prior.sample, {"layers.0.weight": value, "layers.0.weight_scale": scale})
    actual = poutine.trace(conditioned).get_trace(slot()).log_prob_sum()
    expected = scipy.stats.halfcauchy(0, 0.5).logpdf(0.8) + scipy.stats.norm(0, 0.8).logpdf(value.numpy()).sum()
    assert actual.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_priors_built_in_float32_follow_the_dtype_of_the_slot(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    hierarchical = priors.Hierarchical(dist.LogNormal(0.0, 1.0))
    for prior in [*(prior for prior, _ in ALL), hierarchical]:
        recorded = poutine.trace(prior.sample).get_trace(slot(dtype=dtype))
        for site in (node for node in recorded.nodes.values() if node["type"] == "sample"):
            assert site["value"].dtype == dtype
            assert site["fn"].log_prob(site["value"]).dtype == dtype
    assert hierarchical.scale_prior.loc.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: priors.Normal(-1.0), "`scale` must be a positive number"),
        (lambda: priors.Normal("fan_out"), "`scale` must be"),  # type: ignore[arg-type]
        (lambda: priors.Normal(float("nan")), "`scale` must be"),
        (lambda: priors.Normal({}), "empty dictionary"),
        (lambda: priors.Normal(1.0, gain=2.0), "`gain` only applies"),
        (lambda: priors.StudentT("fan_in", df=2.0), "`df` must be > 2"),
        (lambda: priors.ScaleMixture(mix=1.0), "`mix` must lie in"),
        (lambda: priors.ScaleMixture(scales=(1.0,)), "two positive numbers"),  # type: ignore[arg-type]
        (lambda: priors.Hierarchical(dist.Normal(0.0, 1.0)), "on positive numbers"),
        (lambda: priors.Hierarchical(dist.HalfNormal(torch.ones(2))), "univariate"),
        (lambda: priors.Hierarchical(dist.HalfNormal(1.0), family="cauchy"), "`family` must be one of"),  # type: ignore
        (lambda: priors.PerSite({}), "is empty"),
        (lambda: priors.assign({"*.weight": priors.Normal()}, ["a.weight", "a.bias"]), "matches site 'a.bias'"),
        (lambda: priors.assign({"*": priors.Normal(), "a.*": None}, ["a.b"]), "pattern 'a.*' decides about no site"),
        (lambda: priors.assign(priors.Normal({"z": 1.0, "*": 1.0}), ["a.b"]), "pattern 'z' decides about no site"),
    ],
)
def test_wrong_hyperparameters_are_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        build()


def test_something_else_than_a_prior_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="must be a prior"):
        priors.assign(1.0, ["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pattern 'a'"):
        priors.PerSite({"a": 1.0})  # type: ignore[dict-item]
