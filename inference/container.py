"""One safetensors file with a JSON record and a checksum: written whole or not at all, never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_file(file: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a record and tensors, replacing an older file in one step.

    The new file is written beside the final one, flushed to the disk and moved into place, so a process that is killed
    leaves either the old or the new one.

    Args:
        file: Where to; its directory is made if missing.
        record: JSON-serialisable, but for tensors, arrays and sets, which become lists; anything else becomes its
            ``repr``.
        tensors: By name.

    Raises:
        OSError: If the file cannot be written (a full disk, say); an older one stays as it was.
    """
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(record, default=_plain)
    metadata = {"record": text, "sha256": _digest(plain, text)}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(file)
        save_file(plain, str(temporary), metadata=metadata)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {file}: {error}; an older one there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_file(file: Path, what: str, form: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a file that :func:`write_file` wrote.

    Args:
        file: The file; it exists.
        what: What it should hold, for messages: "posterior", "checkpoint".
        form: The record's "format".
        version: Highest "format_version" that can be read.

    Returns:
        The record and the tensors.

    Raises:
        ValueError: If the file is truncated, foreign, too new or corrupt.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata = handle.metadata() or {}
            text = metadata.get("record", "null")
            record = json.loads(text)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} is not readable ({error}): it is truncated or not a safetensors file; save again"
        ) from error
    if not isinstance(record, dict) or record.get("format") != form:
        raise ValueError(f"{file} is a safetensors file, but not a {what} saved by this library")
    if record.get("format_version", 0) > version:
        raise ValueError(
            f"{file} has format version {record['format_version']}, this library reads up to {version}; update"
        )
    if metadata.get("sha256") != _digest(tensors, text):
        raise ValueError(f"{file} is corrupt: it does not match its checksum; save again")
    return record, tensors


def add_tensor(total: Any, name: str, value: Tensor) -> None:
    """Feed a tensor's name, dtype, shape and bytes to a hash."""
    total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    if value.numel():
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        add_tensor(total, name, tensors[name])
    return total.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON should hold in place of a tensor, array, set or anything else a backend put in its record."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value) if isinstance(value, (set, frozenset)) else repr(value)


def _remove_leftovers(file: Path) -> None:
    """Delete what writers in killed processes left behind."""
    for leftover in file.parent.glob(f".{file.name}.*"):
        number = leftover.suffix[1:]
        if number.isdigit() and not Path("/proc", number).exists() and Path("/proc/self").exists():
            leftover.unlink(missing_ok=True)
