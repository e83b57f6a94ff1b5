"""What the columns of a table hold: numbers, booleans, categories, classes, or something that should be refused."""

import re

import numpy as np
import pandas as pd

from bnn_zoo.data.dataset import DataError, Task
from bnn_zoo.data.preprocessor import Column, rows_of, texts

_MAX_CATEGORIES = 100
_MAX_CLASSES = 100
_MAX_INFERRED_CLASSES = 10
_DATE = re.compile(
    r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ]\d{1,2}:\d{2}.*)?"
    r"|\d{1,2}:\d{2}(:\d{2})?"
    r"|\d{1,2}[ -]?[A-Za-z]{3,9}\.?[ -,]*\d{2,4}|[A-Za-z]{3,9}\.? \d{1,2},? \d{4}"
)


def infer_column(series: pd.Series) -> Column:
    """The kind of an input column without missing values.

    Args:
        series: The column.

    Returns:
        Its name, kind and categories.

    Raises:
        DataError: If it holds dates, numbers mixed with text, or too many different texts to be categories.
    """
    name = str(series.name)
    if pd.api.types.is_bool_dtype(series):
        return Column(name, "boolean")
    if pd.api.types.is_numeric_dtype(series):
        return Column(name, "number")
    values = texts(series)
    if set(values.str.lower()) <= {"true", "false"}:
        return Column(name, "boolean")
    _refuse_dates(name, values)
    _refuse_mixed(name, values)
    categories = tuple(sorted(set(values)))
    if len(categories) > min(_MAX_CATEGORIES, max(len(values) // 2, 5)):
        raise DataError(
            f"column {name!r} has {len(categories)} different texts in {len(values)} rows (such as {categories[0]!r}): "
            "an identifier, free text, or numbers in an unusual form. Leave it out (`ignore`) or turn it into numbers"
        )
    return Column(name, "category", categories)


def _refuse_dates(name: str, values: pd.Series) -> None:
    if all(_DATE.fullmatch(value) for value in values):
        raise DataError(
            f"column {name!r} holds dates or times (such as {values.iloc[0]!r}): turn it into numbers, such as days "
            "since the first, or leave it out (`ignore`)"
        )


def _refuse_mixed(name: str, values: pd.Series) -> None:
    is_text = np.isnan(np.asarray(pd.to_numeric(values, errors="coerce"), dtype=float))
    if 0 < is_text.sum() <= len(values) / 2:
        first = values.iloc[int(is_text.argmax())]
        raise DataError(
            f"column {name!r} holds numbers, but {rows_of(is_text)} has {first!r}: correct it, or leave the field "
            "empty if the value is missing"
        )


def infer_target(series: pd.Series, task: Task | None) -> tuple[Task, np.ndarray, tuple[str, ...]]:
    """The task that a target column sets, and its values.

    Args:
        series: The target, without missing values.
        task: What the user says it is; None: inferred.

    Returns:
        The task; numbers or labels, shape (N,); the names of the classes, none for a regression.

    Raises:
        DataError: If the target is constant, holds dates, or does not suit the task.
    """
    name = str(series.name)
    numeric = pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)
    if not numeric:
        values = texts(series)
        _refuse_dates(name, values)
        if not pd.api.types.is_bool_dtype(series):
            _refuse_mixed(name, values)
    distinct = series.nunique()
    if distinct < 2:
        raise DataError(f"target {name!r} has only one value ({series.iloc[0]!r}): there is nothing to predict")
    if task is None:
        few = distinct <= min(_MAX_INFERRED_CLASSES, len(series) / 5)
        whole = numeric and bool((series % 1 == 0).all())
        task = "classification" if not numeric or (whole and few) else "regression"
    if task == "regression":
        if not numeric:
            raise DataError(
                f"a regression needs a target of numbers, but {name!r} holds {series.iloc[0]!r}; "
                'use task="classification" for it'
            )
        return "regression", series.to_numpy(dtype=float), ()
    if distinct > min(_MAX_CLASSES, len(series) / 2):
        hint = 'use task="regression"' if numeric else "choose another target"
        raise DataError(
            f"target {name!r} has {distinct} different values in {len(series)} rows, too many classes: {hint}"
        )
    keys = series if numeric else texts(series)
    classes, labels = np.unique(keys.to_numpy(dtype=float if numeric else str), return_inverse=True)
    names = tuple(f"{value:g}" if numeric else str(value) for value in classes)
    return "classification", labels, names
