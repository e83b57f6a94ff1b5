"""What a loaded data set is: train and test tensors, names, units, licence, and the way back to original units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from bnn_zoo.data.preprocessor import Preprocessor

Task = Literal["regression", "classification"]


class DataError(ValueError):
    """A data set that cannot be had, read or used; the message says what to do."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """One split of one data set, standardised on its training part.

    Inputs always, and targets of a regression, have mean 0 and (population) standard deviation 1 on the training part,
    as in the published UCI tables; a column that is constant there keeps standard deviation 1. In original units the
    NLL per datum is larger by `nll_offset`, and an RMSE by the factor `y_std`.

    Attributes:
        name: Name in the registry, or the file name of a CSV.
        task: "regression" or "classification".
        x_train: Inputs, standardised, shape (N, D).
        y_train: Standardised targets, shape (N,), or integer labels, shape (N,).
        x_test: Inputs, standardised with the training part, shape (N_test, D).
        y_test: Targets like `y_train`, shape (N_test,).
        feature_names: One name per column of x.
        target_name: Name of the target.
        unit: Unit of the target; empty if it has none.
        licence: Licence of the data, as far as its publisher states one.
        source: Where the data come from.
        split: Split identifier, "0", "1", ... or "gap0", "gap1", ...
        x_mean: Subtracted from the inputs, shape (D,), original units.
        x_std: The inputs were divided by this standard deviation, shape (D,), original units.
        y_mean: Subtracted from the targets; 0 for classes.
        y_std: The targets were divided by this standard deviation; 1 for classes.
        class_names: Names of labels 0, 1, ...; empty for a regression.
        input_shape: Shape of one input before flattening, e.g. (1, 28, 28); (D,) for tables.
        grid: Inputs for plots, reaching beyond the data, standardised, shape (G, D); toys of one or two inputs only.
        grid_shape: How `grid` unfolds: (G,) in one dimension, (rows, columns) in two.
        preprocessor: Turns new rows of a table into inputs of this data set; absent for images.
    """

    name: str
    task: Task
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    feature_names: tuple[str, ...]
    target_name: str
    unit: str
    licence: str
    source: str
    split: str
    x_mean: Tensor
    x_std: Tensor
    y_mean: float = 0.0
    y_std: float = 1.0
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()
    grid: Tensor | None = None
    grid_shape: tuple[int, ...] = ()
    preprocessor: "Preprocessor | None" = None

    def __repr__(self) -> str:
        sizes = f"{len(self.x_train)} + {len(self.x_test)} rows, {self.num_features} inputs"
        return f"Dataset({self.name!r}, split={self.split!r}, {self.task} of {self.target_name!r}, {sizes})"

    @property
    def num_features(self) -> int:
        """Number of input columns D."""
        return self.x_train.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes K; 0 for a regression."""
        return len(self.class_names)

    @property
    def nll_offset(self) -> float:
        """Nats to add to a negative log-likelihood per datum to have it in original units: log(y_std)."""
        return float(np.log(self.y_std))

    def to_original(self, y: Tensor) -> Tensor:
        """Targets or predictive means in original units; labels come back unchanged.

        Args:
            y: Standardised targets, any shape.

        Returns:
            `y * y_std + y_mean`, same shape.
        """
        return y if self.task == "classification" else y * self.y_std + self.y_mean

    def scale_to_original(self, stddev: Tensor) -> Tensor:
        """Standard deviations, widths or errors of the target in original units.

        Args:
            stddev: In standardised units, any shape.

        Returns:
            `stddev * y_std`, same shape.
        """
        return stddev if self.task == "classification" else stddev * self.y_std

    def targets_original(self) -> tuple[Tensor, Tensor]:
        """Targets in original units.

        Returns:
            Those of the training and of the test part, shapes (N,) and (N_test,).
        """
        return self.to_original(self.y_train), self.to_original(self.y_test)

    def inputs_original(self, x: Tensor) -> Tensor:
        """Inputs in original units.

        Args:
            x: Standardised inputs, shape (B, D).

        Returns:
            `x * x_std + x_mean`, shape (B, D).
        """
        return x * self.x_std + self.x_mean

    def metadata(self) -> dict[str, object]:
        """What a results file records of the data.

        Returns:
            Names, sizes, split, units, licence; JSON-serialisable.
        """
        return {
            "name": self.name,
            "task": self.task,
            "split": self.split,
            "num_train": len(self.x_train),
            "num_test": len(self.x_test),
            "num_features": self.num_features,
            "target": self.target_name,
            "unit": self.unit,
            "class_names": list(self.class_names),
            "y_mean": self.y_mean,
            "y_std": self.y_std,
            "licence": self.licence,
            "source": self.source,
        }


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column means and population standard deviations, the latter 1 where a column is constant.

    Args:
        values: Shape (N, D) or (N,).

    Returns:
        Mean and standard deviation, each shape (D,) or ().
    """
    # Equality rather than a small standard deviation: rounding gives 1e-16 for a column of 0.998.
    constant = values.max(axis=0) == values.min(axis=0)
    mean = np.where(constant, values[0], values.mean(axis=0))
    return mean, np.where(constant, 1.0, values.std(axis=0))


def standardised(arrays: Mapping[str, np.ndarray], *, task: Task, dtype: torch.dtype, **about: object) -> Dataset:
    """A `Dataset` of raw arrays, standardised on the training part.

    Args:
        arrays: "x_train" (N, D), "y_train" (N,), "x_test", "y_test", and maybe "grid" (G, D), all in original units.
        task: "regression" or "classification"; labels are kept as they are.
        dtype: Type of the inputs and of real targets.
        **about: The other fields of `Dataset`.

    Returns:
        The data set.
    """
    x_mean, x_std = moments(arrays["x_train"])
    x_train, x_test = ((arrays[key] - x_mean) / x_std for key in ("x_train", "x_test"))
    if "grid" in arrays:
        about["grid"] = torch.as_tensor((arrays["grid"] - x_mean) / x_std, dtype=dtype)
    y_mean, y_std, y_dtype = 0.0, 1.0, torch.int64
    if task == "regression":
        y_mean, y_std = (float(value) for value in moments(arrays["y_train"]))
        y_dtype = dtype
    y_train, y_test = (
        torch.as_tensor((arrays[key] - y_mean) / y_std if task == "regression" else arrays[key]).to(y_dtype)
        for key in ("y_train", "y_test")
    )
    about.setdefault("input_shape", (x_train.shape[1],))
    return Dataset(
        task=task,
        x_train=torch.as_tensor(x_train, dtype=dtype),
        y_train=y_train,
        x_test=torch.as_tensor(x_test, dtype=dtype),
        y_test=y_test,
        x_mean=torch.as_tensor(x_mean, dtype=dtype),
        x_std=torch.as_tensor(x_std, dtype=dtype),
        y_mean=y_mean,
        y_std=y_std,
        **about,  # pyright: ignore[reportArgumentType]
    )
