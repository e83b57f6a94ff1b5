"""The directory of a comparison: what it was asked to do, the finished rows, and all files written atomically."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bnn_zoo.errors import UsageError
from bnn_zoo.evaluate import Arrays

_OWN = ("comparison.json", "results.json", "report.html", "rows", "posteriors", "arviz", "plots")


class RunFolder:
    """One comparison on disk.

    Args:
        path: Its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, request: dict[str, Any], *, overwrite: bool) -> bool:
        """Start, or continue what the same request began.

        Args:
            request: What the comparison is of; ``request["backends"]`` maps names to hyperparameters.
            overwrite: Throw away what is there.

        Returns:
            Whether there was something to continue.

        Raises:
            UsageError: If the directory holds another comparison, or something else.
        """
        file = self.path / "comparison.json"
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file; give a directory")
        if overwrite and file.exists():
            for name in _OWN:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if not file.exists() and self.path.is_dir() and any(self.path.iterdir()):
            raise UsageError(f"--out {self.path} holds files that are no comparison; give another directory")
        resumed = file.exists()
        if resumed:
            before = read_json(file)
            if not isinstance(before, dict) or not isinstance(before.get("backends"), dict):
                raise UsageError(f"{file} was not written by bnn-zoo compare; give another --out")
            difference = first_difference(before, request)
            if difference:
                raise UsageError(
                    f"{self.path} holds a comparison with {difference}; give another --out, or --overwrite"
                )
            request = {**request, "backends": {**before["backends"], **request["backends"]}}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, request)
        except OSError as err:
            raise UsageError(f"cannot write to --out {self.path}: {err.strerror or err}") from err
        return resumed

    def row(self, backend: str) -> dict[str, Any] | None:
        """The finished row of a backend, or None; a failed one is not finished."""
        file = self.path / "rows" / f"{backend}.json"
        row = read_json(file) if file.exists() else None
        complete = row is not None and row["status"] == "done" and self._arrays_file(backend).exists()
        return row if complete else None

    def write_row(self, row: dict[str, Any], arrays: Arrays | None) -> None:
        """Keep a row; written last, so that a row on disk is a finished one."""
        if arrays is not None:
            write_arrays(self._arrays_file(row["backend"]), arrays)
        write_json(self.path / "rows" / f"{row['backend']}.json", row)

    def arrays(self, backend: str) -> Arrays:
        """Arrays of a finished row."""
        with np.load(self._arrays_file(backend)) as held:
            return dict(held)

    def posterior_path(self, backend: str) -> Path:
        """Where the posterior of a backend is saved."""
        return self.path / "posteriors" / backend

    def arviz_path(self, backend: str) -> Path:
        """Where the NetCDF file of a backend is written."""
        return self.path / "arviz" / f"{backend}.nc"

    def _arrays_file(self, backend: str) -> Path:
        return self.path / "rows" / f"{backend}.npz"


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between two requests, in words; backends that only one of them has do not count.

    Args:
        before: The earlier request.
        now: The new one.

    Returns:
        For example "seed 0, not 1"; None where they agree.
    """
    now = json.loads(json.dumps(now))
    for key in now:
        if key == "backends":
            for name in before[key].keys() & now[key].keys():
                if before[key][name] != now[key][name]:
                    return f"{name} as {before[key][name]}, not {now[key][name]}"
        elif isinstance(now[key], dict) and isinstance(before.get(key), dict):
            inner = first_difference(before[key], now[key])
            if inner:
                return f"{key} {inner}"
        elif before.get(key) != now[key]:
            return f"{key} {before.get(key)!r}, not {now[key]!r}"
    return None


def plain(value: Any) -> Any:
    """A value as strict JSON has it: NaN becomes null, infinities the texts "inf" and "-inf"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Args:
        file: Where to.
        content: What; see :func:`plain`.
    """
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    replace(file, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_arrays(file: Path, arrays: Arrays) -> None:
    """Write a compressed file of arrays whole or not at all.

    Args:
        file: Where to.
        arrays: Arrays by name.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]

    replace(file, write)


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``file`` and then move it there.

    Args:
        file: The final place; its directory is made.
        write: Called with the temporary place.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Args:
        file: Where from.

    Returns:
        Its content.

    Raises:
        UsageError: If it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise UsageError(f"{file} is not readable ({err}); remove it or start again with --overwrite") from err
