"""Does 90 % happen nine times in ten? Quantile calibration and interval coverage, or reliability of class labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from bnn_zoo.evaluate import Arrays
from bnn_zoo.plot_style import Palette, Plot, render
from inference.calibration import calibration_bins

_SIZE = (4.8, 2.6)


def calibration_plot(folder: Path, backend: str, arrays: Arrays) -> Plot:
    """Calibration of one backend on the test part.

    Args:
        folder: Where to.
        backend: Name of the backend.
        arrays: Its arrays.

    Returns:
        The plot.
    """
    name = f"calibration-{backend}"
    if "pit" in arrays:
        alt = (
            f"{backend}: share of targets below each predicted quantile, and share inside each central interval, "
            "against their nominal values, with the 95 % range of a calibrated prediction"
        )
        return render(folder, name, "Calibration", alt, _SIZE, lambda f, p: _regression(f, p, arrays))
    alt = f"{backend}: accuracy against confidence in bins, and how many test data each bin has"
    return render(folder, name, "Calibration", alt, _SIZE, lambda f, p: _classes(f, p, arrays))


def _regression(figure: Figure, palette: Palette, arrays: Arrays) -> None:
    left, right = figure.subplots(1, 2)
    levels, pit = np.linspace(0, 1, 101), np.sort(arrays["pit"])
    below = np.searchsorted(pit, levels, side="right") / len(pit)
    below[0] = (pit <= 0).mean()
    distances = np.sort(np.abs(pit - 0.5))
    inside = np.searchsorted(distances, levels / 2, side="right") / len(pit)
    _curve(left, palette, levels, below, len(pit))
    _curve(right, palette, levels, inside, len(pit))
    left.set(xlabel="predicted quantile", ylabel="observed share", title="below quantile")
    right.set(xlabel="nominal level", title="inside interval")


def _curve(ax: Axes, palette: Palette, levels: np.ndarray, observed: np.ndarray, num: int) -> None:
    low, high = (binom.ppf(tail, num, levels) / num for tail in (0.025, 0.975))
    ax.fill_between(levels, low, high, color=palette.faint, alpha=0.3, lw=0)
    ax.plot([0, 1], [0, 1], color=palette.faint, lw=1)
    ax.plot(levels, observed, color=palette.main, lw=1.8)
    _unit_square(ax)


def _classes(figure: Figure, palette: Palette, arrays: Arrays) -> None:
    left, right = figure.subplots(1, 2)
    bins = calibration_bins(arrays["probs"], arrays["y"])
    left.plot([0, 1], [0, 1], color=palette.faint, lw=1)
    spread = 1.96 * np.sqrt(bins.confidence * (1 - bins.confidence) / bins.count)
    left.vlines(
        bins.confidence, bins.confidence - spread, bins.confidence + spread, color=palette.faint, alpha=0.4, lw=5
    )
    left.plot(bins.confidence, bins.accuracy, "o-", ms=4, color=palette.main, lw=1.5)
    _unit_square(left)
    left.set(xlabel="confidence", ylabel="accuracy", title="reliability")
    right.bar(bins.confidence, bins.count, width=0.05, color=palette.main)
    right.set(xlim=(0, 1), xlabel="confidence", ylabel="test data", title="how often")


def _unit_square(ax: Axes) -> None:
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.set_xticklabels(["0", "0.5", "1"])
    ax.set_yticklabels(["0", "0.5", "1"])
    ax.set_aspect("equal", adjustable="box")
