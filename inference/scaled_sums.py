"""Scaled sums of a recorded graph in one pass over memory: 2 (a + b) as 2a + 2b, where a is small and b is not.

Eager arithmetic walks through memory once per operation, and activations of many draws are larger than a core's cache.
Factors of two round nowhere, so that the values stay the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inference.layout import frozen_nodes, same_layout, value_of

aten = torch.ops.aten

# The small term is multiplied by itself, which must cost less than the pass it saves.
_SMALL = 0.1


def scale_terms(module: fx.GraphModule) -> None:
    """Move doublings of a sum with a small broadcast term, as of activations with their bias, to the terms.

    Args:
        module: A recorded graph whose products are arranged, changed in place.
    """
    graph, frozen = module.graph, frozen_nodes(module)
    changed = False
    for node in list(graph.nodes):
        total: Any = node.args[0] if node.target is aten.mul.Tensor and len(node.args) == 2 else None
        if total is None or node.args[1] != 2.0 or node in frozen or not isinstance(total, fx.Node):
            continue
        if total.target is not aten.add.Tensor or total.kwargs or total in frozen or len(total.users) != 1:
            continue
        terms = sorted(total.args, key=lambda a: v.numel() if (v := value_of(a)) is not None else 0)  # type: ignore[arg-type]
        small, large, out = value_of(terms[0]), value_of(terms[1]), node.meta["val"]
        if small is None or small.dtype != out.dtype or small.numel() > _SMALL * out.numel():
            continue
        if not out.is_floating_point() or not same_layout(large, out, through_arithmetic=True):
            continue
        with graph.inserting_before(node):
            doubled = graph.call_function(aten.mul.Tensor, (terms[0], 2.0))
            new = graph.call_function(aten.add.Tensor, (doubled, terms[1]), {"alpha": 2.0})
        doubled.meta["val"], new.meta["val"] = torch.empty_like(small, device="meta"), out
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        graph.erase_node(total)
        changed = True
    if changed:
        graph.lint()
        module.recompile()
