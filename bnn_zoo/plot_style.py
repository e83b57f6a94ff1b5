"""How plots look: two palettes, one for light and one for dark pages, and the files that one drawing becomes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnn_zoo.run_folder import replace

_DPI = 144


@dataclass(frozen=True)
class Palette:
    """Colours of one mode; they hold their contrast on ``paper`` and for the colour-blind (blue against orange).

    Attributes:
        paper: Background.
        ink: Text and axes.
        faint: Grid and secondary text.
        main: The backend that is shown.
        accent: What to look at: the noise floor, the reference, a limit.
        chains: One colour per chain.
        cmap: Colour map of a signed quantity, such as the probability of a class around one half.
        heat: Colour map of a quantity from zero upwards.
    """

    paper: str
    ink: str
    faint: str
    main: str
    accent: str
    chains: tuple[str, ...]
    cmap: str
    heat: str


PALETTES = {
    "light": Palette(
        paper="#ffffff",
        ink="#1f2328",
        faint="#8b949e",
        main="#0b62c4",
        accent="#c4500a",
        chains=("#0b62c4", "#c4500a", "#1a7f5a", "#8250df", "#b3266b", "#6e7781", "#9a6700", "#118198"),
        cmap="RdBu",
        heat="Blues",
    ),
    "dark": Palette(
        paper="#161b22",
        ink="#e6edf3",
        faint="#7d8590",
        main="#58a6ff",
        accent="#f0883e",
        chains=("#58a6ff", "#f0883e", "#3fb98a", "#bc8cff", "#f778ba", "#8b949e", "#d6a728", "#4cc7d9"),
        cmap="RdBu",
        heat="cividis",
    ),
}

Draw = Callable[[Figure, Palette], None]


@dataclass(frozen=True)
class Plot:
    """One drawing, as files and as bytes for the report.

    Attributes:
        name: File name without suffix.
        title: Headline.
        alt: What the picture shows, in words.
        light: PNG for light pages.
        dark: PNG for dark pages.
        size: Width and height in CSS pixels.
    """

    name: str
    title: str
    alt: str
    light: bytes
    dark: bytes
    size: tuple[int, int]


def render(folder: Path, name: str, title: str, alt: str, size: tuple[float, float], draw: Draw) -> Plot:
    """Draw in both modes; write ``name.png``, ``name-dark.png`` and ``name.svg``.

    Args:
        folder: Where to.
        name: File name without suffix.
        title: Headline.
        alt: What the picture shows, in words.
        size: Inches, width and height.
        draw: Fills an empty figure.

    Returns:
        The plot.
    """
    images = {}
    for mode, palette in PALETTES.items():
        with mpl.rc_context(_settings(palette)):  # pyright: ignore[reportArgumentType]
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, palette)
            images[mode] = _bytes(figure, "png")
            if mode == "light":
                vector = _bytes(figure, "svg")
                replace(folder / f"{name}.svg", lambda file, content=vector: file.write_bytes(content))
        suffix = "" if mode == "light" else "-dark"
        replace(folder / f"{name}{suffix}.png", lambda file, content=images[mode]: file.write_bytes(content))
    pixels = (round(size[0] * 100), round(size[1] * 100))
    return Plot(name, title, alt, images["light"], images["dark"], pixels)


def label_end(ax: Axes, text: str, palette: Palette) -> None:
    """A small note in the upper left corner of a panel."""
    ax.text(0.04, 0.95, text, transform=ax.transAxes, va="top", color=palette.ink, fontsize=9)


def _bytes(figure: Figure, form: str) -> bytes:
    stream = io.BytesIO()
    # No date: the same results give the same file.
    metadata: dict[str, Any] = {"Software": None} if form == "png" else {"Date": None}
    figure.savefig(stream, format=form, dpi=_DPI, metadata=metadata)
    return stream.getvalue()


def _settings(palette: Palette) -> dict[str, Any]:
    return {
        "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.faint,
        "axes.titlecolor": palette.ink,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "grid.color": palette.faint,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "bnn-zoo",
    }
