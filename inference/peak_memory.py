"""Highest resident memory of this process while something runs, above what it held when that began.

On Linux the kernel keeps the high-water mark; it is reset at the start, so that a peak of a millisecond counts and one
of an earlier fit does not. Memory that earlier work freed but the C library kept is given back first (glibc): what is
measured would fill it without a trace otherwise. Where the mark cannot be reset, memory is looked at every 20 ms
instead, and shorter peaks are missed; where the system says nothing, peaks are 0.

Not counted: memory of accelerators, of other processes (``num_workers``), and of what exists already when it begins,
also garbage that is collected and reused later. Other threads of the process do count, and the kernel's figures are
rounded to some hundred kilobytes.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Self

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_INTERVAL = 0.02
# The mark is one for the whole process: whoever resets it first tells those that run already.
_running: list[PeakMemory] = []
_lock = threading.Lock()


class PeakMemory:
    """Measures what runs inside it; a context manager, which may run inside or beside another.

    Attributes:
        bytes: The peak above the start, known at the end.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        _give_back()
        with _lock:
            _tell()
            self._exact = _reset_mark()
            self._base = self._highest = _read("VmRSS")
            _running.append(self)
        if not self._exact and self._base:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with _lock:
            _tell()
            _running.remove(self)
        self.bytes = self._highest - self._base

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.look()

    def look(self) -> None:
        """Take note of the highest memory since the mark was reset, or of the present one."""
        self._highest = max(self._highest, _read("VmRSS"), _read("VmHWM") if self._exact else 0)


def _tell() -> None:
    for meter in _running:
        meter.look()


def _reset_mark() -> bool:
    """Set the high-water mark to the present memory; whether that worked."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _read(field: str) -> int:
    """A size in the system's account of this process, bytes (0 where there is none)."""
    if not _STATUS.exists():
        return 0
    lines = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return next((1024 * int(kilobytes) for _, kilobytes, _ in lines), 0)


def _give_back() -> None:
    """Return to the system what the C library holds without using it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:
        trim(0)
