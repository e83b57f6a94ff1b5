"""What chains leave behind: thinned draws of chosen sites, in memory or on disk, function values and statistics.

Every sampler of this package hands each draw to a :class:`Record`, one per chain; chains that step together may hand
over all at once through :class:`Recorder`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from inference.mcmc.draw_file import DrawFile, next_checksum
from inference.target import Site

# How the statistics of the iterations between two kept draws become one number; any other name keeps the last.
_MERGED: dict[str, Callable[[Sequence[float]], float]] = {
    "diverging": max,
    "tree_depth": max,
    "n_steps": sum,
    "acceptance_rate": lambda values: sum(values) / len(values),
}
DRAWS, PROBES = "draws.npy", "probes.npy"


@dataclass(frozen=True)
class Recording:
    """What is kept of each chain.

    Attributes:
        num_samples: Iterations after warm-up; every ``thinning``-th becomes a draw.
        thinning: k.
        sites: Sites whose entries are kept; None for all of theta.
        probe: Function values of one theta (P,), any fixed shape.
        directory: Where draws are written; None for memory.
        probe_directory: Where function values are written; None for memory.
        checked: Sum up what is written, for a checkpoint to verify.
    """

    num_samples: int
    thinning: int = 1
    sites: tuple[Site, ...] | None = None
    probe: Callable[[Tensor], Tensor] | None = None
    directory: Path | None = None
    probe_directory: Path | None = None
    checked: bool = False

    @property
    def num_kept(self) -> int:
        """Draws S of a complete chain."""
        return self.num_samples // self.thinning

    def reduce(self, theta: Tensor) -> Tensor:
        """The kept entries of theta (..., P)."""
        if self.sites is None:
            return theta
        return torch.cat([theta[..., s.start : s.stop] for s in self.sites], -1)


def matching_sites(sites: Sequence[Site], patterns: str | Sequence[str] | None) -> tuple[Site, ...] | None:
    """Sites that match, with their slices of the whole theta.

    Args:
        sites: All there are.
        patterns: ``fnmatch`` pattern(s); None for all.

    Returns:
        The sites, or None where all are kept.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    if patterns is None:
        return None
    names = [s.name for s in sites]
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"`keep`: no site matches {pattern!r}; the model has {names}")
    chosen = tuple(s for s in sites if any(fnmatch.fnmatchcase(s.name, p) for p in wanted))
    return None if len(chosen) == len(names) else chosen


class Rows(Protocol):
    """Rows of one chain, filled from the first on."""

    def write(self, draw: int, row: Tensor) -> None:
        """Put a row in its place."""
        ...

    def read(self) -> Tensor:
        """All rows, (S, ...), those not yet written undefined."""
        ...

    def flush(self) -> None:
        """Have everything written on the disk, where there is one."""
        ...


class MemoryRows:
    """Rows in a tensor.

    Args:
        num: Number of rows S.
        like: A row.
    """

    def __init__(self, num: int, like: Tensor) -> None:
        self.values = like.new_zeros(num, *like.shape)

    def write(self, draw: int, row: Tensor) -> None:
        """Put a row in its place."""
        self.values[draw] = row

    def read(self) -> Tensor:
        """All rows, (S, ...)."""
        return self.values

    def flush(self) -> None:
        """Nothing to do."""


class FileRows:
    """Rows of one chain of a file that all chains share.

    Args:
        file: The file.
        chain: Number of the chain.
    """

    def __init__(self, file: DrawFile, chain: int) -> None:
        self.file, self.chain = file, chain

    def write(self, draw: int, row: Tensor) -> None:
        """Put a row in its place."""
        self.file.write(self.chain, draw, row)

    def read(self) -> Tensor:
        """All rows, (S, ...), through a memory map."""
        return self.file.read()[self.chain]

    def flush(self) -> None:
        """Have everything on the disk."""
        self.file.flush()


class Record:
    """Draws, function values and statistics of one chain, filled while it runs.

    Attributes:
        stats: One list per statistic, a number per kept draw.
        num_seen: Iterations after warm-up, kept or not.
        checksums: CRC-32 of the kept draws and of their function values.

    Args:
        recording: What is kept.
        draws: Receives the draws.
        probes: Receives the function values.
    """

    def __init__(self, recording: Recording, draws: Rows, probes: Rows | None = None) -> None:
        self.recording, self._draws, self._probes = recording, draws, probes
        self.stats: dict[str, list[float]] = {}
        self.num_seen = 0
        self.checksums = [0, 0]
        self._pending: list[dict[str, float]] = []

    def __len__(self) -> int:
        return self.num_seen // self.recording.thinning

    @property
    def draws(self) -> Tensor:
        """Kept draws, (S, kept P); the first ``len(self)`` are filled."""
        return self._draws.read()

    @property
    def probes(self) -> Tensor | None:
        """Function values of the kept draws, (S, ...)."""
        return None if self._probes is None else self._probes.read()

    def add(self, theta: Tensor, stats: Mapping[str, float]) -> None:
        """Take one iteration after warm-up.

        Args:
            theta: Where the chain is, (P,).
            stats: Statistics under ArviZ's names.
        """
        self._pending.append(dict(stats))
        if (self.num_seen + 1) % self.recording.thinning == 0:
            self._keep(theta)
            self._pending.clear()
        self.num_seen += 1

    def _keep(self, theta: Tensor) -> None:
        draw = len(self)
        row = self.recording.reduce(theta)
        self._draws.write(draw, row)
        if self.recording.checked:
            self.checksums[0] = next_checksum(self.checksums[0], row)
        if self._probes is not None and self.recording.probe is not None:
            values = self.recording.probe(theta)
            self._probes.write(draw, values)
            if self.recording.checked:
                self.checksums[1] = next_checksum(self.checksums[1], values)
        for name in self._pending[-1]:
            merge = _MERGED.get(name, lambda values: values[-1])
            self.stats.setdefault(name, []).append(float(merge([p[name] for p in self._pending])))

    def flush(self) -> None:
        """Have the draws so far on the disk."""
        self._draws.flush()
        if self._probes is not None:
            self._probes.flush()

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None, Tensor | None]:
        """What :meth:`adopt` needs in another process: the state, and draws and function values held in memory."""
        num, recording = len(self), self.recording
        draws = self.draws[:num] if recording.directory is None else None
        probes = self.probes[:num] if self.probes is not None and recording.probe_directory is None else None
        return *self.state(), draws, probes

    def adopt(
        self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor], draws: Tensor | None, probes: Tensor | None
    ) -> None:
        """Take over a record that another process has filled."""
        self.restore(figures, tensors)
        for rows, values in ((self._draws, draws), (self._probes, probes)):
            if rows is not None and values is not None:
                for draw, row in enumerate(values):
                    rows.write(draw, row)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures for JSON and tensors; the draws themselves are in their file."""
        figures = {"num_seen": self.num_seen, "checksums": self.checksums, "pending": self._pending}
        tensors = {f"stat.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.stats.items()}
        return figures, tensors

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        self.num_seen, self.checksums = figures["num_seen"], list(figures["checksums"])
        self._pending = [dict(p) for p in figures["pending"]]
        self.stats = {k.removeprefix("stat."): v.tolist() for k, v in tensors.items() if k.startswith("stat.")}


class Recorder:
    """The records of all chains of one fit.

    Args:
        recording: What is kept.
        starts: Starting points, (C, P), for sizes and dtype.
        chains: Numbers of the chains that this process runs; all by default.
    """

    def __init__(self, recording: Recording, starts: Tensor, chains: Sequence[int] | None = None) -> None:
        self.recording = recording
        self.num_chains = starts.shape[0]
        row = recording.reduce(starts[0])
        with torch.no_grad():
            value = None if recording.probe is None else recording.probe(starts[0])
        self.files: list[DrawFile] = []
        make_draws = self._maker(recording.directory, DRAWS, row)
        make_probes = None if value is None else self._maker(recording.probe_directory, PROBES, value)
        self.numbers = list(range(self.num_chains) if chains is None else chains)
        self.records = [Record(recording, make_draws(c), make_probes and make_probes(c)) for c in self.numbers]

    def _maker(self, directory: Path | None, name: str, row: Tensor) -> Callable[[int], Rows]:
        num = self.recording.num_kept
        if directory is None:
            return lambda chain: MemoryRows(num, row)
        file = DrawFile(directory / name, self.num_chains, num, tuple(row.shape), row.dtype)
        self.files.append(file)
        return lambda chain: FileRows(file, chain)

    def add(self, thetas: Tensor, stats: Mapping[str, Tensor]) -> None:
        """Take one iteration of all chains.

        Args:
            thetas: (C, P).
            stats: Statistics under ArviZ's names, each (C,).
        """
        columns = {name: value.tolist() for name, value in stats.items()}
        for chain, record in enumerate(self.records):
            record.add(thetas[chain], {name: column[chain] for name, column in columns.items()})

    @property
    def num_kept(self) -> int:
        """Draws that every chain has."""
        return min(min(len(r) for r in self.records), self.recording.num_kept)

    def draws(self) -> Tensor:
        """Draws that every chain has, (C, S, kept P); a memory map where they are on disk."""
        return self._stack(DRAWS, self.recording.directory, [r.draws for r in self.records])

    def probes(self) -> Tensor | None:
        """Function values of these draws, (C, S, ...)."""
        values = [r.probes for r in self.records]
        kept = [v for v in values if v is not None]
        return self._stack(PROBES, self.recording.probe_directory, kept) if kept else None

    def stats(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Statistics of these draws.

        Args:
            dtypes: Of statistics that are not float64.

        Returns:
            Each (C, S).
        """
        num = self.num_kept
        return {
            name: torch.tensor([r.stats[name][:num] for r in self.records], dtype=torch.float64).to(
                dtypes.get(name, torch.float64)
            )
            for name in self.records[0].stats
        }

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()

    def _stack(self, name: str, directory: Path | None, chains: Sequence[Tensor]) -> Tensor:
        num = self.num_kept
        for file in self.files:
            if directory is not None and file.path == directory / name:
                return file.read()[:, :num]
        return torch.stack([c[:num] for c in chains])
