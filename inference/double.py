"""Recorded graphs with float64 in them, where differences of energies matter.

:func:`in_double` is the float64 twin of a float32 target, for finding modes; :func:`with_precise_prior` adds up the
terms of a log prior in float64 and leaves the rest as it is, for sampling; :func:`prior_in_double` is the prior alone.

In float32 a line search ends where rising and falling are rounding error. The model is not run again: its graph is
replayed with wider numbers. Constants keep the value they have in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inference.data import Tree, map_tree
from inference.hessians import prior_alone, prior_graph
from inference.programs import Programs
from inference.target import Target


def in_double(target: Target) -> Target:
    """A target with the same density computed in float64; itself where it is already, or where the device has none.

    Args:
        target: The target.

    Returns:
        Target whose theta, x and y are float64. Only its densities may be used, not its observed distribution.
    """
    if target.dtype != torch.float32 or target.device.type == "mps":
        return target
    return replace(
        target,
        programs=_DoublePrograms(target.programs, (target.x, target.y)),
        x=map_tree(_wide, target.x),
        y=_wide(target.y),
        at=None if target.at is None else _wide(target.at),
    )


def prior_in_double(target: Target) -> Callable[[Tensor], Tensor]:
    """The log prior by itself, computed in float64.

    Args:
        target: The target.

    Returns:
        Function from theta (P,), float64, to nats, ().
    """
    graph = prior_graph(target) if target.dtype == torch.float32 else None
    if graph is None:
        return prior_alone(in_double(target))
    held = replace(target, at=None if target.at is None else _wide(target.at))
    return lambda theta: _Widened(graph).run(held.expand(theta))


class _DoublePrograms(Programs):
    """Graphs of the joint density with every float32 in them float64."""

    def __init__(self, single: Programs, data: tuple[Tree, Tensor]) -> None:
        traced = copy.copy(single.traced)
        traced.dtype = torch.float64
        super().__init__(traced)
        self.single = single
        self.dtypes = [leaf.dtype for leaf in pytree.tree_leaves(data)]

    def _joint(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        leaves, spec = pytree.tree_flatten((x, y))
        shaped = [torch.empty(v.shape, dtype=t, device=v.device) for v, t in zip(leaves, self.dtypes, strict=True)]
        narrow_x, narrow_y = pytree.tree_unflatten(shaped, spec)
        zero = torch.zeros((), device=theta.device)
        module = self.single._get("joint", self.single._joint, zero, narrow_x, narrow_y).module
        prior, likelihood = _Widened(module).run(theta, *leaves)
        return prior, likelihood


def with_precise_prior(joint: fx.GraphModule) -> fx.GraphModule:
    """The graph of a joint density whose float32 log prior is summed in float64.

    A log prior is a sum over all weights: at 3e5 nats neighbouring float32 numbers are 0.03 apart. Its terms stay
    float32: their rounding is independent of each other and averages out.

    Args:
        joint: From theta and data to log prior, () nats, and log-likelihood per datum.

    Returns:
        A new graph.
    """
    module = fx.GraphModule(joint, copy.deepcopy(joint.graph))
    output = next(n for n in module.graph.nodes if n.op == "output")
    wide = {output}
    for node in reversed(list(module.graph.nodes)):
        value = node.meta.get("val")
        scalar = isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float32
        # What something else reads too stays as it is: there a wider number may not be welcome.
        if not scalar or node.kwargs or not node.users or not wide.issuperset(node.users):
            continue
        if output in node.users and (node is not output.args[0][0] or len(node.users) > 1):
            continue
        if node.target in _SCALAR_ARITHMETIC:
            wide.add(node)
        elif node.target in _SUMS:
            with module.graph.inserting_before(node):
                terms = module.graph.call_function(
                    torch.ops.aten._to_copy.default, (node.args[0],), {"dtype": torch.float64}
                )
            node.update_arg(0, terms)
    module.recompile()
    return module


_SUMS = {torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList}
_SCALAR_ARITHMETIC = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.neg.default,
}


class _Widened(fx.Interpreter):
    """Runs a graph with float64 for every float32 it mentions."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _wide(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.dtype == torch.float32 else value
