"""What a recorded graph says about memory: layouts, who shares storage with whom, and what is written into."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Operations that give the same elements in the same order another shape.
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
}

# Views whose schemas do not say so.
_UNDECLARED_VIEWS = {operator.getitem, aten._unsafe_view.default, aten.reshape.default}


def value_of(node: Any) -> Tensor | None:
    """Shape, strides, dtype and device of what a node holds; None if that is not one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_layout(first: Tensor | None, second: Tensor | None, *, through_arithmetic: bool = False) -> bool:
    """Whether two tensors agree in shape, dtype, device and strides, so that one may stand for the other in any view.

    Args:
        first: A tensor.
        second: Another.
        through_arithmetic: Ask it of elementwise arithmetic on ``first`` instead of ``first`` itself, which keeps
            strides only where memory is dense.

    Returns:
        The answer; False if either is None.
    """
    if first is None or second is None:
        return False
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    if through_arithmetic and not is_dense(first):
        return False
    strides = zip(first.shape, first.stride(), second.stride(), strict=True)
    return first.numel() == 0 or all(a == b for size, a, b in strides if size != 1)


def is_dense(value: Tensor) -> bool:
    """Whether elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(value.stride(), value.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def is_view(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its arguments."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    declared = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return declared or node.target in _UNDECLARED_VIEWS


def alias_root(node: Any) -> fx.Node | None:
    """The node whose memory a result lies in."""
    while isinstance(node, fx.Node) and is_view(node):
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) else None


def frozen_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose place in the order matters: they share memory with something that is written into, or read it.

    Args:
        module: Any recorded graph.

    Returns:
        The nodes that must be left alone; empty for a graph without in-place operations.
    """
    graph = module.graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    writing = {n for n in calls if mutates(n) or n.target is aten.as_strided.default}
    if not writing:
        return set()
    groups: dict[fx.Node, set[fx.Node]] = {n: {n} for n in graph.nodes}
    holders: dict[int, fx.Node] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes if is_view(node) or node in writing else []
        constant = getattr(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(constant, Tensor):  # recorded once per use: several names for one memory
            sources = [holders.setdefault(constant.untyped_storage().data_ptr(), node)]
        for source in sources:
            merged = groups[node] | groups[source]
            for member in merged:
                groups[member] = merged
    touched = set().union(*(groups[n] for n in writing))
    return touched | {user for node in touched for user in node.users if user.op != "output"}
