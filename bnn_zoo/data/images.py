"""Image sets: pixels in [0, 1], standardised per channel with the published moments, flattened to rows.

`x.reshape(-1, *dataset.input_shape)` gives channels-first images. `notmnist` and `cifar10_test` have no training part:
they are there to be predicted on, the first with MNIST's moments since it is out-of-distribution data for MNIST.
"""

import numpy as np
import torch
from torch import Tensor

from bnn_zoo.data.dataset import DataError, Dataset
from bnn_zoo.data.entries import Entry
from bnn_zoo.data.store import read_arrays
from bnn_zoo.data.tabular import whole_split


def load_images(entry: Entry, split: int | str, dtype: torch.dtype) -> Dataset:
    """An image set with its published training and test parts.

    Args:
        entry: The image set.
        split: Must be 0: there is one published split.
        dtype: Type of the inputs.

    Returns:
        The data set; inputs have shape (N, channels * height * width).

    Raises:
        DataError: If there is no such split, or the set is not registered as a file.
    """
    if entry.file is None:
        raise DataError(f"{entry.name} is not an image set")
    whole_split(entry, split)
    arrays = read_arrays(entry.file)
    images, labels = (arrays.get("x_test", arrays.get("x")), arrays.get("y_test", arrays.get("y")))
    if images is None or labels is None:
        raise DataError(f"{entry.file.path} holds {', '.join(arrays)}; expected images and labels of a test part")
    x_mean, x_std = (_per_pixel(entry, values, dtype) for values in entry.normal)
    pixels = [arrays.get("x_train", images[:0]), images]
    x_train, x_test = ((torch.as_tensor(part).to(dtype).flatten(1) / 255 - x_mean) / x_std for part in pixels)
    y_train, y_test = (torch.as_tensor(part).long() for part in (arrays.get("y_train", labels[:0]), labels))
    return Dataset(
        name=entry.name,
        task=entry.task,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        feature_names=tuple(f"pixel_{index}" for index in range(x_test.shape[1])),
        target_name=entry.target,
        unit=entry.unit,
        licence=entry.licence,
        source=entry.origin,
        split="0",
        x_mean=x_mean,
        x_std=x_std,
        class_names=entry.classes,
        input_shape=entry.input_shape,
    )


def _per_pixel(entry: Entry, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    channels, height, width = entry.input_shape
    return (
        torch
        .as_tensor(np.broadcast_to(np.reshape(values, (channels, 1, 1)), (channels, height, width)).copy())
        .to(dtype)
        .flatten()
    )
