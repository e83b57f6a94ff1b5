"""How much to compute at a time: few enough draws for the cache, few enough rows for a bound in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, fx

# Buffers past a core's cache cost page faults: small chunks were two to four times faster when measured.
_CHUNK_ELEMENTS = 400_000
MAX_ROWS = 2_048
_ROW_CHUNK_BYTES = 32 * 2**20


def even(total: int, limit: int) -> int:
    """Size up to ``limit`` whose chunks of ``total`` are equal but for rounding, so that none is a small rest."""
    return math.ceil(total / math.ceil(total / limit))


def draws_per_chunk(graph: fx.GraphModule) -> int:
    """Number of draws whose widest intermediate result stays in the cache, from a graph recorded for one."""
    values = [n.meta.get("val") for n in graph.graph.nodes if n.op == "call_function"]
    widest = max((v.numel() for v in values if isinstance(v, Tensor)), default=1)
    return max(1, _CHUNK_ELEMENTS // max(widest, 1))


def rows_per_chunk(limit: int, num_components: int, one: Mapping[str, Tensor]) -> int:
    """Number of inputs whose parameters for all components stay within the bound.

    Args:
        limit: Largest number wanted.
        num_components: Number of components S.
        one: Parameters of one component, each (n, ...).

    Returns:
        Between 1 and ``limit``.
    """
    per_row = num_components * sum(p.numel() * p.element_size() / p.shape[0] for p in one.values())
    return max(1, min(limit, int(_ROW_CHUNK_BYTES / per_row)))
