"""The matrices that layers hold of theta, and the rows their operations read and write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from inference.layers import Layer
from inference.target import Target


@dataclass(frozen=True, eq=False)
class Use:
    """One operation that reads a block's weight.

    Attributes:
        layer: The operation.
        padding: Token of an embedding that passes no gradient, or -1.
        window: Stride, padding and dilation of a convolution.
        groups: Groups of a convolution.
        group: Which of them this is.
        columns: Whether the weight and whether the bias are columns of the block.
        after: Rows of the operation's input that follow each other for one datum, before the next datum's.
    """

    layer: Layer
    padding: int
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    groups: int
    group: int
    columns: tuple[bool, bool]
    after: int = 1


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """The entries of theta that form one layer's matrix.

    Attributes:
        name: Site of the weight.
        kind: linear, conv or embedding.
        positions: Index into theta, (out, in); the bias is the last column.
        uses: Operations that read it; several where a weight is shared.
    """

    name: str
    kind: str
    positions: Tensor
    uses: tuple[Use, ...]


def uses_of(layers: tuple[Layer, ...], nodes: dict[str, fx.Node]) -> list[Use]:
    """One use per layer, and one per group of a grouped convolution."""
    found = []
    for layer in layers:
        args: Any = nodes[layer.node].args
        padding, groups = -1, 1
        window: tuple[tuple[int, ...], ...] = ((), (), ())
        if layer.kind == "embedding" and len(args) > 2:
            padding = int(args[2])
        if layer.kind == "conv":
            if len(layer.weight_shape) > 4:  # unfold knows images and sequences
                continue
            window, groups = tuple(tuple(args[i]) for i in (3, 4, 5)), int(args[8])
        bias = layer.bias_positions is not None
        for group in range(groups):
            found.append(Use(layer, padding, window, groups, group, (True, bias)))  # type: ignore[arg-type]
    return found


def free_index(target: Target) -> Tensor:
    """For every entry of the full theta its place in the target's own, or -1."""
    index = torch.full((target.full_dim,), -1, dtype=torch.long)
    if target.kept is None:
        return torch.arange(target.full_dim)
    start = 0
    for a, b in target.kept:
        index[a:b] = torch.arange(start, start + b - a)
        start += b - a
    return index


def _block(use: Use, free: Tensor) -> LayerBlock | None:
    """The block a use reads: its weight, its bias or both, as far as they are free."""
    layer = use.layer
    if layer.kind == "conv":
        positions = layer.positions.reshape(layer.positions.shape[0], -1).chunk(use.groups)[use.group]
    else:
        positions = layer.positions.t()
    weight = free[positions]
    columns = [weight] if use.columns[0] and bool((weight >= 0).all()) else []
    has_weight = bool(columns)
    has_bias = False
    if use.columns[1] and layer.bias_positions is not None:
        bias = free[layer.bias_positions.chunk(use.groups)[use.group]]
        has_bias = bool((bias >= 0).all())
        columns += [bias[:, None]] if has_bias else []
    if not columns:
        return None
    used = torch.cat(columns, 1)
    return LayerBlock(layer.name, layer.kind, used, (replace(use, columns=(has_weight, has_bias)),))


def disjoint_blocks(uses: list[Use], free: Tensor) -> list[LayerBlock]:
    """Blocks that do not overlap: uses of one weight are merged where they read it alike, else left out."""
    found = [block for use in uses if (block := _block(use, free)) is not None]
    merged: list[LayerBlock] = []
    for block in found:
        twin = next((i for i, other in enumerate(merged) if torch.equal(other.positions, block.positions)), None)
        if twin is None:
            merged.append(block)
        else:
            merged[twin] = replace(merged[twin], uses=merged[twin].uses + block.uses)
    owners = torch.zeros(len(free) + 1, dtype=torch.long)
    for block in merged:
        flat = block.positions.reshape(-1)
        owners.index_add_(0, flat, torch.ones_like(flat))
    return [block for block in merged if bool((owners[block.positions] == 1).all())]


def without_bias(block: LayerBlock) -> list[LayerBlock]:
    """The block without its last column, where that is a bias."""
    if not all(use.columns == (True, True) for use in block.uses):
        return []
    uses = tuple(replace(use, columns=(True, False)) for use in block.uses)
    return [replace(block, positions=block.positions[:, :-1], uses=uses)]


def leading_rows(grad: Tensor, use: Use) -> Tensor:
    """A gradient with one row per row the operation reads, (rows, everything else)."""
    if use.layer.flipped:
        return grad.reshape(grad.shape[0], -1).t()
    if use.layer.kind == "conv":
        return grad.flatten(1)
    return grad.reshape(-1, use.layer.fan_out)


def rows_read(value: Tensor, use: Use) -> Tensor:
    """What a product or convolution reads, (rows, T, in), and what stands for the bias as the last column.

    Windows of images lie in memory as (in, rows, T): sums over data and places are then products of long rows, and
    those over the places of each datum need no copy either.

    Args:
        value: What the operation reads.
        use: The operation.

    Returns:
        (rows, T, in).
    """
    weight, bias = use.columns
    if use.layer.kind == "conv":
        windows = _windows(value, use)  # (C, height, width, rows, down, across)
        width, num = windows[..., 0, 0, 0].numel() if weight else 0, windows.shape[3]
        out = value.new_empty(width + bias, num, windows[0, 0, 0, 0].numel())
        if weight:
            scale = use.layer.weight_scale
            out[:width].view(windows.shape).copy_(windows if scale == 1 else windows * scale)
        out[width:] = use.layer.bias_scale
        return out.permute(1, 2, 0)
    flat = value.reshape(value.shape[0], -1).t() if use.layer.flipped else value.reshape(-1, value.shape[-1])
    if not weight:
        flat = flat[:, :0]
    elif use.layer.weight_scale != 1:
        flat = flat * use.layer.weight_scale
    if bias:
        flat = torch.cat([flat, flat.new_full((len(flat), 1), use.layer.bias_scale)], -1)
    return flat.unsqueeze(1)


def _windows(value: Tensor, use: Use) -> Tensor:
    """The patches a convolution reads, a view of the padded images: (C, height, width, rows, down, across)."""
    steps, padding, dilation = (_pair(given, first) for given, first in zip(use.window, (1, 0, 1), strict=True))
    image = value if value.dim() == 4 else value.unsqueeze(-2)
    image = image.chunk(use.groups, 1)[use.group]
    image = functional.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    for at, size in enumerate(_pair(use.layer.weight_shape[2:], 1)):
        image = image.unfold(2 + at, (size - 1) * dilation[at] + 1, steps[at])[..., :: dilation[at]]
    return image.permute(1, 4, 5, 0, 2, 3)


def _pair(values: tuple[int, ...], first: int) -> tuple[int, int]:
    """Window parameters of an image; a sequence is an image of height one."""
    return (first, values[0]) if len(values) == 1 else (values[0], values[1])


def by_datum(rows: Tensor, after: int, size: int) -> Tensor:
    """(rows, T, width) to (B, T of the datum, width)."""
    total, places = rows.shape[0], rows.shape[1]
    if total == size:
        return rows
    rows = rows.reshape(total // (size * after), size, after, places, *rows.shape[2:])
    return rows.transpose(0, 1).reshape(size, total // size * places, *rows.shape[4:])
