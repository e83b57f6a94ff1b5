"""What is known of a data set before it is loaded: its file, its public source, and its description."""

from dataclasses import dataclass

from bnn_zoo.data.convert import Converter
from bnn_zoo.data.dataset import Task


@dataclass(frozen=True, kw_only=True)
class Source:
    """Public files that a converter turns into the arrays of one cache file.

    Attributes:
        urls: Address by the name the converter uses.
        convert: The converter.
    """

    urls: dict[str, str]
    convert: Converter


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of the cache.

    Attributes:
        path: Place below the cache directory, e.g. "uci/boston.npz".
        sha256: Checksum of the published file.
        arrays_sha256: Checksum of its arrays (`arrays_digest`), for files converted from the public source.
        source: Where to get it; None if there is no public source that we know.
        bundled: Whether it comes with the package.
    """

    path: str
    sha256: str
    arrays_sha256: str
    source: Source | None = None
    bundled: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one data set before it is loaded.

    Attributes:
        name: Its name.
        task: "regression" or "classification".
        kind: "table", "images" or "toy".
        num_data: Rows, train and test together.
        input_shape: Shape of one input.
        splits: Number of standard splits.
        target: Name of the target.
        unit: Unit of the target.
        features: Column names of a table.
        classes: Names of the classes.
        normal: Mean and standard deviation per channel of pixels in [0, 1], of the training images.
        file: Its file; None for a toy.
        licence: Licence of the data.
        origin: Where the data come from, in words.
    """

    name: str
    task: Task
    kind: str
    num_data: int
    input_shape: tuple[int, ...]
    splits: int
    target: str
    unit: str = ""
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    normal: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,), (1.0,))
    file: DataFile | None = None
    licence: str = ""
    origin: str = ""
