"""Records of studies: one JSON file for each thing that was measured, kept once it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def number(value: float | int | None) -> float | None:
    """A figure to five digits, as records hold it; None for what is not finite."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")


def keep(path: Path, make: Callable[[], dict[str, Any]], place: str = "") -> None:
    """Write a record unless it is there; it is there whole or not at all.

    Args:
        path: Its place; the folder is made if need be.
        make: Makes it.
        place: Which of how many it is, to be shown before its name.
    """
    if path.exists():
        return
    print(f"{place} {path.name}".strip(), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = make()
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
    print(f"  {record.get('failed') or record['scores']}", flush=True)
