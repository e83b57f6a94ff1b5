"""Inputs and targets: one tensor, or a dict or tuple of tensors with the same first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

Tree = Any  # Tensor | dict[str, Tensor] | tuple[Tensor, ...]


def num_data(x: Tree) -> int:
    """First dimension shared by all leaves."""
    return pytree.tree_leaves(x)[0].shape[0]


def index(x: Tree, at: Any) -> Tree:
    """Select along the first dimension of every leaf; ``at`` is an index tensor (any shape) or a slice."""
    return pytree.tree_map(lambda leaf: leaf[at], x)


def map_tree(fn: Callable[[Tensor], Tensor], x: Tree) -> Tree:
    """Apply ``fn`` to every leaf."""
    return pytree.tree_map(fn, x)


def shapes(x: Tree) -> tuple[Any, ...]:
    """Hashable structure, shapes and dtypes of a tree."""
    leaves, spec = pytree.tree_flatten(x)
    return (str(spec), *((tuple(leaf.shape), leaf.dtype) for leaf in leaves))


def floating_dtype(x: Tree) -> torch.dtype:
    """Dtype of the first floating leaf, or torch's default."""
    found = [leaf.dtype for leaf in pytree.tree_leaves(x) if leaf.is_floating_point()]
    return found[0] if found else torch.get_default_dtype()


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def full_chunks(total: int, size: int) -> Iterator[tuple[slice, int]]:
    """Slices of exactly ``size`` that cover ``range(total)``, and how many leading rows the last shares with its left.

    Args:
        total: Number of rows, at least ``size``.
        size: Rows of a slice.

    Yields:
        The slice, and its number of rows that were in the slice before.
    """
    for rows in chunks(total, size):
        skip = size - (rows.stop - rows.start)
        yield slice(rows.start - skip, rows.stop), skip


def check_data(x: Any, y: Any = None) -> tuple[Tree, Tensor, int | None]:
    """Validate what was given to ``fit``.

    Args:
        x: Tensor, dict or tuple of tensors, or a DataLoader of (x, y) batches.
        y: Targets; must be absent with a DataLoader.

    Returns:
        Inputs, targets, and the loader's batch size (None without a loader).

    Raises:
        TypeError: If something is not a tensor.
        ValueError: If data are empty, not finite, or disagree on the first dimension.
    """
    batch_size = None
    if isinstance(x, DataLoader):
        if y is not None:
            raise ValueError("fit(model, loader) takes the targets from the loader; y must not be given as well")
        x, y, batch_size = _gather(x)
    if y is None:
        raise TypeError("fit needs targets: fit(model, x, y), or fit(model, loader) with (x, y) batches")
    x = check_inputs(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}; convert it with torch.as_tensor")
    if y.dim() == 0 or y.shape[0] != num_data(x):
        raise ValueError(f"x has {num_data(x)} rows but y has shape {tuple(y.shape)}; the first dimensions must agree")
    _check_finite("y", y)
    return x, y, batch_size


def check_inputs(x: Any, like: Tree | None = None) -> Tree:
    """Validate inputs alone.

    Args:
        x: Tensor, dict or tuple of tensors.
        like: Training inputs whose structure, trailing shapes and dtypes must be matched.

    Returns:
        The inputs (a list becomes a tuple).

    Raises:
        TypeError: If a leaf is no tensor, or structure or dtype differ from ``like``.
        ValueError: If empty, not finite, or shapes disagree.
    """
    if isinstance(x, list):
        x = tuple(x)
    if isinstance(x, dict) and isinstance(like, dict) and set(x) == set(like):
        x = {name: x[name] for name in like}
    leaves = pytree.tree_leaves(x)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)}) or ["nothing"]
        raise TypeError(
            f"x must be a torch.Tensor, or a dict or tuple of them, got {', '.join(kinds)}; use torch.as_tensor"
        )
    first = leaves[0].shape[:1]
    if not all(leaf.dim() > 0 and leaf.shape[:1] == first for leaf in leaves):
        raise ValueError(
            f"all inputs need the same first dimension, got shapes {[tuple(leaf.shape) for leaf in leaves]}"
        )
    if first[0] == 0:
        raise ValueError("x is empty: at least one row is needed")
    for leaf in leaves:
        _check_finite("x", leaf)
    if like is not None:
        _check_like(x, like)
    return x


def _check_like(x: Tree, like: Tree) -> None:
    (leaves, spec), (expected, expected_spec) = pytree.tree_flatten(x), pytree.tree_flatten(like)
    if spec != expected_spec:
        raise TypeError(f"x has the structure {spec}, but the posterior was fitted to {expected_spec}")
    for leaf, want in zip(leaves, expected, strict=True):
        if leaf.shape[1:] != want.shape[1:]:
            raise ValueError(
                f"x has rows of shape {tuple(leaf.shape[1:])}, but the posterior was fitted to rows of shape "
                f"{tuple(want.shape[1:])}"
            )
        if leaf.dtype != want.dtype:
            raise TypeError(
                f"x is {leaf.dtype}, but the posterior was fitted to {want.dtype}; convert it with x.to({want.dtype})"
            )


def _check_finite(name: str, value: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        bad = (~torch.isfinite(value)).reshape(value.shape[0], -1).any(-1)
        raise ValueError(
            f"{name} holds NaN or infinite values in {int(bad.sum())} of {value.shape[0]} rows (first: row "
            f"{int(bad.nonzero()[0])}); remove or impute them first"
        )


def _gather(loader: DataLoader[Any]) -> tuple[Tree, Tensor, int | None]:
    """All batches of a loader as one data set: every backend here may go over the data more than once."""
    with torch.random.fork_rng(devices=[]):  # a loader draws from the global random state
        batches = list(_in_order(loader))
    if not batches or not all(isinstance(b, (tuple, list)) and len(b) == 2 for b in batches):
        raise ValueError("the DataLoader must yield (x, y) pairs and at least one of them")
    xs, ys = zip(*batches, strict=True)
    x = pytree.tree_map(lambda *leaves: torch.cat(leaves), *xs)
    return x, torch.cat(list(ys)), loader.batch_size


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same data unshuffled and complete (one seed, one result); special samplers are left as they are."""
    sampler = getattr(loader, "sampler", None)
    shuffled = isinstance(sampler, RandomSampler) and not sampler.replacement
    if loader.batch_size is None or not (shuffled or type(sampler) is SequentialSampler):
        return loader
    return DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
