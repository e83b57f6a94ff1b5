"""UCI regression tables with the published splits, and their gap splits.

Standard splits are the 90/10 index files of Hernandez-Lobato and Adams 2015. Gap split j holds out the rows whose
feature j lies in its middle third (Foong et al. 2019), which tests in-between uncertainty.
"""

import re

import numpy as np
import torch

from bnn_zoo.data.dataset import DataError, Dataset, standardised
from bnn_zoo.data.entries import Entry
from bnn_zoo.data.preprocessor import Preprocessor
from bnn_zoo.data.registry import GAP_SPLITS
from bnn_zoo.data.store import read_arrays


def load_table(entry: Entry, split: int | str, dtype: torch.dtype) -> Dataset:
    """One split of a UCI table, standardised on its training part.

    In `naval`, features 8 and 11 are constant; by the published convention they are kept, as zeros.

    Args:
        entry: The table.
        split: 0, 1, ..., or "gap0", "gap1", ..., one per feature.
        dtype: Type of inputs and targets.

    Returns:
        The data set.

    Raises:
        DataError: If the table has no such split, or is not registered as a file.
    """
    if entry.file is None:
        raise DataError(f"{entry.name} is not a table")
    test = re.fullmatch(r"gap(\d+)", str(split))
    number = int(test[1]) if test else whole_split(entry, split)
    arrays = read_arrays(entry.file)
    if test:
        train_rows, test_rows = _gap_rows(entry, number)
    else:
        train_rows, test_rows = arrays["train_idx"][number], arrays["test_idx"][number]
    inputs, targets = arrays["X"], arrays["y"]
    parts = {
        "x_train": inputs[train_rows],
        "y_train": targets[train_rows],
        "x_test": inputs[test_rows],
        "y_test": targets[test_rows],
    }
    return standardised(
        parts,
        task="regression",
        dtype=dtype,
        name=entry.name,
        feature_names=entry.features,
        target_name=entry.target,
        unit=entry.unit,
        licence=entry.licence,
        source=entry.origin,
        split=str(split),
        preprocessor=Preprocessor.of_numbers(entry.features, parts["x_train"], entry.target, parts["y_train"]),
    )


def whole_split(entry: Entry, split: int | str) -> int:
    """The split as a number in range.

    Args:
        entry: The data set.
        split: A whole number, or its digits.

    Returns:
        The number.

    Raises:
        DataError: If the data set has no such split.
    """
    gaps = f', or "gap0" to "gap{entry.input_shape[0] - 1}"' if entry.kind == "table" else ""
    if not re.fullmatch(r"\d+", str(split)) or int(split) >= entry.splits:
        raise DataError(f"{entry.name} has the splits 0 to {entry.splits - 1}{gaps}; got {split!r}")
    return int(split)


def _gap_rows(entry: Entry, feature: int) -> tuple[np.ndarray, np.ndarray]:
    packed = read_arrays(GAP_SPLITS)[f"{entry.name}_test_mask"]
    masks = np.unpackbits(packed, axis=1)[:, : entry.num_data].astype(bool)  # (D, N)
    if feature >= len(masks):
        raise DataError(f'{entry.name} has the gap splits "gap0" to "gap{len(masks) - 1}"; got "gap{feature}"')
    return np.flatnonzero(~masks[feature]), np.flatnonzero(masks[feature])
