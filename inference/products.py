r"""Matrix products of a recorded graph, arranged for a CPU.

Vectorising a network over C thetas turns every product with the data into C products with the same matrix. They are
one product with C times as many rows:

.. math:: (W_c X^\top)_{c=1..C} = [W_1; \dots; W_C]\, X^\top, \qquad
    (G_c X)_{c=1..C}^\top = X^\top [G_1; \dots; G_C]^\top.

Every result is stored with its longer side along memory, as a rule the data: what follows is then elementwise
arithmetic over long rows, whatever the width of a layer, and tall narrow results, at which BLAS is slow, do not occur.
Results of one column are sums of products, and products over one element are outer products, where no BLAS routine for
them pays. The rounding of sums may change, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from inference.layout import frozen_nodes, value_of
from inference.permutes import sink_permutes

aten = torch.ops.aten


def arrange_products(module: fx.GraphModule, flat: list[Any], *, fused: bool = False) -> None:
    """Rewrite the matrix products of a graph in place, for a CPU; other devices are left alone.

    Args:
        module: A recorded and simplified graph; layouts of intermediates may change.
        flat: Example arguments.
        fused: Also write products with vectors as elementwise arithmetic, for a compiler that fuses it with what stands
            before and after.
    """
    graph, frozen = module.graph, frozen_nodes(module)
    before = [_strides(out) for out in _outputs(graph)]
    changed, permuted = False, []
    for node in list(graph.nodes):
        value = value_of(node)
        if node.op != "call_function" or node in frozen or value is None or value.device.type != "cpu":
            continue
        operands = [value_of(a) for a in node.all_input_nodes]
        if node.target not in _REWRITES or node.kwargs or value.numel() == 0 or any(v is None for v in operands):
            continue
        with graph.inserting_before(node):
            new = _REWRITES[node.target](_Builder(graph, fused), *node.args)
        if new is None:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        changed = True
        if new.target is aten.permute.default:
            permuted.append(new)
    if changed:
        sink_permutes(module, permuted)
        _restore_layouts(module, flat, before)
        graph.lint()
        module.recompile()


class _Builder:
    """Adds operations to a graph, with the shapes of their results."""

    def __init__(self, graph: fx.Graph, fused: bool) -> None:
        self.graph = graph
        self.fused = fused

    def __call__(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*(_shape(a) if isinstance(a, fx.Node) else a for a in args))
        return node

    def swapped(self, node: fx.Node) -> fx.Node:
        """A matrix, or every matrix of a batch, transposed."""
        number = node.meta["val"].dim()
        if node.target is aten.t.default and number == 2:
            return node.args[0]  # type: ignore[return-value]
        if node.target is aten.transpose.int and {d % number for d in node.args[1:]} == {number - 2, number - 1}:
            return node.args[0]  # type: ignore[return-value]
        return self(aten.permute.default, node, [*range(number - 2), number - 1, number - 2])


def _matrix_product(build: _Builder, a: fx.Node, b: fx.Node) -> fx.Node | None:
    (rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[1]
    if inner == 1 or (build.fused and 1 in (rows, columns)):
        return _by_elements(build, a, b)
    if rows > columns:
        return build(aten.permute.default, build(aten.mm.default, build.swapped(b), build.swapped(a)), [1, 0])
    return None


def _affine_product(build: _Builder, bias: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node | None:
    product = _matrix_product(build, a, b)
    return None if product is None else build(aten.add.Tensor, bias, product)


def _batched_product(build: _Builder, a: fx.Node, b: fx.Node) -> fx.Node | None:
    (num, rows, inner), columns = a.meta["val"].shape, b.meta["val"].shape[2]
    if inner == 1 or 1 in (rows, columns):
        return _by_elements(build, a, b)
    if num == 1:
        return None
    if _shared(a.meta["val"]) and not _shared(b.meta["val"]):
        swapped = _wide_product(build, build.swapped(b), a, rows, transposed=True)
        return build(aten.permute.default, swapped, [0, 2, 1])
    if _shared(b.meta["val"]):
        return _wide_product(build, a, b, columns, transposed=False)
    if rows > columns:
        return build(aten.permute.default, build(aten.bmm.default, build.swapped(b), build.swapped(a)), [0, 2, 1])
    return None


def _wide_product(build: _Builder, batch: fx.Node, shared: fx.Node, columns: int, *, transposed: bool) -> fx.Node:
    """Matrices (C, M, K) times one (K, N), given as (C, K, N), or transposed as (C, N, K); the result is (C, M, N)."""
    num, rows, inner = batch.meta["val"].shape
    matrix = build(aten.select.int, shared, 0, 0)
    tall = build(aten.reshape.default, batch, [num * rows, inner])
    if columns >= rows:
        right = build(aten.t.default, matrix) if transposed else matrix
        return build(aten.view.default, build(aten.mm.default, tall, right), [num, rows, columns])
    left = matrix if transposed else build(aten.t.default, matrix)
    product = build(aten.mm.default, left, build(aten.t.default, tall))
    return build(aten.permute.default, build(aten.view.default, product, [columns, num, rows]), [1, 2, 0])


def _by_elements(build: _Builder, a: fx.Node, b: fx.Node) -> fx.Node:
    left, right = a.meta["val"], b.meta["val"]
    number = left.dim()
    if left.shape[-1] == 1:
        return build(aten.mul.Tensor, a, b)
    if right.shape[-1] == 1:
        return build(aten.sum.dim_IntList, build(aten.mul.Tensor, a, build.swapped(b)), [number - 1], True)
    return build(aten.sum.dim_IntList, build(aten.mul.Tensor, build.swapped(a), b), [number - 2], True)


_REWRITES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.mm.default: _matrix_product,
    aten.addmm.default: _affine_product,
    aten.bmm.default: _batched_product,
}


def _shape(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _shared(value: Tensor) -> bool:
    """Whether all matrices of a batch are one in memory."""
    return value.stride(0) == 0


def _outputs(graph: fx.Graph) -> list[Any]:
    return list(next(n for n in graph.nodes if n.op == "output").args[0])  # type: ignore[arg-type]


def _strides(node: Any) -> tuple[int, ...] | None:
    value = value_of(node)
    return None if value is None else value.stride()


class _Layouts(fx.Interpreter):
    """Runs a graph and notes the layout of every result; not on fake tensors, as indexing by a mask needs values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.mode = FakeTensorMode()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            with self.mode:
                n.meta["val"] = pytree.tree_map_only(Tensor, _empty, result)
        return result


def _empty(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _restore_layouts(module: fx.GraphModule, flat: list[Any], before: list[tuple[int, ...] | None]) -> None:
    """Make views of changed layouts possible, note the new layouts, and give the results their old ones back."""
    graph = module.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    _Layouts(module).run(*flat)
    output = next(n for n in graph.nodes if n.op == "output")
    outs = _outputs(graph)
    for i, (out, strides) in enumerate(zip(outs, before, strict=True)):
        if strides is not None and _strides(out) != strides:
            with graph.inserting_before(output):
                outs[i] = graph.call_function(aten.clone.default, (out,), {"memory_format": torch.contiguous_format})
            outs[i].meta["val"] = out.meta["val"].new_empty(out.meta["val"].shape)
    output.args = (outs,)
