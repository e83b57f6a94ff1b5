"""Layer inputs and output gradients, put together, are the Jacobian that reverse mode gives."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from inference.jacobians import assembled, eta_and_jacobian
from inference.taps import Slope, passes, taps_for
from inference.target import Target, compile_target
from tests.cases import X, Y, normal, observe
from tests.networks import NAMES, N, network

EXACT = {"rtol": 1e-9, "atol": 1e-9}
OUTSIDE = {"resnet": ["norm1", "norm2"], "learnt_noise": ["noise"], "encoder": ["block.norm1", "block.norm2"]}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_gradients_make_up_the_jacobian(name: str) -> None:
    target, theta = network(name)
    taps = taps_for(target, theta, target.x)
    found = assembled(target, theta, target.x, taps, taps.run(target, theta, target.x))
    eta, expected = eta_and_jacobian(target, theta, target.x)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(taps.run(target, theta, target.x).eta, eta)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_no_layer_is_left_over(name: str) -> None:
    target, theta = network(name)
    rest = taps_for(target, theta, target.x).rest
    left = {s.name.rsplit(".", 1)[0] for s in target.sites if ((rest >= s.start) & (rest < s.stop)).any()}
    assert left == set(OUTSIDE.get(name.removesuffix("_sequence_first"), []))


@pytest.mark.parametrize("name", ["by_hand", "lenet", "encoder", "encoder_sequence_first"])
def test_the_last_chunk_is_taken_full_and_cut(name: str) -> None:
    target, theta = network(name)
    _, expected = eta_and_jacobian(target, theta, target.x)
    parts, covered = [], []
    for rows, taps, done in passes(target, theta, target.x, 4):  # 6 data: two chunks of 3; then 5: of 3 and 2
        parts.append(assembled(target, theta, target.x[rows], taps, done))
        covered.append(rows)
    torch.testing.assert_close(torch.cat(parts), expected, **EXACT)
    assert covered == [slice(0, 3), slice(3, 6)]
    *_, (rows, taps, done) = passes(target, theta, target.x[:5], 3)
    assert rows == slice(3, 5)
    torch.testing.assert_close(assembled(target, theta, target.x[rows], taps, done), expected[rows], **EXACT)


def _slope(target: Target, theta: Tensor) -> Slope:
    slope = Slope(theta)
    parts = [(rows, done.eta) for rows, _, done in passes(target, theta, target.x, 4, slope)]
    torch.testing.assert_close(torch.cat([eta for _, eta in parts]), target.eta(theta), **EXACT)
    return slope


def assert_slope_is_autograds(target: Target, theta: Tensor) -> None:
    found = _slope(target, theta)
    gradient, value = grad_and_value(lambda t: target.log_likelihood(t).sum())(theta)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient, gradient, **EXACT)
    assert found.value == pytest.approx(float(value))


@pytest.mark.parametrize("name", NAMES)
def test_passes_collect_the_log_likelihood_and_its_gradient(name: str) -> None:
    target, theta = network(name)
    assert_slope_is_autograds(target, theta)


def test_masked_and_scaled_data_count_as_the_model_says() -> None:
    def part(x: Tensor, y: Tensor | None = None) -> None:
        w, noise = pyro.sample("w", normal(3)), pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.poutine.scale(scale=3.0), pyro.poutine.mask(mask=x[:, 0] > 0):
            observe(x @ w, noise, y)

    target = compile_target(part, X, Y)
    theta = torch.linspace(-1, 1, target.dim)
    assert_slope_is_autograds(target, theta)


def test_a_factor_that_reads_a_weight_past_its_layer_is_noticed() -> None:
    def penalised(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3))
        with pyro.plate("data", len(x)):
            pyro.factor("penalty", -x[:, 0].square() * w.square().sum())
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    target = compile_target(penalised, X, Y)
    theta = torch.linspace(-1, 1, target.dim)
    assert [block.name for block in taps_for(target, theta, X).blocks] == ["w"]
    assert _slope(target, theta).gradient is None


def test_a_restricted_target_taps_its_own_entries() -> None:
    target, theta = network("lenet")
    for pattern, shapes in (("6.*", [(3, 4)]), ("3.weight", [(3, 8)]), ("3.bias", [(3, 1)])):
        part = target.restrict(pattern, theta)
        small = part.reduce(theta)
        taps = taps_for(part, small, part.x)
        assert [tuple(block.positions.shape) for block in taps.blocks] == shapes
        found = assembled(part, small, part.x, taps, taps.run(part, small, part.x))
        torch.testing.assert_close(found, eta_and_jacobian(part, small, part.x)[1], **EXACT)


def test_a_weight_that_is_more_than_a_layer_is_left_over() -> None:
    def tied(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", normal(3, 3))
        v = pyro.sample("v", normal(3))
        observe(torch.tanh(x @ w) @ v + w.square().sum(), 1.0, y)

    target = compile_target(tied, X, Y)
    theta = torch.linspace(-1, 1, target.dim)
    taps = taps_for(target, theta, X)
    assert [block.name for block in taps.blocks] == ["v"]
    assert taps.rest.tolist() == list(range(9))
    found = assembled(target, theta, X, taps, taps.run(target, theta, X))
    torch.testing.assert_close(found, eta_and_jacobian(target, theta, X)[1], **EXACT)


def test_a_bias_along_another_dimension_is_no_bias_of_the_layer() -> None:
    def shifted(x: Tensor, y: Tensor | None = None) -> None:
        w, shift = pyro.sample("w", normal(4, 5)), pyro.sample("shift", normal(5))
        observe(torch.tanh(x @ w + shift[:, None]).square().sum((-2, -1)), 1.0, y)

    x = torch.randn(N, 5, 4)
    target = compile_target(shifted, x, torch.randn(N))
    theta = torch.randn(target.dim)
    taps = taps_for(target, theta, x)
    assert [tuple(block.positions.shape) for block in taps.blocks] == [(5, 4)]
    assert taps.rest.tolist() == list(range(20, 25))


def test_a_model_without_layers_has_no_blocks() -> None:
    def elementwise(x: Tensor, y: Tensor | None = None) -> None:
        observe((x * pyro.sample("w", normal(3))).sum(-1), 1.0, y)

    target = compile_target(elementwise, X, Y)
    taps = taps_for(target, torch.zeros(3), X)
    assert (taps.blocks, taps.rest.tolist()) == ((), [0, 1, 2])


def test_gradients_with_respect_to_the_inputs_flow_through_a_pass() -> None:
    target, theta = network("by_hand")
    taps = taps_for(target, theta, target.x)

    def total(x: Tensor) -> Tensor:
        done = taps.run(target, theta, x)
        pairs = zip(taps.blocks, done.all_gradients(), strict=True)
        return sum((done.inputs(block).square().sum() + g.square().sum() for block, g in pairs), torch.zeros(()))

    assert torch.autograd.gradcheck(total, target.x.clone().requires_grad_())
