"""Arithmetic with numbers in a recorded graph: chains of a x + b become one, and move past reshapes and sums.

Only where rounding is no worse than before. ``(x - 2000) * 0.1`` is not written as ``0.1 x - 200``: the subtraction may
be exact and the difference small, and then the second form has lost its digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from inference.layout import RESHAPES, is_dense, same_layout, value_of

aten = torch.ops.aten

_SUMS = {aten.sum.default, aten.sum.dim_IntList}
# Offsets up to this size (normalising constants of log densities) may change place: it costs at most as many units of
# relative rounding error per element, in nats.
_SMALL = 16.0


class Affine(NamedTuple):
    """A node that computes factor * source + offset."""

    source: fx.Node
    factor: float
    offset: float


def merge_affine(graph: fx.Graph, frozen: set[fx.Node]) -> None:
    """Join chains of a x + b with numbers a and b, and move them past reshapes and sums, where there is less to do.

    Args:
        graph: The graph, changed in place.
        frozen: Nodes to leave alone.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node in frozen or value_of(node) is None or not node.args:
            continue
        new = _joined(graph, node, frozen)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _joined(graph: fx.Graph, node: fx.Node, frozen: set[fx.Node]) -> fx.Node | None:
    if node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
        return _added(graph, node, frozen)
    inner = _single(node.args[0], frozen)
    if inner is None:
        return None
    if node.target in RESHAPES or node.target in _SUMS:
        return _moved(graph, node, inner)
    outer = affine(node)
    if outer is None or not _harmless(inner, outer):
        return None
    factor, offset = outer.factor * inner.factor, outer.factor * inner.offset + outer.offset
    if not _fits(node.meta["val"], factor, offset) or not same_layout(
        value_of(inner.source), node.meta["val"], through_arithmetic=True
    ):
        return None
    return _apply(graph, node, inner.source, factor, offset)


def affine(node: Any) -> Affine | None:
    """Read a node as a x + b of one floating tensor with finite numbers a and b.

    Args:
        node: Any node.

    Returns:
        Its parts, or None.
    """
    out = value_of(node)
    if out is None or node.op != "call_function" or not out.is_floating_point() or node.kwargs or not node.args:
        return None
    first = value_of(node.args[0])
    if first is None or first.dtype != out.dtype or first.shape != out.shape:
        return None
    source = node.args[0]
    if node.target is aten.neg.default:
        return Affine(source, -1.0, 0.0)
    number = node.args[1] if len(node.args) == 2 else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return Affine(source, float(number), 0.0)
    if node.target in (aten.div.Tensor, aten.div.Scalar) and number != 0 and math.isfinite(1.0 / number):
        return Affine(source, 1.0 / number, 0.0)
    if node.target in (aten.add.Tensor, aten.add.Scalar):
        return Affine(source, 1.0, float(number))
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        return Affine(source, 1.0, -float(number))
    return None


def uniform(module: fx.GraphModule, node: Any) -> float | None:
    """The one finite value of a constant floating tensor, or None.

    Args:
        module: Holds the constants.
        node: Any node or argument.

    Returns:
        The value, if there is one.
    """
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = getattr(module, str(node.target))
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return None
    first = float(value.reshape(-1)[0])
    return first if math.isfinite(first) and bool((value == first).all()) else None


def _single(node: Any, frozen: set[fx.Node]) -> Affine | None:
    """An affine node that nobody else reads, so that it disappears once it is joined."""
    if not isinstance(node, fx.Node) or node in frozen or len(node.users) != 1:
        return None
    found = affine(node)
    return None if found is None or found.source in frozen else found


def _exact(number: float) -> bool:
    """Whether multiplying by a number rounds nothing."""
    return math.frexp(abs(number))[0] == 0.5


def _harmless(inner: Affine, outer: Affine) -> bool:
    """Whether joining rounds no worse: the product was rounded before, or nothing that cancels is moved."""
    if inner.offset == 0 or not _exact(inner.factor):
        return True
    if outer.offset == 0:
        return _exact(outer.factor)
    return _exact(outer.factor) and (
        abs(outer.offset) >= abs(outer.factor * inner.offset) or max(abs(inner.offset), abs(outer.offset)) <= _SMALL
    )


def _fits(value: Tensor, *numbers: float) -> bool:
    limits = torch.finfo(value.dtype)
    return all(n == 0 or limits.tiny <= abs(n) <= limits.max for n in numbers)


def _apply(graph: fx.Graph, before: fx.Node, source: fx.Node, factor: float, offset: float) -> fx.Node | None:
    """Insert factor * source + offset, laid out as ``before``; None if nothing would be left that owns its memory."""
    new = source
    with graph.inserting_before(before):
        for target, number, neutral in ((aten.mul.Tensor, factor, 1.0), (aten.add.Tensor, offset, 0.0)):
            if number != neutral:
                new = graph.call_function(target, (new, number))
                new.meta["val"] = before.meta["val"]
    return new


def _moved(graph: fx.Graph, node: fx.Node, inner: Affine) -> fx.Node | None:
    """The reshape or sum of x first, then a x + b of the result (b counted once per summed element)."""
    value, before, out = value_of(inner.source), value_of(node.args[0]), node.meta["val"]
    if value is None or node.kwargs or out.dtype != value.dtype or not same_layout(value, before) or not is_dense(out):
        return None
    count = 1
    if node.target in _SUMS:
        if inner.offset != 0 and _exact(inner.factor) and abs(inner.offset) > _SMALL:
            return None
        count = value.numel() // max(out.numel(), 1)
    if not _fits(out, inner.factor, inner.offset * count):
        return None
    with graph.inserting_before(node):
        new = graph.call_function(node.target, (inner.source, *node.args[1:]))  # type: ignore[arg-type]
    new.meta["val"] = out
    return _apply(graph, node, new, inner.factor, inner.offset * count)


def _added(graph: fx.Graph, node: fx.Node, frozen: set[fx.Node]) -> fx.Node | None:
    """Totals: (a x + b) + (a y + c) as a (x + y) + (b + c), and x + a y as one addition."""
    out, (left, right) = node.meta["val"], node.args
    if value_of(left) is None or value_of(right) is None or left is right or out.dim() > 1:
        return None
    if not same_layout(value_of(left), out) or not same_layout(value_of(right), out):
        return None
    first, second = (_single(n, frozen) or Affine(n, 1.0, 0.0) for n in (left, right))  # type: ignore[arg-type]
    if (first.offset and not _is_total(first.source)) or (second.offset and not _is_total(second.source)):
        return None
    if first.factor != second.factor and not first.offset and not second.offset:
        return None
    if first.factor == second.factor == 1.0 and not first.offset and not second.offset:
        return None
    offset = first.offset + second.offset
    if not _fits(out, offset):
        return None
    with graph.inserting_before(node):
        if first.factor == second.factor:
            total = graph.call_function(aten.add.Tensor, (first.source, second.source))
            total.meta["val"] = out
            return _apply(graph, node, total, first.factor, offset)
        scaled = [_apply(graph, node, a.source, a.factor, 0.0) for a in (first, second)]
        total = graph.call_function(aten.add.Tensor, tuple(scaled))
        total.meta["val"] = out
        return _apply(graph, node, total, 1.0, offset)


def _is_total(node: fx.Node) -> bool:
    """Whether a scalar is a sum of many terms, so that a constant's place in it does not matter."""
    if node.target in _SUMS:
        return True
    pair = node.target is aten.add.Tensor and all(isinstance(a, fx.Node) for a in node.args)
    return pair and all(_is_total(a) for a in node.args)  # type: ignore[arg-type]
