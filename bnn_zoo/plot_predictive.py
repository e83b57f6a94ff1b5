"""What one backend predicts: bands over one input, maps over two, observed against predicted for tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bnn_zoo.data import Dataset
from bnn_zoo.evaluate import Arrays
from bnn_zoo.plot_style import Palette, Plot, render


def predictive_plot(folder: Path, backend: str, arrays: Arrays, data: Dataset, limits: tuple[float, float]) -> Plot:
    """The plot of predictions that suits the data.

    Args:
        folder: Where to.
        backend: Name of the backend.
        arrays: Its arrays.
        data: The data set.
        limits: Range of the target (or mutual information) shown, the same for all backends.

    Returns:
        The plot.
    """
    name = f"predictive-{backend}"
    if data.grid is not None and data.task == "regression" and data.num_features == 1:
        alt = f"{backend}: predictive mean, 50 % and 90 % bands over {data.feature_names[0]}, with the training data"
        return render(folder, name, "Prediction", alt, (4.8, 3.2), lambda f, p: _bands(f, p, arrays, data, limits))
    if data.grid is not None and data.task == "classification" and data.num_features == 2:
        alt = f"{backend}: map of the class probability and map of the mutual information, with the training data"
        return render(folder, name, "Prediction", alt, (4.8, 2.6), lambda f, p: _maps(f, p, arrays, data, limits))
    if data.task == "regression":
        alt = f"{backend}: observed against predicted {data.target_name} of the test data, residuals, 90 % intervals"
        return render(folder, name, "Prediction", alt, (4.8, 4.6), lambda f, p: _observed(f, p, arrays, data, limits))
    alt = f"{backend}: histograms of the predictive entropy of right and of wrong test labels"
    return render(folder, name, "Prediction", alt, (4.8, 3.2), lambda f, p: _entropies(f, p, arrays))


def shared_limits(arrays: dict[str, Arrays], data: Dataset) -> tuple[float, float]:
    """A range for all backends: of the target, that of the data and most predictions; else of the mutual information.

    Args:
        arrays: Arrays by backend.
        data: The data set.

    Returns:
        Lower and upper end.
    """
    if data.task == "classification":
        return 0.0, max([
            0.02,
            *(float(held["grid_mutual_information"].max()) for held in arrays.values() if data.grid is not None),
        ])
    targets = np.concatenate([part.numpy() for part in data.targets_original()])
    low, high = targets.min(), targets.max()
    room = high - low
    for held in arrays.values():
        # Bands far from the data may be anything: they must not squeeze the rest of the plot.
        ends = held["grid_quantiles"][[0, -1]] if "grid_quantiles" in held else held["quantiles"][[10, -11]]
        low = min(low, max(float(ends[0].min()), low - room))
        high = max(high, min(float(ends[-1].max()), high + room))
    margin = 0.04 * (high - low)
    return float(low - margin), float(high + margin)


def _bands(figure: Figure, palette: Palette, arrays: Arrays, data: Dataset, limits: tuple[float, float]) -> None:
    ax = figure.subplots()
    grid = data.grid
    if grid is None:
        raise AssertionError("bands need a grid")
    x = data.inputs_original(grid)[:, 0].numpy()
    low, lower, upper, high = arrays["grid_quantiles"]
    mean, spread = arrays["grid_mean"], arrays["grid_epistemic_stddev"]
    ax.fill_between(x, low, high, color=palette.main, alpha=0.18, lw=0, label="90 % of y")
    ax.fill_between(x, lower, upper, color=palette.main, alpha=0.28, lw=0, label="50 % of y")
    ax.plot(x, mean, color=palette.main, lw=1.8, label="mean")
    for sign in (-2, 2):
        ax.plot(
            x,
            mean + sign * spread,
            color=palette.accent,
            lw=1,
            ls="--",
            label="mean ± 2 epistemic sd" if sign > 0 else None,
        )
    points = data.inputs_original(data.x_train)[:, 0].numpy()
    ax.plot(
        points, data.to_original(data.y_train).numpy(), ".", ms=3, color=palette.ink, alpha=0.6, label="training data"
    )
    ax.set(xlim=(x[0], x[-1]), ylim=limits, xlabel=data.feature_names[0], ylabel=_named(data))
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.5, columnspacing=1)


def _maps(figure: Figure, palette: Palette, arrays: Arrays, data: Dataset, limits: tuple[float, float]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    grid = data.grid
    if grid is None:
        raise AssertionError("maps need a grid")
    x, y = (data.inputs_original(grid)[:, i].numpy().reshape(data.grid_shape) for i in (0, 1))
    probability = arrays["grid_probs"][:, 1].reshape(data.grid_shape)
    information = arrays["grid_mutual_information"].reshape(data.grid_shape)
    panels = (
        (axes[0], probability, f"probability of {data.class_names[1]}", palette.cmap, 1.0),
        (axes[1], information, "mutual information, nats", palette.heat, limits[1]),
    )
    points, labels = data.inputs_original(data.x_train).numpy(), data.y_train.numpy()
    for ax, values, title, cmap, top in panels:
        image = ax.pcolormesh(x, y, values, cmap=cmap, vmin=0, vmax=top, shading="auto", rasterized=True)
        ax.contour(x, y, probability, levels=[0.5], colors=["#000000"], linewidths=1)
        for label, marker in ((0, "o"), (1, "^")):
            held = points[labels == label]
            ax.plot(held[:, 0], held[:, 1], marker, ms=2.6, mfc="#ffffff", mec="#000000", mew=0.5)
        ax.set_title(title)
        ax.grid(visible=False)
        ax.set_xlabel(data.feature_names[0])
        figure.colorbar(
            image, ax=ax, location="bottom", aspect=30, pad=0.02, ticks=[0, top / 2, top], format="%.2g"
        ).outline.set_visible(False)
    axes[0].set_ylabel(data.feature_names[1])


def _observed(figure: Figure, palette: Palette, arrays: Arrays, data: Dataset, limits: tuple[float, float]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    y, mean = arrays["y"], arrays["mean"]
    chosen = np.linspace(0, len(y) - 1, min(len(y), 300)).round().astype(int)
    errors = np.abs(np.stack([mean - arrays["lower_90"], arrays["upper_90"] - mean]))
    inside = (arrays["lower_90"] <= y) & (y <= arrays["upper_90"])
    top.plot(limits, limits, color=palette.faint, lw=1)
    bottom.axhline(0, color=palette.faint, lw=1)
    for held, colour, text in (
        (inside, palette.main, "inside its 90 % interval"),
        (~inside, palette.accent, "outside"),
    ):
        here = chosen[held[chosen]]
        label = f"{text} ({held.mean():.0%})"
        style = {"fmt": "o", "ms": 3, "lw": 0.9, "color": colour, "alpha": 0.75}
        top.errorbar(mean[here], y[here], xerr=errors[:, here], label=label, **style)
        # Seen from the prediction, its interval lies around zero and the target is off by the residual.
        bottom.vlines(mean[here], -errors[0, here], errors[1, here], color=palette.faint, lw=0.9, alpha=0.6)
        bottom.plot(mean[here], (y - mean)[here], "o", ms=3, color=colour, alpha=0.85)
    top.set(xlim=limits, ylim=limits, ylabel=f"observed {_named(data)}")
    top.legend(loc="upper left", handletextpad=0.4)
    bottom.set(xlabel="predicted", ylabel="observed − predicted")


def _entropies(figure: Figure, palette: Palette, arrays: Arrays) -> None:
    ax = figure.subplots()
    right = arrays["probs"].argmax(axis=1) == arrays["y"]
    top = np.log(arrays["probs"].shape[1])
    bins = np.linspace(0, top, 25).tolist()
    for held, colour, text in ((right, palette.main, "right"), (~right, palette.accent, "wrong")):
        if held.any():
            ax.hist(
                arrays["entropy"][held],
                bins=bins,
                density=True,
                color=colour,
                alpha=0.55,
                label=f"{text} ({held.sum()})",
            )
    ax.set(xlim=(0, top), xlabel="predictive entropy, nats", ylabel="density of test data")
    ax.legend()


def _named(data: Dataset) -> str:
    return f"{data.target_name}, {data.unit}" if data.unit else data.target_name
