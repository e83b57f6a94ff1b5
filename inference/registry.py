"""BACKENDS, the one list of every backend: what README, command line and the contract tests are made from."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from inference.averaging import SWAG
from inference.backend import Backend
from inference.bridges import PyroGuideVI, PyroMCMC
from inference.ensembles import DeepEnsemble
from inference.laplace import (
    DenseLaplace,
    DiagonalLaplace,
    FunctionalLaplace,
    KroneckerLaplace,
    LowRankLaplace,
    SampledLaplace,
)
from inference.mcmc import HMC, MCLMC, MILE, NUTS, ChEESHMC
from inference.particles import SVGD
from inference.point import MAP
from inference.variational import MeanFieldVI, Pathfinder


@dataclass(frozen=True)
class BackendEntry:
    """One row of the backend table.

    Attributes:
        name: Snake-case name, as on the command line.
        cls: The class.
        family: Folder it lives in.
        needs: Of "gradients", "layers", "full batch".
        capabilities: Of "log_density", "log_evidence", "minibatches", "temperature", "chains".
        bias: What it gets wrong, in one line.
        reference: Paper, author and year.
    """

    name: str
    cls: type[Backend]
    family: str
    needs: frozenset[str]
    capabilities: frozenset[str]
    bias: str
    reference: str


def snake_case(name: str) -> str:
    """Class name to command-line name: MeanFieldVI to mean_field_vi, SWAG to swag."""
    name = name.replace("ChEES", "Chees")  # an acronym with a lower-case letter in it
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _entry(cls: type[Backend]) -> BackendEntry:
    return BackendEntry(snake_case(cls.__name__), cls, cls.family, cls.needs, cls.capabilities, cls.bias, cls.reference)


_CLASSES: tuple[type[Backend], ...] = (
    MAP,
    MeanFieldVI,
    Pathfinder,
    HMC,
    NUTS,
    ChEESHMC,
    MCLMC,
    MILE,
    DenseLaplace,
    DiagonalLaplace,
    KroneckerLaplace,
    LowRankLaplace,
    FunctionalLaplace,
    SampledLaplace,
    SWAG,
    DeepEnsemble,
    SVGD,
    PyroGuideVI,
    PyroMCMC,
)

BACKENDS: dict[str, BackendEntry] = {entry.name: entry for entry in map(_entry, _CLASSES)}


def find_backend(name: str) -> BackendEntry:
    """Look a backend up by its command-line or class name.

    Args:
        name: "nuts", "NUTS", "mean_field_vi", ...

    Returns:
        Its entry.

    Raises:
        ValueError: If there is none, with the nearest names.
    """
    key = name if name in BACKENDS else snake_case(name)
    if key not in BACKENDS:
        near = difflib.get_close_matches(key, BACKENDS, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise ValueError(f"no backend is called {name!r}{hint} Known: {', '.join(BACKENDS)}")
    return BACKENDS[key]


def backend_table() -> str:
    """The table of all backends in Markdown, as in the README.

    Returns:
        Header and one row per backend.
    """
    rows = ["| backend | on the command line | needs | gives | bias to expect | source |", "|---|---|---|---|---|---|"]
    for entry in BACKENDS.values():
        needs, gives = ", ".join(sorted(entry.needs)), ", ".join(sorted(entry.capabilities)).replace("_", " ")
        cells = (
            f"`{entry.cls.__name__}`",
            f"`{entry.name}`",
            needs,
            gives or "predictions",
            entry.bias,
            entry.reference,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
