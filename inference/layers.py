r"""Which operations of a recorded model are network layers, and which slices of theta they read.

Works on the graph, so ``torch.nn.Linear`` in a wrapped module and ``x @ w + b`` in a hand-written model are found
alike. A layer is a matrix product, convolution or embedding whose weight is a slice of theta, up to reshaping,
transposition, taking a part (one of the three projections of an attention layer, say) and multiplication by a
constant.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
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


# These move no entry, and copy in ways an index tensor does not need.
_COPIES = {aten.alias.default, aten.clone.default, aten.detach.default, aten._to_copy.default}
_PARTS = {aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


@dataclass(frozen=True)
class Source:
    """A part of theta as an operation reads it.

    Attributes:
        piece: Slice of theta.
        scale: Constant factor.
        positions: Index into theta of every entry.
    """

    piece: slice
    scale: float
    positions: Tensor


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
        positions: Index into theta of every entry of the weight, in ``weight_shape``: ``theta[layer.positions]`` is the
            weight as the operation reads it, whichever way round the model stores it (divided by ``scale``).
        fan_in: Number of inputs each output sums over.
        fan_out: Number of outputs, or channels.
        scale: Constant the model multiplies the weight with (1 if none).
        node: Name of the operation in the recorded graph.
        input: Name of the node it reads (activations, images or token ids).
        flipped: Whether a product has the weight on its left, so that inputs and outputs are columns.
        weight_scale: The part of ``scale`` that the operation's own output carries.
        bias_positions: Index into theta of the bias, (out,), or None.
        bias_scale: Derivative of the operation's output with respect to the bias, so that the bias may be added later
            and after a constant factor.
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
    positions: Tensor = field(compare=False, repr=False)
    input: str = ""
    flipped: bool = False
    weight_scale: float = 1.0
    bias_positions: Tensor | None = field(default=None, compare=False, repr=False)
    bias_scale: float = 1.0


def find_layers(module: fx.GraphModule, sites: Any) -> tuple[Layer, ...]:
    """List the layers of a recorded model in the order they run.

    Args:
        module: Graph whose first input is theta.
        sites: The target's sites, to name each layer by its weight.

    Returns:
        The layers found; empty if the model has none.
    """
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    theta, data = inputs[0], set(inputs[1:])
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and data:
            if not data.isdisjoint(node.all_input_nodes):
                data.add(node)
            layer = _layer(node, theta, sites, data)
            if layer is not None:
                found.append(layer)
    return tuple(found)


def _layer(node: fx.Node, theta: fx.Node, sites: Any, data: set[fx.Node]) -> Layer | None:
    """The layer that a node is, if it combines a slice of theta with something that depends on the data."""
    args = node.args
    if node.target in (aten.mm.default, aten.bmm.default, aten.mv.default):
        return _product(node, args[0], args[1], theta, sites, data)
    if node.target is aten.addmm.default:
        weight = _source(args[2], theta)
        if weight is None or args[1] not in data:
            return None
        return _linear(node, args[1], weight, (_source(args[0], theta), 1.0), sites, flipped=False)
    if node.target is aten.convolution.default:
        weight = _source(args[1], theta)
        if weight is None or args[0] not in data or args[6]:  # transposed
            return None
        shape = tuple(_value(args[1]).shape)
        bias = (_source(args[2], theta), 1.0) if args[2] is not None else _added_bias(node, theta)
        return _make("conv", node, args[0], weight, bias, shape, math.prod(shape[1:]), shape[0], sites)
    if node.target is aten.embedding.default:
        weight = _source(args[0], theta)
        if weight is None:
            return None
        shape = tuple(_value(args[0]).shape)
        return _make("embedding", node, args[1], weight, (None, 1.0), shape, 1, shape[1], sites)
    return None


def _product(node: fx.Node, left: Any, right: Any, theta: fx.Node, sites: Any, data: set[fx.Node]) -> Layer | None:
    """A matrix product, with the weight on either side."""
    flipped = left not in data
    weight, other = (left, right) if flipped else (right, left)
    source = _source(weight, theta)
    if source is None or other not in data:
        return None
    # A weight per batch entry is no shared layer, but one weight repeated for every entry is.
    repeated = source.positions.shape[0] == 1 or source.positions.stride(0) == 0
    if source.positions.dim() == 3 and (flipped or not repeated):
        return None
    return _linear(node, other, source, _added_bias(node, theta), sites, flipped=flipped)


def _linear(
    node: fx.Node, read: Any, weight: Source, bias: tuple[Source | None, float], sites: Any, *, flipped: bool
) -> Layer:
    positions = weight.positions[0] if weight.positions.dim() == 3 else weight.positions
    positions = positions.unsqueeze(-1) if positions.dim() == 1 else positions
    positions = positions.t() if flipped else positions
    fan_in, fan_out = positions.shape
    weight = Source(weight.piece, weight.scale, positions)
    return _make("linear", node, read, weight, bias, (fan_in, fan_out), fan_in, fan_out, sites, flipped=flipped)


def _make(
    kind: Literal["linear", "conv", "embedding"],
    node: fx.Node,
    read: Any,
    weight: Source,
    bias: tuple[Source | None, float],
    shape: tuple[int, ...],
    fan_in: int,
    fan_out: int,
    sites: Any,
    *,
    flipped: bool = False,
) -> Layer:
    added, factor = bias
    aligned = added is not None and added.positions.numel() == fan_out
    return Layer(
        kind,
        _name(weight.piece, sites),
        _extent(weight),
        None if added is None else added.piece,
        shape,
        fan_in,
        fan_out,
        weight.scale * factor,
        node.name,
        weight.positions,
        input=read.name,
        flipped=flipped,
        weight_scale=weight.scale,
        bias_positions=added.positions.reshape(-1) if added is not None and aligned else None,
        bias_scale=added.scale / factor if added is not None else 1.0,
    )


def _extent(weight: Source) -> slice:
    """The slice of theta that the entries fill, if they fill one; else the one they were taken from."""
    first, last = int(weight.positions.min()), int(weight.positions.max()) + 1
    return slice(first, last) if last - first == weight.positions.numel() else weight.piece


def _argument(node: fx.Node, at: int) -> Any:
    return node.args[at]


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _name(piece: slice, sites: Any) -> str:
    for site in sites:
        if site.start <= piece.start and piece.stop <= site.stop:
            return site.name
    return "?"


def _source(node: Any, theta: fx.Node) -> Source | None:
    """Part of theta a node holds up to reshaping and constant factors, those factors, and each entry's place."""
    scale, steps = 1.0, []
    while isinstance(node, fx.Node):
        piece = _slice(node, theta)
        if piece is not None:
            positions = torch.arange(piece.start, piece.stop)
            for step in reversed(steps):
                positions = step.target(positions, *step.args[1:], **step.kwargs)  # type: ignore[operator]
            return Source(piece, scale, positions)
        if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
            factor: Any = node.args[1]
            if isinstance(factor, fx.Node):
                return None
            divides = node.target in (aten.div.Tensor, aten.div.Scalar)
            scale = scale / float(factor) if divides else scale * float(factor)  # type: ignore[arg-type]
        elif node.target is aten.neg.default:
            scale = -scale
        elif node.target in _RESHAPES | _PARTS or node.target is operator.getitem:
            if node.target not in _COPIES:
                steps.append(node)
        else:
            return None
        node = node.args[0]
    return None


def _slice(node: fx.Node, theta: fx.Node) -> slice | None:
    """The slice of theta a node is, if it is one."""
    length = _value(theta).shape[0]
    if node is theta:
        return slice(0, length)
    if node.target is aten.slice.Tensor and node.args[0] is theta:
        start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
        stop = node.args[3] if len(node.args) > 3 and node.args[3] is not None else length
        return slice(int(start), min(int(stop), length))  # type: ignore[arg-type]
    if node.target is operator.getitem and node.args[0].target is aten.split_with_sizes.default:  # type: ignore[union-attr]
        split, position = node.args[0], node.args[1]
        if split.args[0] is theta:  # type: ignore[union-attr]
            sizes = split.args[1]  # type: ignore[union-attr]
            start = sum(sizes[:position])  # type: ignore[index,misc]
            return slice(start, start + sizes[position])  # type: ignore[index]
    return None


def _added_bias(node: fx.Node, theta: fx.Node) -> tuple[Source | None, float]:
    """Bias added to the product right after it, and the constant the product is multiplied with before that."""
    current, scale = node, 1.0
    while len(current.users) == 1:
        user = next(iter(current.users))
        if user.target is aten.add.Tensor:
            other = user.args[1] if user.args[0] is current else user.args[0]
            return _source(other, theta), scale
        constant = len(user.args) > 1 and not isinstance(user.args[1], fx.Node)
        if user.target is aten.div.Tensor and constant:
            scale /= float(_argument(user, 1))
        elif user.target is aten.mul.Tensor and constant:
            scale *= float(_argument(user, 1))
        elif user.target not in _RESHAPES:
            return None, scale
        current = user
    return None, scale
