"""Data sets: standard UCI splits, images, seeded toys, and the user's own CSV files.

Example:
    >>> data = load("energy", split=0)
    >>> data.x_train.shape, data.target_name, data.unit
    (torch.Size([691, 8]), 'heating_load', 'kWh/m2')
"""

from dataclasses import dataclass

import torch

from bnn_zoo.data.csv_files import load_csv, read_csv
from bnn_zoo.data.dataset import DataError, Dataset, Task
from bnn_zoo.data.images import load_images
from bnn_zoo.data.preprocessor import Column, Preprocessor
from bnn_zoo.data.registry import ENTRIES, entry_named
from bnn_zoo.data.store import ChecksumError, DownloadError, cache_dir, fetch, whereabouts
from bnn_zoo.data.tabular import load_table
from bnn_zoo.data.toys import load_toy

__all__ = [
    "ChecksumError",
    "Column",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "DownloadError",
    "Preprocessor",
    "Task",
    "available",
    "cache_dir",
    "fetch",
    "load",
    "load_csv",
    "read_csv",
    "splits",
]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One line of the list of data sets.

    Attributes:
        name: Its name, for `load`.
        task: "regression" or "classification".
        kind: "table", "images" or "toy".
        num_data: Rows, train and test together.
        num_features: Inputs D.
        splits: Number of standard splits.
        gap_splits: Number of gap splits.
        where: "bundled", "made here", "cache" (there already) or "download".
        licence: Licence of the data.
        source: Where the data come from.
    """

    name: str
    task: Task
    kind: str
    num_data: int
    num_features: int
    splits: int
    gap_splits: int
    where: str
    licence: str
    source: str


def load(name: str, split: int | str = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    """A data set by name, standardised on its training part; downloaded first if it is not here.

    Args:
        name: One of the names that `available` lists.
        split: Number of a standard split, the seed of a toy, or "gap0", "gap1", ... for the gap splits of a table.
        dtype: Type of the inputs and of real targets.

    Returns:
        Train and test parts with names, units and licence.
    """
    entry = entry_named(name)
    loader = {"table": load_table, "images": load_images, "toy": load_toy}[entry.kind]
    return loader(entry, split, dtype)


def splits(name: str) -> int:
    """Number of standard splits of a data set.

    Args:
        name: One of the names that `available` lists.

    Returns:
        The number; splits are 0 to this minus 1.
    """
    return entry_named(name).splits


def available() -> list[DatasetInfo]:
    """Every data set, bundled ones first, with where it would come from on this machine.

    Returns:
        One line per data set.
    """
    return [
        DatasetInfo(
            name=entry.name,
            task=entry.task,
            kind=entry.kind,
            num_data=entry.num_data,
            num_features=int(torch.tensor(entry.input_shape).prod()),
            splits=entry.splits,
            gap_splits=entry.input_shape[0] if entry.kind == "table" else 0,
            where=whereabouts(entry.file),
            licence=entry.licence,
            source=entry.origin,
        )
        for entry in ENTRIES.values()
    ]
