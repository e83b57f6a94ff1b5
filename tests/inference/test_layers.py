"""Layers are found however the model writes them, and hold the entries of theta that they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from inference.target import compile_target
from tests.cases import CASES, LABELS, X, Y, normal, observe

IN, OUT = 3, 2


def last(hidden: Tensor, y: Tensor | None) -> None:
    observe(hidden.sum(-1), 1.0, y)


def product(x: Tensor, y: Tensor | None = None) -> None:
    last(torch.tanh(x @ pyro.sample("w", normal(IN, OUT)) + pyro.sample("b", normal(OUT))), y)


def transposed(x: Tensor, y: Tensor | None = None) -> None:
    last(torch.tanh(x @ pyro.sample("w", normal(OUT, IN)).T + pyro.sample("b", normal(OUT))), y)


def functional_linear(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(OUT, IN)), pyro.sample("b", normal(OUT))
    last(torch.tanh(torch.nn.functional.linear(x, w, b)), y)


def einsum(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(IN, OUT)), pyro.sample("b", normal(OUT))
    last(torch.tanh(torch.einsum("nd,dk->nk", x, w) + b), y)


def weight_on_the_left(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(OUT, IN)), pyro.sample("b", normal(OUT))
    last(torch.tanh((w @ x.T).T + b), y)


def scaled_weight(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(IN, OUT)), pyro.sample("b", normal(OUT))
    last(torch.tanh(x @ (w * 0.25) + b), y)


def scaled_product(x: Tensor, y: Tensor | None = None) -> None:
    w, b = pyro.sample("w", normal(IN, OUT)), pyro.sample("b", normal(OUT))
    last(torch.tanh(x @ w / 4.0 + b), y)


def flat_site(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", normal(IN * OUT)).reshape(IN, OUT)
    last(torch.tanh(x @ w + pyro.sample("b", normal(OUT))), y)


LINEAR: list[tuple[Callable[..., None], float]] = [
    (product, 1.0),
    (transposed, 1.0),
    (functional_linear, 1.0),
    (einsum, 1.0),
    (weight_on_the_left, 1.0),
    (scaled_weight, 0.25),
    (scaled_product, 0.25),
    (flat_site, 1.0),
]


@pytest.mark.parametrize(("model", "scale"), LINEAR, ids=lambda v: getattr(v, "__name__", ""))
def test_linear_layers_are_found_with_their_slices_and_scale(model: Callable[..., None], scale: float) -> None:
    target = compile_target(model, X, Y)
    (layer,) = target.layers
    assert (layer.kind, layer.name, layer.fan_in, layer.fan_out) == ("linear", "w", IN, OUT)
    assert (layer.weight, layer.bias) == (slice(0, 6), slice(6, 8))
    assert layer.scale == pytest.approx(scale)
    theta = torch.randn(8, generator=torch.Generator().manual_seed(0))
    mean = torch.tanh(X @ (layer.scale * theta[layer.positions]) + theta[layer.bias]).sum(-1)
    torch.testing.assert_close(target.parameters(theta)["loc"], mean)


def test_convolutions_are_found_with_their_slices() -> None:
    case = next(c for c in CASES if c.name == "conv")
    target = compile_target(case.model(), case.x, case.y)
    conv, linear = target.layers
    assert (conv.kind, conv.name, conv.weight_shape, conv.fan_in) == ("conv", "conv.weight", (2, 1, 2, 2), 4)
    theta = torch.randn(target.dim, generator=torch.Generator().manual_seed(0))
    assert conv.bias is not None
    assert linear.bias is not None
    hidden = torch.relu(torch.nn.functional.conv2d(case.x, theta[conv.positions], theta[conv.bias])).flatten(1)
    logits = hidden @ theta[linear.positions] + theta[linear.bias]
    torch.testing.assert_close(target.likelihood(theta).logits, logits - logits.logsumexp(-1, keepdim=True))


def test_embeddings_are_found_with_their_slices() -> None:
    case = next(c for c in CASES if c.name == "embedding")
    target = compile_target(case.model(), case.x, case.y)
    table, _ = target.layers
    assert (table.kind, table.name, table.weight, table.weight_shape) == ("embedding", "table", slice(0, 10), (5, 2))
    theta = torch.randn(target.dim, generator=torch.Generator().manual_seed(0))
    mean = theta[table.positions][case.x].mean(-2) @ theta[10:]
    torch.testing.assert_close(target.parameters(theta)["loc"], mean)


def _random_matrix_of_weights(x: Tensor, y: Tensor | None = None) -> None:
    a, z = pyro.sample("a", normal(IN, IN)), pyro.sample("z", normal(IN))
    observe((x * (a @ z)).sum(-1), 1.0, y)


def _weight_times_a_site(x: Tensor, y: Tensor | None = None) -> None:
    tau, w = pyro.sample("tau", normal()), pyro.sample("w", normal(IN, OUT))
    last(x @ (tau * w), y)


def _lookup(x: Tensor, y: Tensor | None = None) -> None:
    table = pyro.sample("table", normal(3))
    observe(table[x], 1.0, y)


@pytest.mark.parametrize(("model", "x"), [(_random_matrix_of_weights, X), (_weight_times_a_site, X), (_lookup, LABELS)])
def test_products_that_are_no_layers_are_not_listed(model: Callable[..., None], x: Any) -> None:
    assert compile_target(model, x, Y).layers == ()
