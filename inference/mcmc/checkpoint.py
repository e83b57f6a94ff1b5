"""Checkpoints: the state of every chain in a directory, from which the same fit goes on to the same draws.

``run.safetensors`` says which fit it is, ``chain-0000.safetensors`` and so on hold one chain each, written whole or not
at all whenever that chain has taken enough iterations, and ``draws.npy`` the draws so far. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inference.container import add_tensor, read_file, write_file
from inference.mcmc.recording import DRAWS, PROBES, Recorder
from inference.target import Target

FORMAT_VERSION = 1
RUN = "run.safetensors"
# Settings that may differ when a fit goes on: they change how far it goes or how it runs, not where.
FREE_SETTINGS = frozenset({
    "num_samples",
    "max_seconds",
    "progress",
    "checkpoint",
    "checkpoint_every",
    "num_workers",
    "chains_per_block",
})


class Resumable(Protocol):
    """A chain, or a set of chains in lock step, that can be written down and continued."""

    @property
    def iterations(self) -> int:
        """Iterations done."""
        ...

    @property
    def done(self) -> bool:
        """Whether it is at its end."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures for JSON and tensors."""
        ...

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        ...

    def flush(self) -> None:
        """Have its draws on the disk."""
        ...


class Checkpoint:
    """One directory of checkpoints.

    Attributes:
        compiled: Whether the chains found there ran a compiled program; the same must go on.
        chains_per_block: Chains that one call advanced there; likewise.

    Args:
        directory: Where.
        every: Iterations between two checkpoints of a chain.
    """

    def __init__(self, directory: Path, every: int) -> None:
        self.directory, self.every = directory, every
        self.compiled = False
        self.chains_per_block = 0
        self._chains: dict[int, Resumable] = {}
        self._written: dict[int, int] = {}

    @property
    def exists(self) -> bool:
        """Whether a fit has been here before."""
        return (self.directory / RUN).exists()

    def claim(self, identity: dict[str, Any], target: Target, starts: Tensor) -> dict[str, Any]:
        """Write down which fit this is, or see that it is the one that was here before.

        Args:
            identity: See :func:`identify`.
            target: The target.
            starts: Starting points, (C, P).

        Returns:
            The identity on record.

        Raises:
            OSError: If the directory cannot be written to.
            ValueError: If the directory belongs to another fit, or its record is corrupt.
        """
        file = self.directory / RUN
        if not self.exists:
            values = [_log_density(target, theta) for theta in starts]
            record = {"format": "bnn-zoo run", "format_version": FORMAT_VERSION, **identity, "log_density": values}
            write_file(file, record, {"starts": starts})
            return identity
        saved, tensors = read_file(file, "checkpoint", "bnn-zoo run", FORMAT_VERSION)
        compare(saved, identity, target, tensors["starts"], starts, self.directory)
        return saved

    def read(self, numbers: Iterable[int]) -> dict[int, tuple[dict[str, Any], dict[str, Tensor]]]:
        """States of the chains that have one.

        Args:
            numbers: Numbers of the chains.

        Returns:
            Figures and tensors by number of the chain.

        Raises:
            ValueError: If a file is truncated, corrupt or foreign.
        """
        found, threads = {}, torch.get_num_threads()
        for file in self.directory.glob("chain-*.safetensors"):
            number = int(file.stem.removeprefix("chain-"))
            figures, tensors = read_file(file, "checkpoint", "bnn-zoo chain", FORMAT_VERSION)
            self.compiled, threads = figures["compiled"], figures["threads"]
            found[number] = figures["chain"], tensors
        if found and threads != torch.get_num_threads():
            warnings.warn(
                f"{self.directory} was written with {threads} threads and goes on with {torch.get_num_threads()}: "
                "draws from here on may differ by rounding from those of an uninterrupted run",
                stacklevel=2,
            )
        return {n: found[n] for n in numbers if n in found}

    def attach(
        self, chains: Mapping[int, Any], held: Mapping[int, tuple[dict[str, Any], dict[str, Tensor]]], compiled: bool
    ) -> None:
        """Continue chains from what was read, and watch them from now on.

        Args:
            chains: By number; their ``after_stage`` is set.
            held: What :meth:`read` found.
            compiled: Whether the chains run a compiled program.

        Raises:
            ValueError: If draws on the disk do not belong to the checkpoint, or a compiled program cannot be had.
        """
        if held and compiled != self.compiled:
            raise ValueError(
                f"{self.directory} was written by a compiled program, but there is no C++ compiler here, so the draws "
                "would differ; install one, or start again in another directory"
            )
        self.compiled = compiled
        for number, (figures, tensors) in held.items():
            chains[number].restore(figures, tensors)
            self._written[number] = chains[number].iterations
        for number, chain in chains.items():
            self._chains[number] = chain
            chain.after_stage = lambda number=number: self._after_stage(number)

    def _after_stage(self, number: int) -> None:
        chain = self._chains[number]
        since = chain.iterations - self._written.get(number, 0)
        if since >= self.every or (chain.done and since):
            self.write(number)

    def write(self, number: int) -> None:
        """Write one chain, its draws first."""
        chain = self._chains[number]
        chain.flush()
        figures, tensors = chain.state()
        record = {
            "format": "bnn-zoo chain",
            "format_version": FORMAT_VERSION,
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
            "chain": figures,
        }
        write_file(self.directory / f"chain-{number:04d}.safetensors", record, tensors)
        self._written[number] = chain.iterations

    def write_all(self) -> None:
        """Write every chain that has moved since it was written last."""
        for number, chain in self._chains.items():
            if chain.iterations > self._written.get(number, 0):
                self.write(number)


def identify(
    target: Target, backend: Any, seed: int, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What makes a fit the one it is.

    Args:
        target: Its target.
        backend: Its backend.
        seed: Its seed.
        settings: Fields of the backend; those of :data:`FREE_SETTINGS` are left out.
        tensors: Tensors among the settings, such as probe inputs.

    Returns:
        JSON-serialisable.
    """
    data = hashlib.sha256()
    for leaf in pytree.tree_leaves((target.x, target.y)):
        add_tensor(data, "", leaf)
    given = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(given, name, tensors[name])
    return {
        "versions": {"bnn-zoo": _version("bnn-zoo"), "torch": str(torch.__version__)},
        "data": data.hexdigest(),
        "num_data": target.num_data,
        "sites": [[s.name, list(s.shape), str(s.support)] for s in target.sites],
        "dtype": str(target.dtype),
        "backend": type(backend).__name__,
        "settings": {k: repr(v) for k, v in settings.items() if k not in FREE_SETTINGS},
        "tensors": given.hexdigest(),
        "seed": seed,
    }


def compare(
    saved: Mapping[str, Any],
    own: Mapping[str, Any],
    target: Target,
    saved_starts: Tensor,
    starts: Tensor,
    directory: Path,
) -> None:
    """See that a checkpoint belongs to this fit.

    Args:
        saved: Identity on record.
        own: Identity of this fit.
        target: Its target.
        saved_starts: Starting points on record, (C, P).
        starts: Starting points of this fit, (C, P).
        directory: For messages.

    Raises:
        ValueError: Naming the first difference.
    """
    again = "start again in another directory"
    where = f"the checkpoint in {directory}"
    for name, number in own["versions"].items():
        if saved["versions"][name] != number:
            raise ValueError(
                f"{where} was written with {name} {saved['versions'][name]}, this is {number}: the draws would differ; "
                f"install that version, or {again}"
            )
    if saved["backend"] != own["backend"]:
        raise ValueError(f"{where} is one of {saved['backend']}, not {own['backend']}; {again}")
    if saved["sites"] != own["sites"]:
        before, now = next(pair for pair in zip_longest(saved["sites"], own["sites"]) if pair[0] != pair[1])
        raise ValueError(
            f"{where} belongs to another model: it has the site {_site(before)} where this one has {_site(now)}; "
            f"{again}"
        )
    if saved["data"] != own["data"] or saved["dtype"] != own["dtype"]:
        raise ValueError(
            f"{where} belongs to other data ({saved['num_data']} rows of {saved['dtype']}, here {own['num_data']} of "
            f"{own['dtype']}, or other values): pass the same data, or {again}"
        )
    for name in sorted(own["settings"].keys() | saved["settings"].keys()):
        before, now = saved["settings"].get(name), own["settings"].get(name)
        if before != now:
            raise ValueError(
                f"{where} was written with `{name}`={before}, got {now}: only {', '.join(sorted(FREE_SETTINGS))} may "
                f"change; use the old value, or {again}"
            )
    densities = [_log_density(target, theta) for theta in saved_starts.to(target.device)]
    if not all(_close(a, b) for a, b in zip(saved["log_density"], densities, strict=True)):
        raise ValueError(
            f"{where} belongs to another model: the log density at its first point was {saved['log_density'][0]:.8g} "
            f"nats and is {densities[0]:.8g} with this one; a prior, the likelihood or a constant differs; {again}"
        )
    if saved["tensors"] != own["tensors"]:
        raise ValueError(f"{where} had another mass matrix or other probe inputs: pass the same, or {again}")
    if saved["seed"] != own["seed"]:
        raise ValueError(f"{where} was written with seed {saved['seed']}, got {own['seed']}: pass that, or {again}")
    if not torch.equal(saved_starts, starts.cpu()):
        raise ValueError(f"{where} started elsewhere: pass the same `init`, or {again}")


def check_draws(recorder: Recorder, directory: Path) -> None:
    """See that the draws on the disk are those that the chains were written with.

    Args:
        recorder: Restored records.
        directory: The checkpoint's, for messages.

    Raises:
        ValueError: If a draw is missing or differs.
    """
    for file in recorder.files:
        which = 0 if file.path.name == DRAWS else 1
        for chain, record in zip(recorder.numbers, recorder.records, strict=True):
            if file.checksum(chain, len(record)) != record.checksums[which]:
                raise ValueError(
                    f"{file.path} does not hold the {len(record)} draws of chain {chain} that the checkpoint in "
                    f"{directory} was written with: it is missing, truncated or changed; start again in another "
                    "directory"
                )


def refuse_leftovers(*directories: Path | None) -> None:
    """Refuse to write over draws of an earlier fit, which a posterior may still be reading.

    Raises:
        FileExistsError: If there are some.
    """
    for directory in directories:
        for name in (DRAWS, PROBES):
            if directory is not None and (directory / name).exists():
                raise FileExistsError(
                    f"{directory / name} holds the draws of an earlier fit; delete it, choose another directory, or "
                    "pass its `checkpoint` to go on with that fit"
                )


def _log_density(target: Target, theta: Tensor) -> float:
    with torch.no_grad():
        return float(target.log_density(theta))


def _close(a: float, b: float) -> bool:
    return a == b or (a != a and b != b) or abs(a - b) <= 1e-6 * (1 + abs(a))


def _site(entry: list[Any] | None) -> str:
    return "(none)" if entry is None else f"{entry[0]!r} of shape {tuple(entry[1])} on {entry[2]}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
