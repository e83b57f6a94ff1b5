"""How far each backend's predictions are from those of the reference, and how far the reference is from itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnn_zoo.evaluate import Arrays
from inference import scoring

Figures = dict[str, float]


def distance(arrays: Arrays, reference: Arrays, prefix: str = "", reference_prefix: str = "") -> Figures:
    """Distance between two predictions at the same test inputs.

    Args:
        arrays: Arrays of :func:`bnn_zoo.evaluate.evaluate`.
        reference: Those of the reference.
        prefix: Which prediction in ``arrays``: "", "half0_" or "half1_".
        reference_prefix: Likewise in ``reference``.

    Returns:
        For classes: agreement of the most probable class and mean total variation. For a regression: W1 of the
        predictive distributions in the units of y, averaged over the test inputs, and the median ratios of the
        predictive standard deviations squared, in total and of their epistemic parts.
    """
    if f"{prefix}probs" in arrays:
        p, q = arrays[f"{prefix}probs"], reference[f"{reference_prefix}probs"]
        return {"agreement": scoring.agreement(p, q), "total_variation": scoring.total_variation(p, q)}
    a, b = arrays[f"{prefix}quantiles"], reference[f"{reference_prefix}quantiles"]
    figures = {"wasserstein1": float(scoring.wasserstein1(a, b).mean())}
    for name, key in (("variance_ratio", "stddev"), ("epistemic_ratio", "epistemic_stddev")):
        mine, other = arrays[f"{prefix}{key}"] ** 2, reference[f"{reference_prefix}{key}"] ** 2
        positive = other > 0
        if positive.any():
            figures[name] = float(np.median(mine[positive] / other[positive]))
    return figures


def noise_floor(reference: Arrays) -> Figures | None:
    """Distance between the two halves of the reference's chains: a smaller distance to it means nothing.

    Args:
        reference: Arrays of the reference.

    Returns:
        Figures as of :func:`distance`; None where the reference has no two chains.
    """
    if not any(name.startswith("half1_") for name in reference):
        return None
    return distance(reference, reference, "half0_", "half1_")


def add_distances(rows: list[dict[str, Any]], arrays: dict[str, Arrays], reference: str | None) -> Figures | None:
    """Write the distances into the rows of a comparison.

    Args:
        rows: One per backend; those without arrays are left alone.
        arrays: Arrays by backend name.
        reference: Name of the reference, or None.

    Returns:
        The noise floor, where there is one.
    """
    found = arrays.get(reference) if reference else None
    for row in rows:
        row.pop("distance", None)
        if found is not None and row["backend"] in arrays and row["backend"] != reference:
            row["distance"] = distance(arrays[row["backend"]], found)
    return noise_floor(found) if found is not None else None
