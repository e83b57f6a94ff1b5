"""Make a recorded graph smaller without changing what it computes: fold constants, drop identities, merge repeats.

Pyro's distributions recompute their constants at every call (the log of a fixed scale, a Jacobian of zero); recorded
once, they need not be computed again. On an 8-50-1 network this halves the operations of a gradient.

Three things stay as they were recorded: the memory layout of every value that something else may view, the order of
everything that touches memory which the graph writes into, and that results are the caller's to keep and to change.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from inference.affine import merge_affine, uniform
from inference.layout import RESHAPES, alias_root, frozen_nodes, mutates, same_layout, value_of

aten = torch.ops.aten

# Their value depends on the shape of their argument alone.
_FILLED = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
}
# They return their first argument unchanged if shape, layout and dtype say so.
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
}
_NEUTRAL = {
    aten.mul.Tensor: 1.0,
    aten.mul.Scalar: 1.0,
    aten.div.Tensor: 1.0,
    aten.div.Scalar: 1.0,
    aten.add.Tensor: 0.0,
    aten.add.Scalar: 0.0,
    aten.sub.Tensor: 0.0,
    aten.sub.Scalar: 0.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
_COMMUTATIVE = {aten.mul.Tensor, aten.add.Tensor}
_BROADCASTING = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
# A constant of many different elements is kept as it is stored; this bounds what is made just to be looked at.
_MAX_FOLDED = 1_000_000


def simplify(module: fx.GraphModule) -> None:
    """Simplify a graph in place.

    Args:
        module: Graph recorded by ``make_fx``.
    """
    roots = [alias_root(out) for out in _outputs(module.graph)]
    for _ in range(3):
        _fold_constants(module)
        _drop_identities(module)
        merge_affine(module.graph, frozen_nodes(module))
        _merge_repeats(module)
    _own_outputs(module.graph, roots)
    _drop_unused_constants(module)
    module.graph.lint()
    module.recompile()


def _fold_constants(module: fx.GraphModule) -> None:
    """Evaluate every node that depends on constants alone, and keep the results that others use."""
    graph, frozen = module.graph, frozen_nodes(module)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in frozen:
            continue
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
        node.replace_all_uses_with(_constant(module, value, node))
    graph.eliminate_dead_code()


def _foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    out = value_of(node)
    if node.target in _FILLED:
        return out is not None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return False
    if out is not None and out.numel() > _MAX_FOLDED:
        return False
    return all(a in values for a in node.all_input_nodes)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    target: Any = node.target
    if target in _FILLED:
        out: Tensor = node.meta["val"]
        return torch.full((), _FILLED[target], dtype=out.dtype, device=out.device).expand(out.shape)
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return target(*args, **kwargs)


def _drop_identities(module: fx.GraphModule) -> None:
    graph, frozen = module.graph, frozen_nodes(module)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in frozen or value_of(node) is None:
            continue
        _scalar_operand(module, node)
        _unexpanded_operands(node, frozen)
        same = _same_as(module, node, frozen)
        if same is not None:
            node.replace_all_uses_with(same)
        elif (number := _scattered_total(module, node, frozen)) is not None:
            value: Tensor = node.meta["val"]
            filled = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            node.replace_all_uses_with(_constant(module, filled.fill_(number), node))
        elif node.target is aten.sum.default:
            node.args = (_source_of_total(node, frozen), *node.args[1:])
        elif node.target is aten.sum.dim_IntList and _sums_nothing(node):
            with graph.inserting_before(node):
                view = graph.call_function(aten.view.default, (node.args[0], list(node.meta["val"].shape)))
            view.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(view)
    graph.eliminate_dead_code()


def _scalar_operand(module: fx.GraphModule, node: fx.Node) -> None:
    """Write a constant tensor of equal elements as a number where broadcasting does not need it."""
    if node.target not in _BROADCASTING or node.kwargs or len(node.args) != 2:
        return
    args = list(node.args)
    if node.target in _COMMUTATIVE and uniform(module, args[0]) is not None:
        args = args[::-1]
    first, number = value_of(args[0]), uniform(module, args[1])
    # A number leaves shape, layout and dtype of the other operand as they are; so must the tensor have done.
    unchanged = same_layout(first, node.meta["val"], through_arithmetic=True)
    if number is not None and unchanged and node.meta["val"].is_floating_point():
        node.args = (args[0], number)


def _unexpanded_operands(node: fx.Node, frozen: set[fx.Node]) -> None:
    """Leave broadcasting to the arithmetic where one operand was expanded to the shape of the other."""
    if node.target not in _BROADCASTING or len(node.args) != 2:
        return
    args = list(node.args)
    for i in (0, 1):
        expanded, other = args[i], value_of(args[1 - i])
        if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default or expanded in frozen:
            continue
        alike = other is not None and other.dtype == node.meta["val"].dtype == expanded.meta["val"].dtype
        if alike and same_layout(other, node.meta["val"], through_arithmetic=True):
            args[i] = expanded.args[0]
            node.args = tuple(args)
            return


def _same_as(module: fx.GraphModule, node: fx.Node, frozen: set[fx.Node]) -> fx.Node | None:
    """The earlier value that a node returns unchanged, if it does."""
    source: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default and len(source) == 1:
        return _if_alike(source[0], node)
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0 and source.target in _SPLITS:
        return _if_alike(source.args[0], node)
    if node.target is aten.where.self:
        return _if_alike(_chosen(module, node), node)
    if source not in frozen:
        undone = source.target is node.target and source.args[1:] == node.args[1:]
        if node.target in (aten.t.default, aten.transpose.int) and undone:
            return _if_alike(source.args[0], node)
        if node.target is aten.log.default and source.target is aten.exp.default:
            return _if_alike(source.args[0], node)
        if node.target is aten.slice.Tensor and source.target is aten.expand.default:
            return _if_alike(source.args[0], node)  # of what was expanded nothing is missing if the shape is the same
        if node.target in RESHAPES:
            return _if_alike(source, node) or _before_reshapes(source, node, frozen)
    if node.target in _VIEWS:
        return _if_alike(source, node)
    neutral = _NEUTRAL.get(node.target)  # type: ignore[arg-type]
    if neutral is not None and not node.kwargs and len(node.args) == 2:
        number = node.args[1] if isinstance(node.args[1], (int, float)) else uniform(module, node.args[1])
        return _if_alike(source, node) if number == neutral else None
    return None


def _if_alike(source: Any, node: fx.Node) -> fx.Node | None:
    return source if same_layout(value_of(source), value_of(node)) else None


def _before_reshapes(source: Any, node: fx.Node, frozen: set[fx.Node]) -> fx.Node | None:
    while source.target in RESHAPES and source not in frozen:
        source = source.args[0]
        if _if_alike(source, node):
            return source
    return None


def _chosen(module: fx.GraphModule, node: fx.Node) -> Any:
    """The branch that ``where`` takes everywhere, if its condition is constant."""
    condition, if_true, if_false = node.args
    if not isinstance(condition, fx.Node) or condition.op != "get_attr":
        return None
    value = getattr(module, str(condition.target))
    return if_true if bool(value.all()) else None if bool(value.any()) else if_false


def _merge_repeats(module: fx.GraphModule) -> None:
    """Compute equal expressions once (PyTorch's own pass imports all of Inductor, 1.7 s in every process)."""
    graph, frozen = module.graph, frozen_nodes(module)
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or node in frozen or mutates(node):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        # repr tells 1 from 1.0 and True, which hash alike
        held = id(getattr(module, str(node.target))) if node.op == "get_attr" else node.target
        key = (node.op, held, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _source_of_total(node: fx.Node, frozen: set[fx.Node]) -> Any:
    """What a total sums, before reshapes and partial sums that do not change it."""
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source not in frozen:
        before, out = source.args[0] if source.args else None, value_of(source)
        earlier = value_of(before)
        if earlier is None or out is None or earlier.dtype != out.dtype:
            break
        if source.target is aten.sum.dim_IntList and (source.kwargs or not out.is_floating_point()):
            break
        same_count = source.target in RESHAPES or source.target is aten.expand.default
        if source.target is not aten.sum.dim_IntList and not (same_count and out.numel() == earlier.numel()):
            break
        source = before
    return source


def _scattered_total(module: fx.GraphModule, node: fx.Node, frozen: set[fx.Node]) -> float | None:
    """The number that a sum finds in every row, if one was scattered into each: the gradient of log p of a class."""
    source: Any = node.args[0] if node.target is aten.sum.dim_IntList and not node.kwargs else None
    if not isinstance(source, fx.Node) or source.target is not aten.scatter_add.default or source in frozen:
        return None
    zeros, dim, places, numbers = source.args
    rows, index = value_of(zeros), value_of(places)
    if rows is None or index is None or uniform(module, zeros) != 0:
        return None
    expected = list(rows.shape)
    expected[dim] = 1  # type: ignore[index]
    summed: Any = node.args[1]
    once = list(index.shape) == expected and [d % rows.dim() for d in summed] == [dim % rows.dim()]  # type: ignore[operator]
    return uniform(module, numbers) if once else None


def _sums_nothing(node: fx.Node) -> bool:
    """Whether a sum runs over dimensions of size one only and a view gives its result."""
    dims: Any = node.args[1]
    value, out = value_of(node.args[0]), node.meta["val"]
    if not dims or node.kwargs or value is None or value.dtype != out.dtype:
        return False
    if any(value.shape[d] != 1 for d in dims):
        return False
    strides = [s for s, n in zip(value.stride(), value.shape, strict=True) if n != 1]
    return strides == [s for s, n in zip(out.stride(), out.shape, strict=True) if n != 1]


def _outputs(graph: fx.Graph) -> list[Any]:
    return list(next(n for n in graph.nodes if n.op == "output").args[0])  # type: ignore[arg-type]


def _own_outputs(graph: fx.Graph, roots: list[fx.Node | None]) -> None:
    """Copy results that have become a constant, an argument or one another, so that callers may write into them."""
    output = next(n for n in graph.nodes if n.op == "output")
    outs = _outputs(graph)
    taken: dict[fx.Node, fx.Node | None] = {}
    for i, (out, before) in enumerate(zip(outs, roots, strict=True)):
        after = alias_root(out)
        if after is None:
            continue
        outside = after.op != "call_function" and (before is None or before.op == "call_function")
        shared = after in taken and taken[after] is not before
        taken.setdefault(after, before)
        if outside or shared:
            with graph.inserting_before(output):
                outs[i] = graph.call_function(aten.clone.default, (out,))
            outs[i].meta["val"] = out.meta["val"]
    output.args = (outs,)


def _constant(module: fx.GraphModule, value: Tensor, node: fx.Node) -> fx.Node:
    """A new constant that can stand for a node."""
    name = _free_name(module)
    module.register_buffer(name, value)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta["val"] = node.meta["val"]
    return constant


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
