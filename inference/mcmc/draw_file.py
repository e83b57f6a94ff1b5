"""Draws of all chains in one .npy file that is written as they come and read through a memory map."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# NumPy's header for every shape met here, padded to one length so that it can be rewritten in place.
_HEADER = 128


class DrawFile:
    """A .npy array (C, S, ...) on disk, filled row by row; processes may each fill their own chains.

    Args:
        path: The file; made if missing, lengthened if it holds fewer draws per chain.
        num_chains: C.
        num_draws: S.
        shape: Shape of one row.
        dtype: Of the rows; one that NumPy knows.

    Raises:
        OSError: If the file cannot be made or the disk has too little space.
        ValueError: If there is a file of another shape or dtype, or NumPy lacks the dtype.
    """

    def __init__(self, path: Path, num_chains: int, num_draws: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.num_chains, self.shape = path, num_chains, shape
        try:
            self.dtype = torch.empty(0, dtype=dtype).numpy().dtype
        except TypeError as error:
            raise ValueError(f"draws of {dtype} cannot be kept in a .npy file; convert the data to float32") from error
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        self.num_draws = num_draws
        if path.exists():
            held = self._held()
            if held < num_draws:
                self._lengthen(held)
            self.num_draws = max(held, num_draws)
        else:
            self._make(path)
        self._handle: int | None = None

    def write(self, chain: int, draw: int, row: Tensor) -> None:
        """Put one row in its place.

        Args:
            chain: Number of the chain.
            draw: Number of the draw in it.
            row: Values, of the shape of one row.

        Raises:
            OSError: If the disk is full.
        """
        if self._handle is None:
            self._handle = os.open(self.path, os.O_WRONLY)
        # Not through a memory map: pages written to would count as memory of this process until the system cleans them.
        values = np.ascontiguousarray(row.detach().cpu().numpy(), dtype=self.dtype)
        try:
            written = os.pwrite(self._handle, values.reshape(-1).view(np.uint8).data, self._offset(chain, draw))
        except OSError as error:
            raise OSError(f"could not write draw {draw} to {self.path}: {error}; free some space") from error
        if written != self.row_bytes:
            raise OSError(f"could not write draw {draw} to {self.path}: the disk is full")

    def flush(self) -> None:
        """Have everything written so far on the disk."""
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the file; :meth:`write` opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def read(self) -> Tensor:
        """All rows, (C, S, ...), through a memory map: pages are read when touched and never written back."""
        return torch.from_numpy(np.lib.format.open_memmap(self.path, mode="c"))

    def checksum(self, chain: int, num_draws: int) -> int:
        """CRC-32 of the first rows of a chain, as :func:`next_checksum` builds it up."""
        total = 0
        rows = np.lib.format.open_memmap(self.path, mode="r")[chain, :num_draws]
        for row in rows:
            total = zlib.crc32(np.ascontiguousarray(row).data, total)
        return total

    def _offset(self, chain: int, draw: int) -> int:
        return _HEADER + (chain * self.num_draws + draw) * self.row_bytes

    def _make(self, path: Path) -> None:
        size = self.num_chains * self.num_draws * self.row_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if size > free:
                raise OSError(f"it needs {size / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free")
            with path.open("wb") as handle:
                np.lib.format.write_array_header_1_0(
                    handle,
                    {
                        "descr": np.lib.format.dtype_to_descr(self.dtype),
                        "fortran_order": False,
                        "shape": (self.num_chains, self.num_draws, *self.shape),
                    },
                )
                handle.write(b"" if handle.tell() == _HEADER else b"\0" * (_HEADER - handle.tell()))
                handle.truncate(_HEADER + size)
        except OSError as error:
            raise OSError(f"cannot keep draws in {path}: {error}; choose another directory") from error

    def _held(self) -> int:
        """Draws per chain that the present file has room for."""
        try:
            found = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.path} is not a readable .npy file ({error}); delete it") from error
        expected = (self.num_chains, found.shape[1] if found.ndim > 1 else 0, *self.shape)
        if found.shape != expected or found.dtype != self.dtype:
            raise ValueError(
                f"{self.path} holds draws of shape {found.shape} and type {found.dtype}, expected "
                f"({self.num_chains}, S, {', '.join(map(str, self.shape))}) and {self.dtype}; choose another directory"
            )
        return found.shape[1]

    def _lengthen(self, held: int) -> None:
        """Move the rows of each chain into a file with room for more."""
        wider = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self._make(wider)
        with self.path.open("rb") as old, wider.open("r+b") as new:
            for chain in range(self.num_chains):
                old.seek(_HEADER + chain * held * self.row_bytes)
                new.seek(self._offset(chain, 0))
                for _ in range(held):
                    new.write(old.read(self.row_bytes))
            new.flush()
            os.fsync(new.fileno())
        os.replace(wider, self.path)


def next_checksum(total: int, row: Tensor) -> int:
    """CRC-32 of the rows so far and one more."""
    return zlib.crc32(np.ascontiguousarray(row.detach().cpu().numpy()).data, total)
