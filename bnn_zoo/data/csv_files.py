"""A user's own CSV as a data set: types inferred, everything doubtful refused by name with what to do about it."""

import csv
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from bnn_zoo.data.columns import infer_column, infer_target
from bnn_zoo.data.dataset import DataError, Dataset, Task, standardised
from bnn_zoo.data.preprocessor import Preprocessor, absent, column_of, encode, rows_of
from bnn_zoo.data.registry import did_you_mean

Choice = Literal["refuse", "drop"]
_MIN_ROWS = 10


def load_csv(
    path: str | Path,
    target: str,
    *,
    test_fraction: float = 0.1,
    split: int = 0,
    missing: Choice = "refuse",
    constant: Choice = "refuse",
    task: Task | None = None,
    ignore: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """A CSV file with a header line as a data set, split at random and standardised on the training part.

    Columns of numbers and booleans stay one input each, a text column becomes one 0/1 input per category; dates and
    identifiers are refused by name. A text or boolean target, or one of at most ten whole numbers with five rows each
    on average, makes a classification, whose split keeps the class proportions; any other makes a regression.

    Args:
        path: The file; comma, semicolon or tab separated, UTF-8.
        target: Name of the target column.
        test_fraction: Share of the rows in the test part, between 0 and 1.
        split: Seed of the random split, 0 or more.
        missing: "refuse" rows with missing or infinite values, or "drop" them.
        constant: "refuse" columns with only one value, or "drop" them.
        task: "regression" or "classification"; None: inferred from the target.
        ignore: Columns to leave out.
        dtype: Type of the inputs and of real targets.

    Returns:
        The data set; its `preprocessor` treats new rows in the same way.

    Raises:
        DataError: If an argument is out of range or the table cannot be used as it is.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"`test_fraction` must be between 0 and 1, got {test_fraction}")
    if split < 0:
        raise DataError(f"`split` must be 0 or more, got {split}")
    for option, choice in (("missing", missing), ("constant", constant)):
        if choice not in ("refuse", "drop"):
            raise DataError(f'`{option}` must be "refuse" or "drop", got {choice!r}')
    if task not in (None, "regression", "classification"):
        raise DataError(f'`task` must be "regression" or "classification", got {task!r}')
    frame = read_csv(path)
    for name in (target, *ignore):
        if name not in frame.columns:
            raise DataError(f"{Path(path).name} has no column {name!r}: {did_you_mean(name, frame.columns, 'columns')}")
    frame = _without_missing(frame.drop(columns=[name for name in ignore if name != target]), missing)
    if len(frame) < _MIN_ROWS:
        raise DataError(f"expected at least {_MIN_ROWS} usable rows, got {len(frame)}")
    task, labels, class_names = infer_target(column_of(frame, target), task)
    features = _without_constant(frame.drop(columns=target), constant)
    if features.shape[1] == 0:
        raise DataError(f"expected at least one column beside the target {target!r}, got none")
    columns = tuple(infer_column(column_of(features, name)) for name in features.columns)
    inputs = encode(features, columns)
    train, test = _random_split(labels, class_names, test_fraction, np.random.default_rng(split))
    if not class_names and np.ptp(labels[train]) == 0:
        raise DataError(f"target {target!r} has only one value in the training part; try another `split`")
    preprocessor = Preprocessor.fitted(columns, inputs[train], target, labels[train], class_names)
    return standardised(
        {"x_train": inputs[train], "y_train": labels[train], "x_test": inputs[test], "y_test": labels[test]},
        task=task,
        dtype=dtype,
        name=Path(path).stem,
        feature_names=preprocessor.feature_names,
        target_name=target,
        unit="",
        licence="the user's own",
        source=Path(path).name,
        split=str(split),
        class_names=class_names,
        preprocessor=preprocessor,
    )


def read_csv(path: str | Path) -> pd.DataFrame:
    """A CSV file with a header line as a table, without any interpretation of its columns.

    Args:
        path: The file; comma, semicolon or tab separated, UTF-8.

    Returns:
        The table, at least one row.

    Raises:
        DataError: If the file is not there, not a CSV, has no rows, or has duplicate or missing column names.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}; give the path of a CSV file")
    try:
        separator, names = _header(path)
        with warnings.catch_warnings():
            # Rows longer than the header are only a warning in pandas, and would be cut.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path, sep=separator, skipinitialspace=True, encoding="utf-8-sig", index_col=False, low_memory=False
            )
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({err.reason})") from err
    except pd.errors.EmptyDataError as err:
        raise DataError(f"{path} is empty: expected a header line and rows") from err
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as err:
        raise DataError(f"{path} is not a CSV file with equally long rows: {str(err).strip()}") from err
    except OSError as err:
        raise DataError(f"could not read {path}: {err}") from err
    if frame.shape[1] != len(names):
        raise DataError(f"{path}: expected one name per column, got {len(names)} for {frame.shape[1]} columns")
    frame.columns = names
    if frame.empty:
        raise DataError(f"{path} has a header line but no rows")
    return frame


def _header(path: Path) -> tuple[str, list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        line = next((line for line in stream if line.strip()), "")
        if "\0" in line:
            raise DataError(f"{path} is not a CSV file: it holds binary data")
        separator = max(",;\t", key=line.count)
        # The stream goes on after the line, for a quoted name with a line break.
        reader = csv.reader(chain([line], stream), delimiter=separator, skipinitialspace=True)
        names = [name.strip() for name in next(reader, [])]
    duplicates = sorted({name for name in names if names.count(name) > 1 and name})
    if duplicates:
        raise DataError(f"{path} has duplicate column names: {', '.join(duplicates)}")
    if "" in names:
        raise DataError(f"{path}: column {names.index('') + 1} has no name; name it or remove it")
    if names and all(_is_number(name) for name in names):
        raise DataError(f"{path}: expected column names in the first line, got numbers: {line.strip()[:60]}")
    return separator, names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_missing(frame: pd.DataFrame, missing: Choice) -> pd.DataFrame:
    masks = {str(name): absent(column_of(frame, str(name))) for name in frame.columns}
    # A column without any value is a matter of constant columns: dropping its rows would leave nothing.
    masks = {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}
    if not masks:
        return frame
    if missing == "refuse":
        named = "; ".join(f"{name!r}: {mask.sum()} ({rows_of(mask)})" for name, mask in masks.items())
        raise DataError(f'missing or infinite values in {named}. Fill them in, or drop those rows with missing="drop"')
    gaps = np.any(list(masks.values()), axis=0)
    return frame.loc[~gaps].reset_index(drop=True)


def _without_constant(frame: pd.DataFrame, constant: Choice) -> pd.DataFrame:
    names = [str(name) for name in frame.columns if column_of(frame, str(name)).nunique() <= 1]
    if names and constant == "refuse":
        raise DataError(
            f"columns with only one value: {', '.join(names)}. They tell nothing about the target; "
            'remove them, or drop them with constant="drop"'
        )
    return frame.drop(columns=names)


def _random_split(
    labels: np.ndarray, class_names: tuple[str, ...], test_fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    # Class by class, so that both parts have the proportions of the whole and no class is without a training row.
    groups = [np.flatnonzero(labels == label) for label in range(len(class_names))] or [np.arange(len(labels))]
    test = []
    for rows in groups:
        num_test = min(round(test_fraction * len(rows)), len(rows) - 1)
        test.append(rng.permutation(rows)[:num_test])
    chosen = np.concatenate(test)
    if not len(chosen):
        chosen = rng.permutation(max(groups, key=len))[:1]
    return np.setdiff1d(np.arange(len(labels)), chosen), np.sort(chosen)
