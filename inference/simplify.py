"""Make a recorded graph smaller without changing what it computes: fold constants, drop identities, merge repeats.

Pyro's distributions recompute their constants at every call (the log of a fixed scale, a Jacobian of zero); recorded
once, they need not be computed again. On an 8-50-1 network this halves the operations of a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Their value depends on the shape of their argument alone.
_FILLED = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
}
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.lift_fresh_copy.default,
}
_NEUTRAL = {
    aten.mul.Tensor: 1.0,
    aten.mul.Scalar: 1.0,
    aten.div.Tensor: 1.0,
    aten.div.Scalar: 1.0,
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
}
_COMMUTATIVE = {aten.mul.Tensor, aten.add.Tensor}
# A constant of many different elements is kept as it is stored; this bounds what is made just to be looked at.
_MAX_FOLDED = 1_000_000


def simplify(module: fx.GraphModule) -> None:
    """Simplify a graph in place.

    Args:
        module: Functional graph recorded by ``make_fx``.
    """
    for _ in range(3):
        _fold_constants(module)
        _drop_identities(module)
        _merge_affine(module.graph)
        _merge_repeats(module.graph)
    _drop_unused_constants(module)
    module.graph.lint()
    module.recompile()


def _fold_constants(module: fx.GraphModule) -> None:
    """Evaluate every node that depends on constants alone, and keep the results that others use."""
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if isinstance(value, Tensor):
                values[node] = value
        elif node.op == "call_function" and _foldable(node, values):
            values[node] = _evaluate(node, values)
    for node, value in values.items():
        used = [u for u in node.users if u not in values]
        if node.op == "get_attr" or not used or not isinstance(value, Tensor):
            continue
        name = _free_name(module)
        module.register_buffer(name, value)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta["val"] = value
        node.replace_all_uses_with(constant)


def _foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if any(_mutates(u) for u in node.users) or _mutates(node):
        return False
    out = node.meta.get("val")
    if node.target in _FILLED:
        return isinstance(out, Tensor)
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if isinstance(out, Tensor) and out.numel() > _MAX_FOLDED:
        return False
    return all(a in values for a in node.all_input_nodes)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    out = node.meta.get("val")
    if node.target in _FILLED:
        filled = torch.full((), _FILLED[node.target], dtype=out.dtype, device=out.device)
        return filled.expand(out.shape)
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    return node.target(*args, **kwargs)


def _drop_identities(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if _mutates(node) or any(_mutates(u) for u in node.users):
            continue
        _scalar_operand(module, node)
        same = _same_as(module, node)
        if same is not None:
            node.replace_all_uses_with(same)
        elif node.target is aten.sum.default and _source_of_total(node) is not node.args[0]:
            node.args = (_source_of_total(node),)
        elif node.target is aten.sum.dim_IntList and _sums_nothing(node):
            shape = list(node.meta["val"].shape)
            with module.graph.inserting_before(node):
                view = module.graph.call_function(aten.view.default, (node.args[0], shape))
            view.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(view)
    module.graph.eliminate_dead_code()


def _scalar_operand(module: fx.GraphModule, node: fx.Node) -> None:
    """Write a constant tensor of equal elements as a number where broadcasting does not need it."""
    if node.target not in _NEUTRAL or node.kwargs:
        return
    args = list(node.args)
    if node.target in _COMMUTATIVE and _uniform(module, args[0]) is not None:
        args = args[::-1]
    number = _uniform(module, args[1])
    if number is None or not isinstance(args[0], fx.Node) or not isinstance(args[1], fx.Node):
        return
    out, first = node.meta["val"], args[0].meta.get("val")
    if isinstance(first, Tensor) and first.shape == out.shape and first.dtype == out.dtype and out.is_floating_point():
        node.args = (args[0], number)


def _same_as(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The input that a node returns unchanged, if it does."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    value, out = source.meta["val"], node.meta["val"]
    if node.target in _RESHAPES:
        earlier = source
        while earlier.target in _RESHAPES and isinstance(earlier.args[0], fx.Node):
            earlier = earlier.args[0]
            if earlier.meta["val"].shape == out.shape:
                return earlier
    if value.shape != out.shape or value.dtype != out.dtype:
        return None
    if node.target in (aten.permute.default, aten.transpose.int):
        return source if _order(node) == list(range(value.dim())) else None
    if node.target in _VIEWS:
        return source if value.stride() == out.stride() else None
    if node.target in _NEUTRAL and not node.kwargs:
        number = node.args[1] if isinstance(node.args[1], (int, float)) else _uniform(module, node.args[1])
        return source if number == _NEUTRAL[node.target] else None
    return None


def _order(node: fx.Node) -> list[int]:
    """Order in which a permutation takes its argument's dimensions (the recorded strides may be stale)."""
    dims = list(range(node.args[0].meta["val"].dim()))  # type: ignore[union-attr]
    if node.target is aten.permute.default:
        return [dims[int(d)] for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    first, second = dims[int(node.args[1])], dims[int(node.args[2])]  # type: ignore[arg-type]
    dims[first], dims[second] = second, first
    return dims


def _merge_repeats(graph: fx.Graph) -> None:
    """Compute equal expressions once (PyTorch's own pass imports all of Inductor, 1.7 s in every process)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or _mutates(node) or any(_mutates(u) for u in node.users):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        # repr tells 1 from 1.0 and True, which hash alike
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _merge_affine(graph: fx.Graph) -> None:
    """Join chains of a x + b with numbers a and b, and move them past reshapes and sums, where there is less to do."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or not node.args:
            continue
        source = node.args[0]
        inner = _affine(source) if isinstance(source, fx.Node) and len(source.users) == 1 else None
        if inner is None:
            continue
        outer = _affine(node)
        if outer is not None:
            new = _apply(graph, node, inner[0], outer[1] * inner[1], outer[1] * inner[2] + outer[2])
        elif node.target in _RESHAPES or node.target is aten.sum.dim_IntList or node.target is aten.sum.default:
            new = _moved(graph, node, inner)
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _affine(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """Source, factor and offset of a node that computes a x + b of one floating tensor with numbers a and b."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point() or node.kwargs:
        return None
    first = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(first, Tensor) or first.dtype != value.dtype:
        return None
    if node.target is aten.neg.default:
        return node.args[0], -1.0, 0.0
    number = node.args[1] if len(node.args) == 2 else None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return node.args[0], float(number), 0.0
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return node.args[0], 1.0 / number, 0.0
    if node.target in (aten.add.Tensor, aten.add.Scalar):
        return node.args[0], 1.0, float(number)
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        return node.args[0], 1.0, -float(number)
    return None


def _apply(graph: fx.Graph, before: fx.Node, source: fx.Node, factor: float, offset: float) -> fx.Node:
    """Insert factor * source + offset."""
    new = source
    with graph.inserting_before(before):
        for target, number, neutral in ((aten.mul.Tensor, factor, 1.0), (aten.add.Tensor, offset, 0.0)):
            if number != neutral:
                new = graph.call_function(target, (new, number))
                new.meta["val"] = source.meta["val"]
    return new


def _moved(graph: fx.Graph, node: fx.Node, inner: tuple[fx.Node, float, float]) -> fx.Node:
    """The reshape or sum of x first, then a x + b of the result (b counted once per summed element)."""
    source, factor, offset = inner
    value, out = source.meta["val"], node.meta["val"]
    with graph.inserting_before(node):
        new = graph.call_function(node.target, (source, *node.args[1:]), node.kwargs)
    new.meta["val"] = out
    summed = value.numel() // max(out.numel(), 1) if node.target not in _RESHAPES else 1
    return _apply(graph, node, new, factor, offset * summed)


def _uniform(module: fx.GraphModule, node: Any) -> float | None:
    """The one value of a constant tensor, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = getattr(module, node.target)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return None
    first = float(value.reshape(-1)[0])
    return first if math.isfinite(first) and bool((value == first).all()) else None


def _source_of_total(node: fx.Node) -> Any:
    """What a total sums, before reshapes and partial sums that do not change it."""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in _RESHAPES | {aten.sum.dim_IntList, aten.expand.default}:
        before = source.args[0]
        if source.target is aten.expand.default and source.meta["val"].numel() != before.meta["val"].numel():  # type: ignore[union-attr]
            break
        source = before
    return source


def _sums_nothing(node: fx.Node) -> bool:
    dims = node.args[1]
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return bool(dims) and all(shape[d] == 1 for d in dims)  # type: ignore[union-attr,index]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _free_name(module: fx.GraphModule) -> str:
    index = 0
    while hasattr(module, f"_folded{index}"):
        index += 1
    return f"_folded{index}"


def _drop_unused_constants(module: fx.GraphModule) -> None:
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_buffers()]:
        if name not in used:
            delattr(module, name)


