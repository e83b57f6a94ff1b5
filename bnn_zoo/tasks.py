"""What is to be learnt: a data set by name or the user's own CSV, as the command line gives it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnn_zoo import data as data_sets
from bnn_zoo.data import Dataset
from bnn_zoo.errors import UsageError, usage


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which data; exactly one of ``name`` and ``csv``.

    Attributes:
        name: Name of a data set.
        csv: Path of the user's own table.
        target: Its target column.
        split: Number of a split, or "gap0", ... for the gap splits of a table; the seed of the split of a CSV.
        missing: "refuse" rows with missing values, or "drop" them.
        constant: "refuse" columns with one value, or "drop" them.
        task: "regression" or "classification"; None: inferred from the target.
        test_fraction: Share of the rows of a CSV in the test part.
        ignore: Columns of the CSV to leave out.
    """

    name: str | None = None
    csv: Path | None = None
    target: str | None = None
    split: str = "0"
    missing: str = "refuse"
    constant: str = "refuse"
    task: str | None = None
    test_fraction: float = 0.1
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.name is None) == (self.csv is None):
            raise UsageError(
                "give either --data NAME or --csv FILE --target COLUMN; `bnn-zoo list data` shows the names"
            )
        if self.csv is not None and self.target is None:
            raise UsageError(f"--csv {self.csv} needs --target COLUMN, the column to predict")
        if self.name is not None and self.target is not None:
            raise UsageError(f"--target belongs to --csv; the target of {self.name!r} is fixed")

    def load(self) -> Dataset:
        """Load the data.

        Returns:
            The data set.

        Raises:
            UsageError: If it cannot be had, or has no training or test part.
        """
        with usage():
            data = self._load()
        for part, rows in (("training", data.x_train), ("test", data.x_test)):
            if not len(rows):
                raise UsageError(f"data set {data.name!r} has no {part} part; choose another (`bnn-zoo list data`)")
        return data

    def _load(self) -> Dataset:
        if self.name is not None:
            return data_sets.load(self.name, int(self.split) if self.split.isdecimal() else self.split)
        if not self.split.isdecimal():
            raise UsageError(f"--split of a CSV is the seed of a random split, a whole number; got {self.split!r}")
        return data_sets.load_csv(
            str(self.csv),
            str(self.target),
            test_fraction=self.test_fraction,
            split=int(self.split),
            missing=self.missing,  # pyright: ignore[reportArgumentType]
            constant=self.constant,  # pyright: ignore[reportArgumentType]
            task=self.task,  # pyright: ignore[reportArgumentType]
            ignore=self.ignore,
        )

    def to_json(self) -> dict[str, Any]:
        """What identifies the data, without the user's directories; a CSV by its content."""
        if self.csv is None:
            return {"name": self.name, "split": self.split}
        return {
            "csv": self.csv.name,
            "sha256": hashlib.sha256(self.csv.read_bytes()).hexdigest(),
            "target": self.target,
            "split": self.split,
            "missing": self.missing,
            "constant": self.constant,
            "task": self.task,
            "test_fraction": self.test_fraction,
            "ignore": list(self.ignore),
        }
