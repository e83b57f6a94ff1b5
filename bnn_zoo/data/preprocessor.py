"""From the columns of a table to standardised inputs, remembered so that new rows are treated like the training rows.

Numbers stay, booleans become 0 and 1, a text column becomes one 0/1 column per category (`colour=red`, ...). Then every
column is standardised with the training part. The whole is plain data and goes to JSON and back.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bnn_zoo.data.dataset import DataError, Task, moments
from bnn_zoo.data.registry import did_you_mean

Kind = Literal["number", "boolean", "category"]
_VERSION = 1
_BOOLEANS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: Its name.
        kind: "number", "boolean" or "category".
        categories: The categories of a text column, sorted.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the inputs that this column gives."""
        return tuple(f"{self.name}={value}" for value in self.categories) or (self.name,)


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Turns rows of a table into standardised inputs, and knows how the target was standardised.

    Attributes:
        columns: The columns it reads; any other column is ignored.
        x_mean: Subtracted from the inputs, one per feature, original units.
        x_std: The inputs are divided by this standard deviation, one per feature, original units.
        target: Name of the target column.
        task: "regression" or "classification".
        y_mean: Mean of the target, original units; 0 for classes.
        y_std: Standard deviation of the target, original units; 1 for classes.
        class_names: Names of labels 0, 1, ...
    """

    columns: tuple[Column, ...]
    x_mean: tuple[float, ...]
    x_std: tuple[float, ...]
    target: str
    task: Task
    y_mean: float = 0.0
    y_std: float = 1.0
    class_names: tuple[str, ...] = ()

    @classmethod
    def fitted(
        cls,
        columns: tuple[Column, ...],
        x_train: np.ndarray,
        target: str,
        y_train: np.ndarray,
        class_names: tuple[str, ...] = (),
    ) -> "Preprocessor":
        """A preprocessor with the moments of a training part.

        Args:
            columns: The columns that gave the inputs.
            x_train: Inputs in original units, shape (N, D).
            target: Name of the target.
            y_train: Targets in original units or labels, shape (N,).
            class_names: Names of the labels; empty for a regression.

        Returns:
            The preprocessor.
        """
        x_mean, x_std = moments(x_train)
        y_mean, y_std = (0.0, 1.0) if class_names else (float(value) for value in moments(y_train))
        return cls(
            columns=columns,
            x_mean=tuple(x_mean.tolist()),
            x_std=tuple(x_std.tolist()),
            target=target,
            task="classification" if class_names else "regression",
            y_mean=y_mean,
            y_std=y_std,
            class_names=class_names,
        )

    @classmethod
    def of_numbers(
        cls,
        names: tuple[str, ...],
        x_train: np.ndarray,
        target: str,
        y_train: np.ndarray,
        class_names: tuple[str, ...] = (),
    ) -> "Preprocessor":
        """A preprocessor for columns that are all numbers.

        Args:
            names: Names of the columns.
            x_train: Inputs in original units, shape (N, D).
            target: Name of the target.
            y_train: Targets in original units or labels, shape (N,).
            class_names: Names of the labels; empty for a regression.

        Returns:
            The preprocessor.
        """
        columns = tuple(Column(name, "number") for name in names)
        return cls.fitted(columns, x_train, target, y_train, class_names)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the inputs, one per column of x."""
        return tuple(name for column in self.columns for name in column.feature_names)

    def transform(self, frame: pd.DataFrame, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standardised inputs for new rows.

        Args:
            frame: A table with all the columns of the training table; the target and other columns are ignored.
            dtype: Type of the result.

        Returns:
            Inputs, shape (B, D).

        Raises:
            DataError: If a column is missing, a value is missing or not a number, or a category is unknown.
        """
        if frame.empty:
            raise DataError("expected at least one row to predict on, got none")
        raw = encode(frame, self.columns)
        return torch.as_tensor((raw - np.array(self.x_mean)) / np.array(self.x_std), dtype=dtype)

    def to_json(self) -> str:
        """This preprocessor as JSON text.

        Returns:
            Text for `from_json`.
        """
        return json.dumps({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Preprocessor":
        """The preprocessor that `to_json` wrote.

        Args:
            text: JSON text.

        Returns:
            An equal preprocessor.

        Raises:
            DataError: If the text is not one written by this version.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if version != _VERSION:
                raise DataError(f"expected a preprocessor of version {_VERSION}, got version {version!r}")
            columns = tuple(
                Column(entry["name"], entry["kind"], tuple(entry["categories"])) for entry in fields.pop("columns")
            )
            lists = {key: tuple(fields.pop(key)) for key in ("x_mean", "x_std", "class_names")}
            return cls(columns=columns, **lists, **fields)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise DataError(f"expected the JSON of a preprocessor, got {text[:60]!r} ({err})") from err


def encode(frame: pd.DataFrame, columns: tuple[Column, ...]) -> np.ndarray:
    """The raw inputs of the rows of a table, not standardised.

    Args:
        frame: The table.
        columns: The columns to read.

    Returns:
        Inputs, shape (N, D), float64.

    Raises:
        DataError: If a column is missing, a value is missing or not a number, or a category is unknown.
    """
    known = [str(name) for name in frame.columns]
    for column in columns:
        if column.name not in known:
            raise DataError(f"no column {column.name!r}: {did_you_mean(column.name, known, 'columns of the table')}")
    return np.concatenate([_encode_column(column_of(frame, column.name), column) for column in columns], axis=1)


def absent(series: pd.Series) -> np.ndarray:
    """Which values are missing or infinite, shape (N,).

    Args:
        series: One column.

    Returns:
        True where there is no usable value.
    """
    missing = np.asarray(series.isna(), dtype=bool)
    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
        return missing | ~np.isfinite(series.to_numpy(dtype=float, na_value=np.nan))
    return missing


def column_of(frame: pd.DataFrame, name: str) -> pd.Series:
    """One column of a table.

    Args:
        frame: The table.
        name: Name of one of its columns.

    Returns:
        The column.
    """
    return pd.Series(frame[name])


def rows_of(mask: np.ndarray) -> str:
    """The rows where a mask is true, counted from 1 below the header, for an error message.

    Args:
        mask: Shape (N,).

    Returns:
        For example "rows 2, 5, 9 and 40 more".
    """
    rows = (np.flatnonzero(mask) + 1).tolist()
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))}{more}"


def texts(series: pd.Series) -> pd.Series:
    """A column as text without surrounding blanks; missing values stay missing.

    Args:
        series: One column.

    Returns:
        The texts.
    """
    return series.astype(object).map(lambda value: str(value).strip(), na_action="ignore")


def _encode_column(series: pd.Series, column: Column) -> np.ndarray:
    missing = absent(series)
    if missing.any():
        raise DataError(f"column {column.name!r} has missing or infinite values in {rows_of(missing)}")
    if column.kind == "category":
        return _one_hot(series, column)
    if column.kind == "boolean":
        numbers = np.array([_BOOLEANS.get(value.lower(), np.nan) for value in texts(series)])
    else:
        numbers = np.asarray(pd.to_numeric(series, errors="coerce"), dtype=float)
    bad = ~np.isfinite(numbers)
    if bad.any():
        what = "true or false" if column.kind == "boolean" else "a number"
        raise DataError(
            f"column {column.name!r} should hold {what}, but {rows_of(bad)} has {series.iloc[int(bad.argmax())]!r}"
        )
    return numbers[:, None]


def _one_hot(series: pd.Series, column: Column) -> np.ndarray:
    values = np.array(texts(series), dtype=object)
    unknown = ~np.isin(values.astype(str), column.categories)
    if unknown.any():
        raise DataError(
            f"column {column.name!r} has the unknown category {values[int(unknown.argmax())]!r} in {rows_of(unknown)}; "
            f"the categories are {', '.join(column.categories)}"
        )
    return (values[:, None] == np.array(column.categories, dtype=object)[None, :]).astype(float)
