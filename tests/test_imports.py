"""The arrows between the packages: who may import whom, read from the source, so that nothing need be imported."""

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bnn_models", "inference", "bnn_zoo")
MAY_NOT_IMPORT = {"bnn_models": {"inference", "bnn_zoo"}, "inference": {"bnn_models", "bnn_zoo"}, "bnn_zoo": set()}
LISTS_THE_BACKENDS = {"inference", "inference.registry"}
STARTING_POINTS = "point"


def module_name(path: Path, root: Path) -> str:
    """Dotted name of the file ``path``; a package for its ``__init__.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, root: Path) -> Iterator[str]:
    """Everything ``path`` imports, inside functions too, as absolute dotted names (``a.b`` for b from a)."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from (".".join((*base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


@dataclass(frozen=True)
class Layout:
    """What lies directly inside ``inference``: folders of backends, and the files they share."""

    families: set[str]
    root_files: set[str]


def layout(root: Path) -> Layout:
    """The layout of ``root/inference``."""
    folder = root / "inference"
    return Layout(
        {path.parent.name for path in folder.glob("*/__init__.py")}, {path.stem for path in folder.glob("*.py")}
    )


def violation(module: str, imported: str, inside: Layout) -> str | None:
    """What is wrong with ``module`` importing ``imported``, or None."""
    source, parts = module.split("."), imported.split(".")
    if parts[0] in MAY_NOT_IMPORT[source[0]]:
        return f"{module} imports {imported}: {source[0]} never imports {parts[0]}"
    if source[0] != "inference" or parts[0] != "inference" or module in LISTS_THE_BACKENDS:
        return None
    name = parts[1] if len(parts) > 1 else None
    if name in inside.root_files:
        return None
    if name not in inside.families:
        return f"{module} imports {imported}: inside inference, import the file that holds the name, not the package"
    if len(source) < 2 or source[1] not in inside.families:
        return f"{module} imports {imported}: a root file of inference never imports a family"
    if name not in {source[1], STARTING_POINTS}:
        return f"{module} imports {imported}: a family imports root files, its own folder and point/ only"
    return None


def violations(root: Path) -> list[str]:
    """Every forbidden import under ``root``, one line each."""
    inside = layout(root)
    return [
        problem
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for imported in imported_names(path, root)
        if (problem := violation(module_name(path, root), imported, inside)) is not None
    ]


def packages_on_disk(root: Path) -> set[str]:
    """Dotted names of the folders that hold an ``__init__.py``."""
    return {module_name(path, root) for package in PACKAGES for path in (root / package).rglob("__init__.py")}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A made-up project: a legal skeleton, and ``files`` over it."""
    skeleton = {
        "bnn_models/__init__.py": "",
        "bnn_models/mlp.py": "import torch\n",
        "inference/__init__.py": "from inference.registry import BACKENDS\nfrom inference.mcmc.nuts import NUTS\n",
        "inference/registry.py": "from inference.point.map import MAP\nBACKENDS = [MAP]\n",
        "inference/target.py": "import pyro\n",
        "inference/mcmc/__init__.py": "",
        "inference/mcmc/nuts.py": "from inference.point.map import MAP\nfrom . import hmc\nfrom ..target import T\n",
        "inference/mcmc/hmc.py": "from inference.target import Target\n",
        "inference/point/__init__.py": "",
        "inference/point/map.py": "from inference import target\n",
        "bnn_zoo/__init__.py": "import bnn_models, inference\n",
    }
    for name, text in {**skeleton, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_no_file_of_the_packages_imports_against_the_arrows() -> None:
    assert violations(ROOT) == []


def test_the_walk_reads_files_of_every_package_and_every_family() -> None:
    read = {module_name(path, ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {"inference.target", "inference.point.map", "bnn_models.mlp", "bnn_zoo.cli"} <= read
    assert {"point", "variational", "laplace", "mcmc", "averaging", "ensembles", "particles"} <= layout(ROOT).families


def test_pyproject_lists_exactly_the_packages_on_disk() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk(ROOT))


def test_a_legal_tree_passes(tmp_path: Path) -> None:
    assert violations(write_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("name", "text", "culprit"),
    [
        ("bnn_models/mlp.py", "import inference.target\n", "bnn_models.mlp imports inference.target"),
        ("bnn_models/mlp.py", "from bnn_zoo import data\n", "bnn_models.mlp imports bnn_zoo.data"),
        ("inference/target.py", "from bnn_models.mlp import MLP\n", "inference.target imports bnn_models.mlp.MLP"),
        ("inference/target.py", "def f():\n    import bnn_zoo\n", "inference.target imports bnn_zoo"),
        (
            "inference/point/map.py",
            "import importlib\nimportlib.import_module('bnn_zoo.data')\n",
            "inference.point.map imports bnn_zoo.data",
        ),
        ("inference/target.py", "from inference.mcmc import hmc\n", "inference.target imports inference.mcmc.hmc"),
        ("inference/target.py", "from .point.map import MAP\n", "inference.target imports inference.point.map.MAP"),
        ("inference/target.py", "from . import mcmc\n", "inference.target imports inference.mcmc"),
        ("inference/point/map.py", "from ..mcmc.hmc import H\n", "inference.point.map imports inference.mcmc.hmc.H"),
        ("inference/point/__init__.py", "from ..mcmc import hmc\n", "inference.point imports inference.mcmc.hmc"),
        ("inference/point/map.py", "import inference\n", "inference.point.map imports inference"),
        ("inference/point/map.py", "from inference import NUTS\n", "inference.point.map imports inference.NUTS"),
        ("inference/target.py", "from inference import load\n", "inference.target imports inference.load"),
    ],
)
def test_each_forbidden_import_is_found(tmp_path: Path, name: str, text: str, culprit: str) -> None:
    (problem,) = violations(write_tree(tmp_path, {name: text}))
    assert problem.startswith(f"{culprit}:")


def test_a_package_missing_from_pyproject_would_be_noticed(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"inference/particles/__init__.py": ""})
    assert packages_on_disk(root) - packages_on_disk(write_tree(tmp_path / "other", {})) == {"inference.particles"}
