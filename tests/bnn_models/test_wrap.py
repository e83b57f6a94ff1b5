"""Any module as a model: the module is left alone, and the model at the module's weights is the module."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from bnn_models import bayesianize, likelihoods, priors


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(54, 3)
    ).eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.left(a) * 2 + self.right(b)).squeeze(-1)


def test_the_net_is_left_untouched_bit_for_bit() -> None:
    net = conv_net()
    net[0].weight.requires_grad_(False)
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    model = bayesianize(net, likelihood=likelihoods.Categorical(3))
    poutine.trace(model).get_trace(torch.randn(7, 4, 5, 5), torch.zeros(7, dtype=torch.long)).log_prob_sum()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    with torch.no_grad():
        net[5].weight.zero_()
    model.initial_sites()["5.weight"].zero_()
    assert torch.equal(model.initial_sites()["5.weight"], before["5.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "x", "likelihood"),
    [
        (conv_net, torch.randn(7, 4, 5, 5), likelihoods.Categorical(3)),
        (Tied, torch.arange(5), likelihoods.Categorical(5)),
        (TwoInputs, (torch.randn(7, 2), torch.randn(7, 3)), likelihoods.Normal()),
        (TwoInputs, {"b": torch.randn(7, 3), "a": torch.randn(7, 2)}, likelihoods.Normal()),
    ],
)
def test_at_its_own_weights_the_model_is_the_net(build: Any, x: Any, likelihood: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    net = build()
    x = torch.utils._pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, x)
    model = bayesianize(net, likelihood=likelihood)
    expected = net(*x) if isinstance(x, tuple) else net(**x) if isinstance(x, dict) else net(x)
    trace = poutine.trace(poutine.condition(model, model.initial_sites())).get_trace(x)
    outputs = trace.nodes["_RETURN"]["value"]
    assert torch.equal(outputs, expected.reshape(outputs.shape))
    assert outputs.dtype == trace.log_prob_sum().dtype == dtype


def test_patterns_choose_priors_and_none_keeps_the_pretrained_value() -> None:
    net = conv_net()
    prior = {"1.*": None, "*.bias": priors.Laplace(2.0), "0.*": priors.Normal("fan_in"), "*": priors.Normal(0.5)}
    model = bayesianize(net, prior, likelihoods.Categorical(3))
    trace = poutine.trace(model).get_trace(torch.randn(7, 4, 5, 5))
    assert list(model.initial_sites()) == ["0.weight", "0.bias", "5.weight", "5.bias"]
    assert "1.weight" not in trace.nodes
    assert trace.nodes["0.weight"]["fn"].base_dist.stddev[0, 0, 0, 0].item() == pytest.approx(18**-0.5)
    assert trace.nodes["5.weight"]["fn"].base_dist.stddev[0, 0].item() == 0.5
    assert isinstance(trace.nodes["5.bias"]["fn"].base_dist, torch.distributions.Laplace)


def test_tied_parameters_are_one_site() -> None:
    model = bayesianize(Tied(), likelihood=likelihoods.Categorical(5))
    assert list(model.initial_sites()) == ["embed.weight"]
    weight = torch.randn(5, 4)
    torch.testing.assert_close(model.network({"embed.weight": weight}, torch.arange(5)), weight @ weight.T)


def test_parallel_predictive_agrees_with_a_loop_over_the_draws() -> None:
    model, x = (
        bayesianize(conv_net(), {"1.*": None, "*": priors.Hierarchical(dist.HalfNormal(1.0))}),
        torch.randn(7, 4, 5, 5),
    )
    draws = Predictive(model, num_samples=5)(x)
    draws.pop("y")
    parallel = Predictive(model, posterior_samples=draws, parallel=True, return_sites=("_RETURN",))(x)["_RETURN"]
    loop = Predictive(model, posterior_samples=draws, return_sites=("_RETURN",))(x)["_RETURN"]
    torch.testing.assert_close(parallel, loop.reshape(parallel.shape))
    assert len(parallel[:, 0, 0].unique()) == 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bayesianize(conv_net().train()), r"module '1' \(BatchNorm2d\) is in training mode.*net.eval\(\)"),
        (lambda: bayesianize(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.1))), r"module '1' \(Dropout\)"),
        (lambda: bayesianize(nn.Linear(2, 1), {"*": None}), "no parameter of `net` has a prior"),
        (lambda: bayesianize(nn.Linear(2, 1), {"weight": None}), "matches site 'bias'"),
        (lambda: bayesianize(nn.Conv2d(1, 1, 2))(torch.randn(2, 1, 3, 3)), r"must return a tensor of shape \(N, K\)"),
    ],
)
def test_nets_that_cannot_be_wrapped_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        bayesianize(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a tensor"):
        bayesianize(nn.Linear(2, 1))([[0.0, 1.0]])
