"""Plots of all backends together: distance to the reference, quality against cost, and the reference's own chains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from bnn_zoo.columns import lookup, number
from bnn_zoo.evaluate import Arrays
from bnn_zoo.plot_style import Palette, Plot, render

_Rows = list[dict[str, Any]]


def distance_plot(folder: Path, results: dict[str, Any]) -> Plot | None:
    """Bars of the distance to the reference, with its noise floor.

    Args:
        folder: Where to.
        results: Content of ``results.json``.

    Returns:
        The plot; None where there are no distances.
    """
    rows = [row for row in results["rows"] if row.get("distance")]
    if not rows:
        return None
    if results["data"]["task"] == "regression":
        unit = results["data"]["unit"] or f"units of {results['data']['target']}"
        panels = [("wasserstein1", f"W1 to {results['settings']['reference']}, {unit}", 0.0)]
        panels += [("variance_ratio", "predictive variance / reference's", 1.0)]
    else:
        panels = [("total_variation", f"total variation to {results['settings']['reference']}", 0.0)]
        panels += [("agreement", "share of labels as the reference's", 1.0)]
    rows = sorted(rows, key=lambda row: row["distance"][panels[0][0]], reverse=True)
    reference = results["settings"]["reference"]
    alt = f"Bars: distance of every backend to {reference}, nearest at the top"
    alt += (
        "; a line marks the distance between the two halves of the reference's chains" if results["noise_floor"] else ""
    )

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots(2, 1)
        for ax, (key, label, neutral) in zip(axes, panels, strict=True):
            _bars(ax, palette, rows, key, label, neutral, results["noise_floor"])

    return render(folder, "distance", "Distance to the reference", alt, (4.8, 1.8 + 0.46 * len(rows)), draw)


def pareto_plot(folder: Path, results: dict[str, Any]) -> Plot | None:
    """Quality against cost: NLL over seconds and over gradients.

    Args:
        folder: Where to.
        results: Content of ``results.json``.

    Returns:
        The plot; None without a finished row.
    """
    rows = [row for row in results["rows"] if row["status"] == "done"]
    if not rows:
        return None
    alt = "NLL per datum of every backend against its seconds and its gradients; a line joins the undominated ones"

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots(2, 1)
        for ax, (path, label) in zip(
            axes, (("cost.seconds", "seconds"), ("cost.gradients", "gradient evaluations")), strict=True
        ):
            _pareto(ax, palette, rows, path, label)

    return render(folder, "pareto", "Quality against cost", alt, (4.8, 6.0), draw)


def trace_plot(folder: Path, backend: str, arrays: Arrays, data: dict[str, Any]) -> Plot | None:
    """Chains of f at the test inputs where they agree least, in between, and most.

    Args:
        folder: Where to.
        backend: Name of the backend whose chains these are.
        arrays: Its arrays.
        data: Metadata of the data set.

    Returns:
        The plot; None where there are no chains.
    """
    if "trace" not in arrays:
        return None
    num = arrays["trace"].shape[2]
    worst = arrays["trace_rhat"].max()
    alt = f"Chains of {backend} at {num} test inputs, each with its R-hat; the worst one, {worst:.2f}, comes first"

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots(num, 1, sharex=True, squeeze=False)[:, 0]
        order = np.argsort(-arrays["trace_rhat"])
        for ax, place in zip(axes, order, strict=True):
            for chain, values in enumerate(arrays["trace"][:, :, place]):
                ax.plot(values, lw=0.7, alpha=0.85, color=palette.chains[chain % len(palette.chains)])
            what = "worst: " if place == order[0] and num > 1 else ""
            ax.set_title(f"{what}test input {arrays['trace_input'][place]}, R-hat {arrays['trace_rhat'][place]:.2f}")
        axes[-1].set_xlabel("kept draw")
        figure.supylabel(_function(data), fontsize=10)

    return render(folder, "traces", f"Chains of {backend}", alt, (4.8, 0.8 + 1.35 * num), draw)


def rhat_plot(folder: Path, backend: str, arrays: Arrays) -> Plot | None:
    """Histogram of the function-space R-hat over test inputs.

    Args:
        folder: Where to.
        backend: Name of the backend whose chains these are.
        arrays: Its arrays.

    Returns:
        The plot; None where there are no chains.
    """
    if "rhat" not in arrays:
        return None
    values = arrays["rhat"]
    share = float((values > 1.1).mean())
    alt = f"Histogram of R-hat of {backend} over {len(values)} test inputs; {share:.0%} are above 1.1"

    def draw(figure: Figure, palette: Palette) -> None:
        ax = figure.subplots()
        top = max(1.15, float(values.max()) * 1.02)
        ax.hist(values, bins=np.linspace(0.99, top, 40).tolist(), color=palette.main)
        ax.axvline(1.1, color=palette.accent, lw=1.5)
        ax.text(1.1, 0.97, " 1.1", transform=ax.get_xaxis_transform(), color=palette.accent, va="top")
        ax.set(xlabel="R-hat of f at a test input", ylabel="test inputs", xlim=(0.99, top))

    return render(folder, "rhat", f"R-hat of {backend} in function space", alt, (4.8, 2.4), draw)


def _bars(
    ax: Axes, palette: Palette, rows: _Rows, key: str, label: str, neutral: float, floor: dict[str, float] | None
) -> None:
    names = [row["backend"] for row in rows]
    values = np.array([row["distance"].get(key, np.nan) for row in rows])
    known = [*values[np.isfinite(values)], *([floor[key]] if floor and key in floor else [])]
    ax.set_xlabel(label)
    ax.grid(visible=False, axis="y")
    if key == "variance_ratio":  # a ratio is as far from 1 at a half as at two
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.hlines(names, 1.0, values, color=palette.main, lw=2)
        ax.plot(values, names, "o", color=palette.main, ms=6)
        ax.axvline(1.0, color=palette.accent, lw=1.2)
        ax.margins(x=0.15)
        return
    start = 0.0 if neutral == 0.0 else max(0.0, min(known) - 0.05)
    if neutral == 0.0 and min(known) > 0 and max(known) > 20 * min(known):
        start = min(known) / 3
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.barh(names, values - start, left=start, color=palette.main, height=0.62)
    ax.set_xlim(left=start, right=1.0 if neutral == 1.0 else None)
    if floor and key in floor:
        line = ax.axvline(floor[key], color=palette.accent, lw=1.5, ls="--", label=f"noise floor {floor[key]:.3g}")
        ax.legend(handles=[line], loc="lower left", bbox_to_anchor=(0, 1), borderpad=0.1)


def _pareto(ax: Axes, palette: Palette, rows: _Rows, path: str, label: str) -> None:
    points = [(max(lookup(row, path) or 0, 1e-3), number(row["scores"]["nll"]), row["backend"]) for row in rows]
    points = sorted(point for point in points if np.isfinite(point[1]))
    if not points:
        return
    values = np.array([point[1] for point in points])
    # One hopeless backend must not squeeze all others into a line: it is drawn at the edge, with its value.
    limit = values.min() + max(5 * (np.median(values) - values.min()), 0.05)
    shown = [(cost, min(nll, limit), f"{name} ({nll:.3g})" if nll > limit else name) for cost, nll, name in points]
    front, best = [], np.inf
    for cost, nll, _ in shown:
        if nll < best:
            front.append((cost, nll))
            best = nll
    ax.plot(*zip(*front, strict=True), color=palette.faint, lw=1.2, drawstyle="steps-post")
    for above, marker, colour in ((False, "o", palette.main), (True, "^", palette.accent)):
        chosen = [p[:2] for p, nll in zip(shown, values, strict=True) if (nll > limit) == above]
        ax.plot([p[0] for p in chosen], [p[1] for p in chosen], marker, ms=6, color=colour, ls="none")
    ax.set_xscale("log")
    wide = points[-1][0] > 100 * points[0][0]
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12, y=0.12)
    ax.set(xlabel=label, ylabel="NLL per datum, nats")
    _label_apart(ax, palette, shown)


_AROUND = [(7, 0), (-7, 0), (5, 10), (-5, 10), (5, -10), (-5, -10)]
_AROUND += [(dx, dy) for dy in (20, -20, 30, -30, 42, -42) for dx in (10, -10, 30, -30)]


def _label_apart(ax: Axes, palette: Palette, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points, in the first place around each that nothing else covers; far ones with a line."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise AssertionError("axes belong to a figure")
    figure.draw_without_rendering()  # the layout decides where the points are
    scale = figure.dpi / 72
    dots = ax.transData.transform([point[:2] for point in points]) / scale
    frame = ax.get_window_extent()
    inside = (frame.x0 / scale, frame.y0 / scale, frame.x1 / scale, frame.y1 / scale)
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    for place in np.argsort(-dots[:, 0]):
        (x, y), (cost, nll, name) = dots[place], points[place]
        width = 5.3 * len(name)
        others = [box for i, box in enumerate(taken) if i != place]
        candidates = [(dx, dy, _box(x + dx, y + dy, width, dx > 0)) for dx, dy in _AROUND]
        clear = [c for c in candidates if _within(c[2], inside) and not any(_cover(c[2], box) for box in others)]
        dx, dy, box = clear[0] if clear else candidates[0]
        taken.append(box)
        ax.annotate(
            name,
            (cost, nll),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            va="center",
            fontsize=9,
            color=palette.ink,
            path_effects=[withStroke(linewidth=2.5, foreground=palette.paper)],
            arrowprops={"arrowstyle": "-", "color": palette.faint, "lw": 0.8, "shrinkB": 3} if abs(dy) > 10 else None,
        )


_Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, rightwards: bool) -> _Box:
    return (x, y - 5.5, x + width, y + 5.5) if rightwards else (x - width, y - 5.5, x, y + 5.5)


def _within(box: _Box, frame: _Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _cover(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _function(data: dict[str, Any]) -> str:
    if data["task"] == "regression":
        return f"f, {data['unit']}" if data["unit"] else f"f, units of {data['target']}"
    return "difference of logits" if len(data["class_names"]) == 2 else "logit of the first class, centred"
