"""Where the files are, whether they are the right ones, and how to get them.

Order of search: the package itself, then the cache directory (`BNN_ZOO_DATA`, or else the user's cache directory), then
the public source. Nothing is used whose checksum is not the registered one, and nothing unfinished stays in the cache.
"""

import hashlib
import lzma
import os
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import TracebackType

import numpy as np
import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bnn_zoo.data.convert import Arrays, arrays_digest
from bnn_zoo.data.dataset import DataError
from bnn_zoo.data.entries import DataFile, Source
from bnn_zoo.data.registry import entry_named

_TIMEOUT = 30  # seconds without a byte
_GET_AGAIN = "get it again with `bnn-zoo data get`, or put the right file there"


class ChecksumError(DataError):
    """A file that is not the one the registry knows."""


class DownloadError(DataError):
    """A file that could not be downloaded."""


def cache_dir() -> Path:
    """The cache directory.

    Returns:
        `BNN_ZOO_DATA` if that is set, else the user's cache directory of this platform.
    """
    chosen = os.environ.get("BNN_ZOO_DATA")
    return Path(chosen).expanduser() if chosen else Path(pooch.os_cache("bnn-zoo"))


def whereabouts(file: DataFile | None) -> str:
    """Where a file would come from: "made here", "bundled", "cache", or "download".

    Args:
        file: A registered file; None for data that are generated.

    Returns:
        One of the four.
    """
    if file is None:
        return "made here"
    if file.bundled:
        return "bundled"
    return "cache" if (cache_dir() / file.path).is_file() else "download"


def read_arrays(file: DataFile, *, progress: bool | None = None) -> Arrays:
    """The arrays of a registered file, downloaded first if need be, and checked.

    Args:
        file: The file.
        progress: Whether to show a bar while downloading; None: on a terminal only.

    Returns:
        Arrays by name.
    """
    if file.bundled:
        with resources.as_file(resources.files("bnn_zoo.data") / "bundled" / Path(file.path).name) as path:
            return checked_arrays(path, file)
    path = cache_dir() / file.path
    if not path.is_file():
        path = fetch_file(file, progress=progress)
    return checked_arrays(path, file)


def checked_arrays(path: Path, file: DataFile) -> Arrays:
    """The arrays of a file on disk, if they are the registered ones.

    Args:
        path: The file on disk.
        file: What it should be.

    Returns:
        Arrays by name.

    Raises:
        ChecksumError: If neither the file nor its arrays have the registered checksum.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    expectation = f"sha256 {found}, expected {file.sha256}"
    try:
        # Opened here because numpy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as err:
        raise ChecksumError(f"{path} is damaged or another version ({expectation}; {err}); {_GET_AGAIN}") from err
    if found != file.sha256 and arrays_digest(arrays) != file.arrays_sha256:
        raise ChecksumError(f"{path} is damaged or another version ({expectation}); {_GET_AGAIN}")
    return arrays


def fetch(name: str, *, base_url: str | None = None, progress: bool | None = None) -> Path | None:
    """Make sure that the file of a data set is there, downloading it when it is not, or not the right one.

    Args:
        name: Name of the data set.
        base_url: A mirror with the layout of the cache (`uci/NAME.npz`, `images/NAME.npz`); None: the public source.
        progress: Whether to show a bar; None: on a terminal only.

    Returns:
        The file in the cache; None for a data set that needs none (bundled, or made here).
    """
    file = entry_named(name).file
    if file is None or file.bundled:
        return None
    path = cache_dir() / file.path
    if path.is_file():
        try:
            checked_arrays(path, file)
        except ChecksumError:
            return fetch_file(file, base_url=base_url, progress=progress)
        return path
    return fetch_file(file, base_url=base_url, progress=progress)


def fetch_file(file: DataFile, *, base_url: str | None = None, progress: bool | None = None) -> Path:
    """Download one file into the cache, check it, and only then put it in its place.

    Args:
        file: The registered file.
        base_url: A mirror with the layout of the cache; None: the public source, converted.
        progress: Whether to show a bar; None: on a terminal only.

    Returns:
        The file in the cache.

    Raises:
        DownloadError: If the server or the cache directory could not be used, or no public source is known.
    """
    if base_url is None and file.source is None:
        raise DownloadError(f"no public source is known for {file.path}; {_by_hand(file)}")
    path = cache_dir() / file.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same directory, so that the last step is a rename: readers see the whole file or none.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as scratch:
            ready = Path(scratch) / path.name
            if base_url is not None:
                with _bar(file.path, progress) as bar:
                    _download(f"{base_url.rstrip('/')}/{file.path}", ready, bar)
            elif file.source is not None:
                _convert(file.source, Path(scratch), ready, file.path, progress)
            _check_download(ready, file)
            os.replace(ready, path)
    except requests.RequestException as err:
        raise DownloadError(f"could not download {file.path}: {err}. Try again, or {_by_hand(file)}") from err
    except OSError as err:
        raise DownloadError(
            f"could not write {path}: {err}. Set BNN_ZOO_DATA to a directory that can be written"
        ) from err
    return path


def _check_download(ready: Path, file: DataFile) -> None:
    try:
        checked_arrays(ready, file)
    except ChecksumError as err:
        found = hashlib.sha256(ready.read_bytes()).hexdigest()
        raise ChecksumError(
            f"the download of {file.path} is not the registered file (sha256 {found}, expected {file.sha256}); "
            f"nothing was kept. Try again, or {_by_hand(file)}"
        ) from err


def _by_hand(file: DataFile) -> str:
    return (
        f"put the file with sha256 {file.sha256} at {cache_dir() / file.path} "
        "(or set BNN_ZOO_DATA to a directory that has it)"
    )


def _convert(source: Source, scratch: Path, ready: Path, title: str, progress: bool | None) -> None:
    raw = {}
    with _bar(title, progress) as bar:
        for number, (name, url) in enumerate(source.urls.items()):
            raw[name] = scratch / f"raw-{number}"
            _download(url, raw[name], bar)
    try:
        arrays = source.convert(raw)
    except (ValueError, IndexError, KeyError, OSError, EOFError, zlib.error, struct.error, tarfile.TarError) as err:
        raise ChecksumError(f"{title}: the public source is no longer what it was ({err}); nothing was kept") from err
    np.savez_compressed(ready, **arrays)  # pyright: ignore[reportArgumentType]


def _download(url: str, path: Path, bar: "_PoochBar | None") -> None:
    pooch.HTTPDownloader(timeout=_TIMEOUT, progressbar=bar or False)(  # pyright: ignore[reportArgumentType]
        url, str(path), None
    )


class _PoochBar:
    """A rich bar with the interface that pooch expects of a progress bar."""

    def __init__(self, title: str) -> None:
        self.total = 0
        columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> "_PoochBar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, num_bytes: int) -> None:
        """Advance by so many bytes."""
        self._progress.update(self._task, advance=num_bytes, total=self.total or None)

    def reset(self) -> None:
        """Start the next file."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Nothing: the bar stays for the next file of the same data set."""


@contextmanager
def _bar(title: str, progress: bool | None) -> Iterator[_PoochBar | None]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield None
        return
    with _PoochBar(title) as bar:
        yield bar
