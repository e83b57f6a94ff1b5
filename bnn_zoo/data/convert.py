"""From the files that public sources serve to the arrays of our cache.

Public repositories serve text and idx files, the cache holds NumPy archives, and the two never have equal bytes; so
what is converted is checked by a checksum of the *arrays*: any change at the source is noticed, any compression is
fine.
"""

import gzip
import hashlib
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bnn_zoo.data.dataset import DataError

Arrays = dict[str, np.ndarray]
Converter = Callable[[Mapping[str, Path]], Arrays]


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and values, independent of how the arrays are stored.

    Args:
        arrays: Arrays by name, in any order.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def from_uci_text(files: Mapping[str, Path]) -> Arrays:
    """One UCI table with its standard splits, as laid out by the MC dropout experiments (one folder of text files).

    Args:
        files: "data.txt", "index_features.txt", "index_target.txt", "index_train_0.txt", "index_test_0.txt", ...

    Returns:
        `X` (N, D), `y` (N,), `train_idx` (splits, n), `test_idx` (splits, m).
    """
    data = np.loadtxt(files["data.txt"], ndmin=2)
    features = _indices(files["index_features.txt"])
    target = _indices(files["index_target.txt"])
    num_splits = sum(name.startswith("index_test_") for name in files)
    return {
        "X": data[:, features],
        "y": data[:, target[0]],
        "train_idx": np.stack([_indices(files[f"index_train_{split}.txt"]) for split in range(num_splits)]),
        "test_idx": np.stack([_indices(files[f"index_test_{split}.txt"]) for split in range(num_splits)]),
    }


def _indices(path: Path) -> np.ndarray:
    # Some of the published index files are written as reals.
    return np.loadtxt(path, ndmin=1).astype(np.int32)


def from_idx(files: Mapping[str, Path]) -> Arrays:
    """MNIST-like images from the four gzipped idx files.

    Args:
        files: "train-images", "train-labels", "t10k-images", "t10k-labels".

    Returns:
        `x_train` (N, 28, 28), `y_train` (N,), `x_test`, `y_test`, all uint8.
    """
    return {
        "x_train": read_idx(files["train-images"]),
        "y_train": read_idx(files["train-labels"]),
        "x_test": read_idx(files["t10k-images"]),
        "y_test": read_idx(files["t10k-labels"]),
    }


def from_idx_balanced(files: Mapping[str, Path]) -> Arrays:
    """The first 500 images of each of ten classes, in file order.

    Args:
        files: "t10k-images", "t10k-labels".

    Returns:
        `x` (5000, 28, 28) and `y` (5000,), uint8.
    """
    images, labels = read_idx(files["t10k-images"]), read_idx(files["t10k-labels"])
    rank = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return {"x": images[rank < 500], "y": labels[rank < 500]}


def from_cifar_binary(files: Mapping[str, Path]) -> Arrays:
    """The CIFAR-10 test set from the binary version of the published archive.

    Args:
        files: "archive", the tar.gz.

    Returns:
        `x` (10000, 3, 32, 32) and `y` (10000,), uint8, in the original order.

    Raises:
        DataError: If the archive lacks the test batch.
    """
    member = "cifar-10-batches-bin/test_batch.bin"
    with tarfile.open(files["archive"], "r:gz") as archive:
        stream = archive.extractfile(member)
        if stream is None:
            raise DataError(f"expected a file {member!r} in the CIFAR-10 archive, found a folder")
        rows = np.frombuffer(stream.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return {"x": rows[:, 1:].reshape(-1, 3, 32, 32), "y": rows[:, 0]}


def read_idx(path: Path) -> np.ndarray:
    """One gzipped idx file of unsigned bytes.

    Args:
        path: The file.

    Returns:
        The array it holds, uint8.

    Raises:
        DataError: If the file is not an idx file of bytes.
    """
    with gzip.open(path) as stream:
        content = stream.read()
    if content[:3] != b"\x00\x00\x08":
        raise DataError(f"expected an idx file of bytes in {path.name}, found the magic number {content[:4].hex()}")
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
