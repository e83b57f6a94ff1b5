"""Arrays as callers give them, checked once and turned into float64 numpy arrays, with an error that names them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, bfloat16

Array = ArrayLike | Tensor
Floats = NDArray[np.float64]

# Small enough for the work arrays of a block to stay near the core, large enough for numpy.
_BLOCK_BYTES = 1 << 20


def as_numpy(values: Array) -> NDArray:
    """The values as a numpy array of their own type, without a copy where that is possible."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    tensor = values.detach().cpu()
    return (tensor.float() if tensor.dtype == bfloat16 else tensor).numpy()


def as_floats(name: str, values: Array) -> Floats:
    """The values as a float64 array with at least one dimension and one entry.

    Args:
        name: What to call them in an error.
        values: Array or tensor.

    Returns:
        A float64 array, which may share memory with the values.

    Raises:
        ValueError: If it is empty, a scalar, or does not consist of real numbers.
    """
    array = as_numpy(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got {array.dtype}; pass a numpy array or a tensor")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} must have at least one entry, got shape {array.shape}")
    return array.astype(np.float64, copy=False)


def as_finite(name: str, values: Array) -> Floats:
    """The values as a float64 array with at least one dimension and one entry.

    Args:
        name: What to call them in an error.
        values: Array or tensor.

    Returns:
        A float64 array, which may share memory with the values.

    Raises:
        ValueError: If it is empty, a scalar, not of real numbers, or holds NaN or infinity.
    """
    array = as_floats(name, values)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite, got {int((~np.isfinite(array)).sum())} of {array.size} NaN or infinite"
        )
    return array


def check_alike(**named: Array) -> tuple[Floats, ...]:
    """Several finite arrays of one shape.

    Args:
        **named: The arrays, under the names to use in an error.

    Returns:
        The arrays in float64, in the order given.

    Raises:
        ValueError: If one is empty or not finite, or the shapes differ.
    """
    arrays = {name: as_finite(name, values) for name, values in named.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"arrays must have one shape, got {shapes}; they are not broadcast")
    return tuple(arrays.values())


def check_probs(name: str, probs: Array) -> Floats:
    """Class probabilities as an array of shape (N, K).

    Args:
        name: What to call them in an error.
        probs: Probabilities, shape (N, K), or (N,) of class 1.

    Returns:
        Probabilities in float64, shape (N, K) with K >= 2.

    Raises:
        ValueError: If the shape is another one, or rows are not probabilities that sum to 1.
    """
    array = as_finite(name, probs)
    if array.ndim == 1:
        array = np.stack([1 - array, array], axis=1)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(f"{name} must have shape (N, K) with K >= 2, or (N,) of class 1, got {array.shape}")
    tolerance = 1e-4  # float32 probabilities over many classes
    if (array < -tolerance).any() or np.abs(array.sum(axis=1) - 1).max() > tolerance:
        raise ValueError(
            f"{name} must be >= 0 and sum to 1 over the classes, got sums from {array.sum(axis=1).min():g} "
            f"to {array.sum(axis=1).max():g} and a smallest entry of {array.min():g}; pass probabilities, not logits"
        )
    return array


def check_classification(probs: Array, labels: Array) -> tuple[Floats, NDArray[np.intp]]:
    """Class probabilities with labels that fit them.

    Args:
        probs: Probabilities, shape (N, K), or (N,) of class 1.
        labels: Classes 0..K-1, shape (N,).

    Returns:
        Probabilities in float64, shape (N, K), and integer labels, shape (N,).

    Raises:
        ValueError: If probs are not probabilities, or labels are not whole numbers from 0 to K-1, one for each row.
    """
    probabilities = check_probs("probs", probs)
    numbers = as_finite("labels", labels)
    if numbers.shape != probabilities.shape[:1]:
        raise ValueError(f"labels must have shape ({len(probabilities)},) for these probs, got {numbers.shape}")
    classes = numbers.astype(np.intp)
    if (classes != numbers).any() or classes.min() < 0 or classes.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels must be whole numbers from 0 to {probabilities.shape[1] - 1}, "
            f"got values from {numbers.min():g} to {numbers.max():g}"
        )
    return probabilities, classes


def check_weights(weights: Array | None, num_draws: int) -> Floats:
    """Weights of draws, scaled to sum to 1.

    Args:
        weights: Weights, shape (S,), or None for equal ones.
        num_draws: S.

    Returns:
        Weights that sum to 1, shape (S,).

    Raises:
        ValueError: If the shape is another one, a weight is negative or not finite, or all are zero.
    """
    if weights is None:
        return np.full(num_draws, 1 / num_draws)
    array = as_finite("weights", weights)
    if array.shape != (num_draws,):
        raise ValueError(f"weights must have shape ({num_draws},), one for each draw, got {array.shape}")
    if array.min() < 0 or array.sum() == 0:
        raise ValueError(f"weights must be >= 0 and not all 0, got a smallest one of {array.min():g}")
    return array / array.sum()


def column_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of columns such that a float64 block of all rows stays small.

    Args:
        num_rows: Rows of the array.
        num_columns: Columns of the array.

    Yields:
        Slices that cover all columns in order.
    """
    size = max(1, _BLOCK_BYTES // (8 * num_rows))
    for start in range(0, num_columns, size):
        yield slice(start, start + size)
