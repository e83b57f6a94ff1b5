"""Permutations of dimensions in a recorded graph, moved past the arithmetic that reads them.

A wide matrix product leaves its result as (N, C, H), where the vectorised graph goes on with (C, N, H). Elementwise
arithmetic does not care; a compiler that is told the second order walks through memory in it, and copies twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from inference.layout import frozen_nodes, value_of

aten = torch.ops.aten


class Permuted(NamedTuple):
    """A node that equals ``source`` with its dimensions in the order ``order``."""

    source: fx.Node
    order: tuple[int, ...]


def sink_permutes(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Compute what follows some permutations in the order of dimensions from before them.

    Args:
        module: A recorded graph, changed in place.
        nodes: The permutations (``aten.permute``) to move.
    """
    graph, frozen = module.graph, frozen_nodes(module)
    chosen = set(nodes)
    known: dict[fx.Node, Permuted] = {}
    for node in list(graph.nodes):
        if node in frozen or node.op != "call_function" or value_of(node) is None:
            continue
        if not any(a in known for a in node.all_input_nodes):
            if node in chosen:
                source, order = node.args
                known[node] = Permuted(source, tuple(order))  # type: ignore[arg-type]
            continue
        with graph.inserting_before(node):
            found = _reordered(graph, node, known) or _summed(graph, node, known) or _elementwise(graph, node, known)
            if found is None:
                continue
            new = found.source if _identity(found.order) else _permute(graph, found.source, found.order)
        known[new] = found
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _reordered(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, Permuted]) -> Permuted | None:
    """A permutation of a permutation."""
    if node.args[0] not in known:
        return None
    source, order = known[node.args[0]]  # type: ignore[index]
    number = len(order)
    dims: Any = node.args[1:]
    if node.target is aten.permute.default:
        outer = [d % number for d in dims[0]]
    elif node.target is aten.transpose.int or node.target is aten.t.default:
        first, second = (d % number for d in (dims or (0, 1)))
        outer = list(range(number))
        outer[first], outer[second] = second, first
    else:
        return None
    return Permuted(source, tuple(order[d] for d in outer))


def _summed(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, Permuted]) -> Permuted | None:
    if node.target is not aten.sum.dim_IntList or node.args[0] not in known or not node.args[1]:
        return None
    source, order = known[node.args[0]]  # type: ignore[index]
    dims: Any = node.args[1]
    summed = [order[d] for d in dims]
    keep = len(node.args) > 2 and bool(node.args[2])
    kept = order if keep else tuple(d for d in order if d not in summed)
    ranks = {d: i for i, d in enumerate(sorted(kept))}
    after = tuple(ranks[d] for d in kept)
    new = graph.call_function(aten.sum.dim_IntList, (source, summed, keep), dict(node.kwargs))
    new.meta["val"] = node.meta["val"].permute(_inverse(after))
    return Permuted(new, after)


def _elementwise(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, Permuted]) -> Permuted | None:
    value: Tensor = node.meta["val"]
    orders = {known[a].order for a in node.all_input_nodes if a in known}
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or len(orders) != 1:
        return None
    if not all(isinstance(number, (int, float)) for number in node.kwargs.values()):
        return None
    order = orders.pop()
    if value.dim() != len(order) or not all(_usable(a, value) for a in node.args):
        return None
    inverse = _inverse(order)

    def before(arg: Any) -> Any:
        if arg in known:
            return known[arg].source
        small = value_of(arg)
        if small is None or small.dim() == 0:
            return arg
        if small.dim() < len(order):
            arg = graph.call_function(aten.reshape.default, (arg, [1] * (len(order) - small.dim()) + list(small.shape)))
            arg.meta["val"] = small.reshape([1] * (len(order) - small.dim()) + list(small.shape))
        return _permute(graph, arg, inverse)

    new = graph.call_function(node.target, tuple(before(a) for a in node.args), dict(node.kwargs))  # type: ignore[arg-type]
    new.meta["val"] = value.permute(inverse)
    return Permuted(new, order)


def _usable(arg: Any, out: Tensor) -> bool:
    """Whether an argument is a number, or a tensor that broadcasting alone brings to the shape of the result."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, (int, float, bool)) or arg is None
    value = value_of(arg)
    return value is not None and value.dim() <= out.dim()


def _permute(graph: fx.Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    new = graph.call_function(aten.permute.default, (node, list(order)))
    new.meta["val"] = node.meta["val"].permute(list(order))
    return new


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _identity(order: Sequence[int]) -> bool:
    return list(order) == list(range(len(order)))
