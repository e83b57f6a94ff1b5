"""The multilayer perceptron as a Pyro model: its sites, its density, its Gaussian-process limit, its plates."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from bnn_models import MLP, likelihoods, priors


def draw_network(model: MLP, x: Tensor, num: int) -> Tensor:
    """Prior draws of the outputs, (num, N, K)."""
    return Predictive(model, num_samples=num, parallel=True, return_sites=("_RETURN",))(x)["_RETURN"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sites_have_the_names_shapes_and_dtype_of_the_data(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    model = MLP([3, 5, 1], prior=priors.Normal("fan_in"), likelihood=likelihoods.Normal(dist.HalfNormal(1.0)))
    trace = poutine.trace(model).get_trace(torch.randn(7, 3, dtype=dtype), torch.randn(7, dtype=dtype))
    latent = {name: tuple(site["value"].shape) for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert {name: shape for name, shape in latent.items() if name != "data"} == {
        "layers.0.weight": (5, 3),
        "layers.0.bias": (5,),
        "layers.1.weight": (1, 5),
        "layers.1.bias": (1,),
        "likelihood.scale": (),
        "y": (7,),
    }
    assert trace.nodes["_RETURN"]["value"].shape == (7, 1)
    assert trace.log_prob_sum().dtype == dtype


def test_log_joint_equals_the_formula() -> None:
    model = MLP([3, 5, 1], "relu", priors.Normal(0.5), likelihoods.Normal(0.2))
    x, y = torch.randn(7, 3), torch.randn(7)
    trace = poutine.trace(model).get_trace(x, y)
    w = {name: trace.nodes[name]["value"] for name in model.site_shapes}
    outputs = torch.relu(x @ w["layers.0.weight"].T + w["layers.0.bias"]) @ w["layers.1.weight"].T + w["layers.1.bias"]
    expected = sum(torch.distributions.Normal(0.0, 0.5).log_prob(value).sum() for value in w.values())
    expected = expected + torch.distributions.Normal(outputs[:, 0], 0.2).log_prob(y).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.network(w, x), outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_relu_prior_variance_is_the_nngp_kernel(gain: float) -> None:
    x, num = torch.randn(1, 4), 40_000
    model = MLP([4, 50, 1], "relu", priors.Normal("fan_in", gain), bias=False)
    squares = draw_network(model, x, num).flatten() ** 2
    expected = gain**4 * (x**2).sum().item() / (2 * 4)
    assert abs(squares.mean().item() - expected) < 4 * squares.std().item() / math.sqrt(num)


def test_erf_prior_variance_is_the_nngp_kernel() -> None:
    x, num = torch.randn(1, 4), 40_000
    squares = draw_network(MLP([4, 50, 1], "erf", priors.Normal("fan_in"), bias=False), x, num).flatten() ** 2
    kernel = (x**2).mean().item()
    expected = 2 / math.pi * math.asin(2 * kernel / (1 + 2 * kernel))  # Williams 1997
    assert abs(squares.mean().item() - expected) < 4 * squares.std().item() / math.sqrt(num)


@pytest.mark.parametrize("width", [10, 40, 160])
def test_the_kernel_of_a_relu_net_approaches_its_limit_as_one_over_the_width(width: int) -> None:
    """Given the hidden weights the output variance is (1/H) sum relu(z)^2: its relative variance is 5 / H."""
    num, model = 20_000, MLP([4, width, 1], "relu", priors.Normal("fan_in"), bias=False)
    weight = Predictive(model, num_samples=num, parallel=True)(torch.randn(1, 4))["layers.0.weight"].reshape(
        num, width, 4
    )
    x = torch.randn(4)
    kernels = torch.relu(weight @ x).square().mean(-1) / (x.square().sum() / 8)
    errors = (kernels - 1) ** 2
    assert abs(errors.mean().item() - 5 / width) < 4 * errors.std().item() / math.sqrt(num)


@pytest.mark.parametrize(
    ("sizes", "likelihood"),
    [
        ([3, 5, 1], likelihoods.Normal(dist.HalfNormal(1.0))),
        ([3, 5, 2], likelihoods.Normal(dist.HalfNormal(1.0))),
        ([3, 5, 5, 4], likelihoods.HeteroscedasticNormal()),
        ([3, 4], likelihoods.Categorical(4)),
    ],
)
@pytest.mark.parametrize("prior", [priors.Normal("fan_in"), priors.Hierarchical(dist.HalfNormal(1.0))])
def test_parallel_predictive_agrees_with_a_loop_over_the_draws(sizes: list[int], likelihood: Any, prior: Any) -> None:
    model, x = MLP(sizes, prior=prior, likelihood=likelihood), torch.randn(7, 3)
    draws = Predictive(model, num_samples=6, parallel=True)(x)
    draws.pop("y")
    parallel = Predictive(model, posterior_samples=draws, parallel=True, return_sites=("_RETURN", "y"))(x)
    squeezed = {name: value.squeeze(1) for name, value in draws.items()}
    loop = Predictive(model, posterior_samples=squeezed, return_sites=("_RETURN", "y"))(x)
    torch.testing.assert_close(parallel["_RETURN"], loop["_RETURN"].reshape(parallel["_RETURN"].shape))
    assert parallel["y"].shape == loop["y"].shape
    assert len(parallel["_RETURN"][:, 0, 0].unique()) == 6


def test_parallel_predictive_works_with_an_autoguide() -> None:
    model, x = MLP([3, 5, 1], likelihood=likelihoods.Normal(dist.HalfNormal(1.0))), torch.randn(7, 3)
    guide = AutoNormal(model)
    guide(x, torch.randn(7))
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True, return_sites=("y", "_RETURN"))(x)
    assert draws["y"].shape == (6, 7)
    assert draws["_RETURN"].shape == (6, 7, 1)
    assert len(draws["_RETURN"][:, 0, 0].unique()) == 6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP([3]), "at least two positive integers"),
        (lambda: MLP([3, 0, 1]), "at least two positive integers"),
        (lambda: MLP([3, 1], "tahn"), "`activation` must be a function or one of"),
        (lambda: MLP([3, 1], likelihood=likelihoods.Categorical(3)), "`sizes` ends with 1 outputs, but Categorical"),
        (lambda: MLP([3, 1], likelihood=likelihoods.HeteroscedasticNormal()), "reads 2 network outputs per target"),
        (lambda: MLP([3, 1], prior={"*.bias": priors.Normal()}), "matches site 'layers.0.weight'"),
        (lambda: MLP([3, 1], prior={"*.bias": None, "*": priors.Normal()}), "no pretrained value"),
        (lambda: MLP([3, 1])(torch.randn(5, 4)), r"shape \(N, 3\), got \(5, 4\)"),
        (lambda: MLP([3, 1])(torch.randn(5)), r"shape \(N, 3\), got \(5,\)"),
    ],
)
def test_wrong_models_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_repr_says_what_was_declared() -> None:
    model = MLP([3, 5, 1], prior=priors.Normal("fan_in"), bias=False)
    namespace = {"MLP": MLP, "Normal": priors.Normal}
    assert repr(model).startswith("MLP([3, 5, 1], activation='tanh', prior=Normal(scale='fan_in', gain=1.0)")
    assert repr(eval(repr(model).split(", likelihood")[0] + ", bias=False)", namespace)) == repr(model)
