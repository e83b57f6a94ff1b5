r"""Which operations of a recorded model are network layers, and which slices of theta they read.

Works on the graph, so ``torch.nn.Linear`` in a wrapped module and ``x @ w + b`` in a hand-written model are found
alike. A layer is a matrix product, convolution or embedding whose weight is a slice of theta, up to reshaping,
transposition and multiplication by a constant.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten._to_copy.default,
}


@dataclass(frozen=True)
class Layer:
    """One layer of the network.

    Attributes:
        kind: linear, conv or embedding.
        name: Site name of the weight.
        weight: Slice of theta holding the weight.
        bias: Slice of theta holding the bias, or None.
        weight_shape: Shape of the weight as the operation reads it: (in, out) for products, (out, in, *kernel) for
            convolutions, (entries, out) for embeddings.
        fan_in: Number of inputs each output sums over.
        fan_out: Number of outputs, or channels.
        scale: Constant the model multiplies the weight with (1 if none).
        node: Name of the operation in the recorded graph.
    """

    kind: Literal["linear", "conv", "embedding"]
    name: str
    weight: slice
    bias: slice | None
    weight_shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    scale: float
    node: str


def find_layers(module: fx.GraphModule, sites: Any) -> tuple[Layer, ...]:
    """List the layers of a recorded model in the order they run.

    Args:
        module: Graph whose first input is theta.
        sites: The target's sites, to name each layer by its weight.

    Returns:
        The layers found; empty if the model has none.
    """
    theta = next(n for n in module.graph.nodes if n.op == "placeholder")
    found = []
    for node in module.graph.nodes:
        layer = _layer(node, theta, sites) if node.op == "call_function" else None
        if layer is not None:
            found.append(layer)
    return tuple(found)


def _layer(node: fx.Node, theta: fx.Node, sites: Any) -> Layer | None:
    args = node.args
    if node.target in (aten.mm.default, aten.bmm.default, aten.mv.default):
        source = _source(args[1], theta)
        first = _source(args[0], theta)
        if source is None and first is not None and node.target is not aten.mm.default:
            return None
        flipped = source is None and first is not None
        source = first if flipped else source
        if source is None:
            return None
        weight = args[0] if flipped else args[1]
        bias, factor = _added_bias(node, theta)
        return _linear(node, weight, (source[0], source[1] * factor), bias, sites, flipped=flipped)
    if node.target is aten.addmm.default:
        source = _source(args[2], theta)
        if source is None:
            return None
        bias = _source(args[0], theta)
        return _linear(node, args[2], source, bias[0] if bias else None, sites, flipped=False)
    if node.target is aten.convolution.default:
        source = _source(args[1], theta)
        if source is None:
            return None
        shape = tuple(_value(args[1]).shape)
        bias = _source(args[2], theta) if isinstance(args[2], fx.Node) else None
        fan_in = int(torch.Size(shape[1:]).numel())
        bias_slice = bias[0] if bias else _added_bias(node, theta)[0]
        return Layer(
            "conv", _name(source[0], sites), source[0], bias_slice, shape, fan_in, shape[0], source[1], node.name
        )
    if node.target is aten.embedding.default:
        source = _source(args[0], theta)
        if source is None:
            return None
        shape = tuple(_value(args[0]).shape)
        return Layer("embedding", _name(source[0], sites), source[0], None, shape, 1, shape[1], source[1], node.name)
    return None


def _linear(
    node: fx.Node, weight: Any, source: tuple[slice, float], bias: slice | None, sites: Any, *, flipped: bool
) -> Layer:
    shape = tuple(_value(weight).shape)
    if len(shape) == 1:
        shape = (shape[0], 1)
    if flipped:
        shape = shape[::-1]
    fan_in, fan_out = shape[-2], shape[-1]
    return Layer("linear", _name(source[0], sites), source[0], bias, (fan_in, fan_out), fan_in, fan_out, source[1], node.name)


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _name(piece: slice, sites: Any) -> str:
    for site in sites:
        if site.start <= piece.start and piece.stop <= site.stop:
            return site.name
    return "?"


def _source(node: Any, theta: fx.Node) -> tuple[slice, float] | None:
    """Slice of theta a node holds, up to reshaping and constant factors, with the product of those factors."""
    scale = 1.0
    while isinstance(node, fx.Node):
        if node is theta:
            return slice(0, _value(theta).shape[0]), scale
        if node.target is aten.slice.Tensor and node.args[0] is theta:
            length = _value(theta).shape[0]
            start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
            stop = node.args[3] if len(node.args) > 3 and node.args[3] is not None else length
            return slice(int(start), min(int(stop), length)), scale
        if node.target is operator.getitem and node.args[0].target is aten.split_with_sizes.default:
            if node.args[0].args[0] is not theta:
                return None
            sizes, position = node.args[0].args[1], node.args[1]
            start = sum(sizes[:position])
            return slice(start, start + sizes[position]), scale
        if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            factor = node.args[1]
            if isinstance(factor, fx.Node):
                return None
            scale = scale * float(factor) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else scale / float(factor)
        elif node.target not in _RESHAPES:
            return None
        node = node.args[0]
    return None


def _added_bias(node: fx.Node, theta: fx.Node) -> tuple[slice | None, float]:
    """Bias added to the product right after it, and the constant the product is multiplied with before that."""
    current, scale = node, 1.0
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.target is aten.add.Tensor:
            other = user.args[1] if user.args[0] is current else user.args[0]
            source = _source(other, theta)
            return (source[0] if source else None), scale
        constant = len(user.args) > 1 and not isinstance(user.args[1], fx.Node)
        if user.target is aten.div.Tensor and constant:
            scale /= float(user.args[1])
        elif user.target is aten.mul.Tensor and constant:
            scale *= float(user.args[1])
        elif user.target not in _RESHAPES:
            return None, scale
        current = user
    return None, scale
