"""Pictures of simulation-based calibration: rank histograms, and distribution functions minus the diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from bnn_zoo.plot_style import Palette, Plot, render
from bnn_zoo.sbc import Row, written
from inference.uniformity import envelope, histogram

_ROW_HEIGHT, _WIDTH = 2.1, 9.6
_BAND = 0.99


def sbc_plot(folder: Path, rows: Sequence[Row]) -> Plot:
    """One row per backend: histograms of its worst weight scalar and worst function value, and all scalars together.

    Args:
        folder: Where to; ``sbc.png``, ``sbc-dark.png`` and ``sbc.svg`` are written.
        rows: Results.

    Returns:
        The plot.
    """
    alt = (
        "For each backend, how often the truth had each rank among its posterior draws, for the scalar of the weights "
        "and the function value that deviate most, and the distribution functions of all ranks minus the diagonal, "
        "with the range of a calibrated posterior"
    )
    size = (_WIDTH, 0.5 + _ROW_HEIGHT * len(rows))
    return render(folder, "sbc", "Simulation-based calibration", alt, size, lambda f, p: _draw(f, p, rows))


def _draw(figure: Figure, palette: Palette, rows: Sequence[Row]) -> None:
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (left, middle, right) in zip(rows, axes, strict=True):
        functions = [i for i, test in enumerate(row.tests) if test.name.startswith("f[")]
        others = [i for i in range(len(row.tests)) if i not in functions]
        for ax, places in ((left, others), (middle, functions)):
            worst = min(places, key=lambda i: row.tests[i].pvalue)
            _histogram(ax, palette, row, worst)
        _differences(right, palette, row, functions)
        if row is rows[0]:
            right.legend(loc="lower left", fontsize=7, handlelength=1.2)
        left.set_ylabel(f"{row.name}\n{row.verdict}", fontweight="bold")
    for ax in axes[-1, :2]:
        ax.set_xlabel("rank of the truth among the draws")
    axes[-1, 2].set_xlabel("rank z")


def _histogram(ax: Axes, palette: Palette, row: Row, place: int) -> None:
    test, pit = row.tests[place], row.calibration.pit[:, place]
    counts = histogram(pit)
    bins, num = len(counts), len(pit)
    low, high = binom.ppf([(1 - _BAND) / 2, (1 + _BAND) / 2], num, 1 / bins)
    ax.axhspan(low, high, color=palette.faint, alpha=0.3, lw=0)
    ax.axhline(num / bins, color=palette.faint, lw=1)
    ax.bar((np.arange(bins) + 0.5) / bins, counts, width=0.92 / bins, color=palette.main)
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(0, max(1.25 * counts.max(), 1.2 * high)))
    ax.set_title(f"{test.name}: p = {written(test.pvalue)}", fontsize=9)


def _differences(ax: Axes, palette: Palette, row: Row, functions: Sequence[int]) -> None:
    pit = row.calibration.pit
    points, low, high = envelope(len(pit), _BAND)
    ax.fill_between(points, low - points, high - points, color=palette.faint, alpha=0.3, lw=0)
    ax.axhline(0, color=palette.faint, lw=1)
    for place in range(pit.shape[1]):
        below = np.searchsorted(np.sort(pit[:, place]), points, side="right") / len(pit)
        of_function = place in functions
        style = {"color": palette.accent if of_function else palette.main, "lw": 1.1, "alpha": 0.9}
        ax.plot(np.r_[0, points, 1], np.r_[0, below - points, 0], **style)
    for name, colour in (("function values", palette.accent), ("weights, log likelihood", palette.main)):
        ax.plot([], [], color=colour, lw=1.5, label=name)
    reach = max(float((high - points).max()), float(np.abs(ax.get_ylim()).max())) * 1.1
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(-reach, reach))
    ax.set_title("share of ranks below z, minus z", fontsize=9)
