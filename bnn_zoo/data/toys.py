r"""Seeded toy problems of one or two inputs, with a grid beyond the data for plots.

- `gap`: x uniform on [-1, -0.7] and [0.5, 1], :math:`y = \cos(4x + 0.8) + 0.1\,\epsilon`, after Foong et al. 2019
  [recalled from the paper, not re-read]; the test inputs are uniform on [-1, 1], gap included.
- `sine`: x uniform on [-3, 3], :math:`y = \sin(2x) + 0.2\,\epsilon`.
- `moons`: scikit-learn's two moons with noise 0.2.
- `banana`: two arcs of 225 degrees of a circle of radius 5 with unit noise, one shifted by (-3.75, -3.75), as PRTools'
  `gendatb` [recalled, not re-read].

The split is the seed.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import make_moons

from bnn_zoo.data.dataset import Dataset, standardised
from bnn_zoo.data.entries import Entry
from bnn_zoo.data.preprocessor import Preprocessor
from bnn_zoo.data.tabular import whole_split

_NUM_TRAIN, _NUM_TEST = 100, 200
_Parts = dict[str, np.ndarray]


def load_toy(entry: Entry, split: int | str, dtype: torch.dtype) -> Dataset:
    """A toy problem, standardised on its training part like any other data.

    Args:
        entry: The toy.
        split: The seed, 0 to 19.
        dtype: Type of the inputs and of real targets.

    Returns:
        The data set, with `grid` and `grid_shape`.
    """
    seed = whole_split(entry, split)
    parts = _MAKERS[entry.name](np.random.default_rng(seed))
    grid, grid_shape = grid_beyond(parts["x_train"])
    return standardised(
        {**parts, "grid": grid},
        task=entry.task,
        dtype=dtype,
        name=entry.name,
        feature_names=entry.features,
        target_name=entry.target,
        unit=entry.unit,
        licence=entry.licence,
        source=entry.origin,
        split=str(split),
        class_names=entry.classes,
        grid_shape=grid_shape,
        preprocessor=Preprocessor.of_numbers(
            entry.features, parts["x_train"], entry.target, parts["y_train"], class_names=entry.classes
        ),
    )


def grid_beyond(inputs: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """A regular grid that reaches half the data's range beyond the data on every side.

    Args:
        inputs: Shape (N, 1) or (N, 2).

    Returns:
        Points, shape (201, 1) or (2601, 2), and how they unfold: (201,) or (51, 51), rows along the second input.
    """
    low, high = inputs.min(axis=0), inputs.max(axis=0)
    margin = (high - low) / 2
    num = 201 if inputs.shape[1] == 1 else 51
    axes = [np.linspace(start, stop, num) for start, stop in zip(low - margin, high + margin, strict=True)]
    mesh = np.meshgrid(*axes)
    return np.stack([axis.ravel() for axis in mesh], axis=1), mesh[0].shape


def _gap(rng: np.random.Generator) -> _Parts:
    clusters = np.concatenate([rng.uniform(-1.0, -0.7, _NUM_TRAIN // 2), rng.uniform(0.5, 1.0, _NUM_TRAIN // 2)])
    return _curve(rng, clusters, rng.uniform(-1.0, 1.0, _NUM_TEST), lambda x: np.cos(4 * x + 0.8), noise=0.1)


def _sine(rng: np.random.Generator) -> _Parts:
    train, test = rng.uniform(-3.0, 3.0, _NUM_TRAIN), rng.uniform(-3.0, 3.0, _NUM_TEST)
    return _curve(rng, train, test, lambda x: np.sin(2 * x), noise=0.2)


def _curve(
    rng: np.random.Generator,
    train: np.ndarray,
    test: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    noise: float,
) -> _Parts:
    targets = [function(x) + noise * rng.standard_normal(len(x)) for x in (train, test)]
    return {"x_train": train[:, None], "y_train": targets[0], "x_test": test[:, None], "y_test": targets[1]}


def _moons(rng: np.random.Generator) -> _Parts:
    seed = int(rng.integers(2**31))
    inputs, labels = make_moons(_NUM_TRAIN + _NUM_TEST, noise=0.2, random_state=seed)
    return _first_rows_train(np.asarray(inputs), np.asarray(labels))


def _banana(rng: np.random.Generator) -> _Parts:
    labels = rng.permutation(np.arange(_NUM_TRAIN + _NUM_TEST) % 2)
    turn = 1.25 * np.pi * rng.random(len(labels))
    angle = np.where(labels == 0, 0.125 * np.pi + turn, 0.375 * np.pi - turn)
    arc = 5.0 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    inputs = arc - 3.75 * (labels == 1)[:, None] + rng.standard_normal((len(labels), 2))
    return _first_rows_train(inputs, labels)


def _first_rows_train(inputs: np.ndarray, labels: np.ndarray) -> _Parts:
    return {
        "x_train": inputs[:_NUM_TRAIN],
        "y_train": labels[:_NUM_TRAIN],
        "x_test": inputs[_NUM_TRAIN:],
        "y_test": labels[_NUM_TRAIN:],
    }


_MAKERS: dict[str, Callable[[np.random.Generator], _Parts]] = {
    "gap": _gap,
    "sine": _sine,
    "moons": _moons,
    "banana": _banana,
}
