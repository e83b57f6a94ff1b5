"""What a fit shows while it runs and records when it is done: bars with figures, wall time, memory, warnings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Self

from inference.peak_memory import PeakMemory


@dataclass
class FitInfo:
    """What a fit cost and what it warned of.

    Attributes:
        gradients: Gradient evaluations, in passes over the full data (a minibatch of B counts B/N).
        seconds: Wall time.
        peak_bytes: Highest resident memory above that at the start of the fit; see :mod:`inference.peak_memory` for
            what it leaves out.
        warnings: (class name, text) of every warning.
        extra: Figures of the method itself, JSON-serialisable.
    """

    gradients: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    warnings: list[tuple[str, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Bar:
    """A rich progress bar with figures; as a context manager.

    Args:
        total: Number of steps.
        description: What is running.
        show: True, False, or None for terminals only.
    """

    _INTERVAL = 0.1

    def __init__(self, total: int, description: str, show: bool | None) -> None:
        self.total, self.description = total, description
        self._show = show
        self._progress: Any = None
        self._pending = 0
        self._last = 0.0

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if self._show or (self._show is None and console.is_terminal):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self.description, total=self.total, figures="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Move on; figures (loss=..., acceptance=...) are shown beside the bar."""
        self._pending += steps
        now = time.monotonic()
        if self._progress is None or now - self._last < self._INTERVAL:
            return
        text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        self._progress.update(self._task, advance=self._pending, figures=text)
        self._pending, self._last = 0, now

    @property
    def shown(self) -> bool:
        """Whether anybody sees the figures (computing them may cost)."""
        return self._progress is not None


class Measured:
    """Wall time and the highest resident memory above the start, as a context manager.

    Args:
        info: Where they are written.
    """

    def __init__(self, info: FitInfo) -> None:
        self.info = info
        self._memory = PeakMemory()

    def __enter__(self) -> None:
        self._memory.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.info.seconds = time.perf_counter() - self._start
        self._memory.__exit__(*exc)
        self.info.peak_bytes = self._memory.bytes
