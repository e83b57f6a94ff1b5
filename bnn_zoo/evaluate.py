r"""Scores of one posterior on the test part, in original units, and the arrays that plots and distances are made of.

Only the parameters of the mixture are needed: its distribution function on a grid of points gives the quantiles at 200
levels, and those give CRPS, W1 and every interval without Monte-Carlo noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnn_zoo.data import Dataset
from inference import scoring
from inference.posterior import DrawsPosterior, Posterior
from inference.prediction import Prediction

Arrays = dict[str, NDArray[Any]]

LEVELS = (np.arange(200) + 0.5) / 200
"""Midpoints of 200 equal steps of probability, (Q,): a sum over them is an integral over the distribution."""

_MAX_COMPONENT_VALUES = 1_000_000
_MIN_COMPONENTS = 200
_CDF_POINTS = 241
_CDF_REACH = 8.0  # standard deviations


@dataclass
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        scores: Figures by name, original units.
        arrays: Arrays by name, test inputs last, original units.
    """

    scores: dict[str, float | int | None] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


def evaluate(posterior: Posterior, data: Dataset, seed: int = 0) -> Evaluation:
    """Score a posterior on the test part.

    Args:
        posterior: What a backend returned.
        data: The data set it was fitted to.
        seed: Seed of the predictive draws.

    Returns:
        Scores and arrays; with two chains or more, also the predictions of the first and second half of the chains.
    """
    prediction = predict(posterior, data.x_test, seed)
    result = Evaluation()
    if data.task == "classification":
        _classification(prediction, data, result)
    else:
        _regression(prediction, data, result)
    result.scores["predictive_draws"] = prediction.num_components
    for half, part in enumerate(halves(posterior)):
        result.arrays.update(_summary(predict(part, data.x_test, seed), data, f"half{half}_"))
    if data.grid is not None:
        result.arrays.update(_summary(predict(posterior, data.grid, seed), data, "grid_"))
    return result


def predict(posterior: Posterior, x: torch.Tensor, seed: int = 0) -> Prediction:
    """Predict with as many draws as one core digests in seconds.

    Args:
        posterior: The posterior.
        x: Inputs, shape (N, D).
        seed: Seed of the predictive draws.

    Returns:
        The prediction; its components are thinned evenly where draws times inputs exceed a million.
    """
    most = max(_MIN_COMPONENTS, _MAX_COMPONENT_VALUES // max(len(x), 1))
    if not isinstance(posterior, DrawsPosterior):
        return posterior.predict(x, seed=seed)
    num_draws = posterior.draws.shape[0] * posterior.draws.shape[1]
    return posterior.predict(x, num_samples=None if num_draws <= most else most, seed=seed)


def halves(posterior: Posterior) -> list[DrawsPosterior]:
    """The first and the second half of the chains as posteriors of their own: how far they differ is the noise floor.

    Args:
        posterior: Any posterior.

    Returns:
        Two posteriors; none where there are not two chains.
    """
    if not isinstance(posterior, DrawsPosterior) or "chains" not in getattr(posterior.backend, "capabilities", ()):
        return []
    draws = posterior.draws
    if draws.shape[0] < 2:
        return []
    middle = draws.shape[0] // 2
    parts = (draws[:middle], draws[middle : 2 * middle])
    return [DrawsPosterior(posterior.target, part, backend=posterior.backend) for part in parts]


def mixture_quantiles(prediction: Prediction, levels: NDArray[Any]) -> NDArray[Any]:
    """Quantiles of a scalar target at many levels, by inverting the distribution function on a grid.

    The grid reaches 8 standard deviations and is finest in the middle; linear interpolation is off by 1e-3 sd or so.

    Args:
        prediction: Prediction of a scalar target.
        levels: Probabilities, (Q,).

    Returns:
        (Q, N), in the units of the target.
    """
    offsets = _CDF_REACH * np.sinh(3 * np.linspace(-1, 1, _CDF_POINTS)) / np.sinh(3)
    points = prediction.mean + prediction.stddev * torch.as_tensor(offsets, dtype=prediction.mean.dtype)[:, None]
    cdf = np.stack([_floats(prediction.cdf(y)) for y in points])  # (G, N)
    cdf = np.maximum.accumulate(cdf, axis=0)
    values = _floats(points)
    return np.stack([np.interp(levels, cdf[:, n], values[:, n]) for n in range(cdf.shape[1])], axis=1)


def _regression(prediction: Prediction, data: Dataset, result: Evaluation) -> None:
    y, offset = data.y_test, data.nll_offset
    arrays = result.arrays = _summary(prediction, data, "")
    targets = arrays["y"] = _floats(data.to_original(y))
    log_prob = _floats(prediction.log_prob(y))
    arrays["nll"] = offset - log_prob
    arrays["pit"] = np.clip(_floats(prediction.cdf(y)), 0, 1)
    scores = result.scores
    scores["rmse"] = scoring.rmse(targets, arrays["mean"])
    scores["nll"] = float(arrays["nll"].mean())
    scores["nll_stderr"] = _standard_error(arrays["nll"])
    scores["nll_gaussian"] = offset - float(_floats(prediction.gaussian_log_prob(y)).mean())
    scores["crps"] = float(scoring.crps_sample(targets, arrays["quantiles"]).mean())
    for percent in (50, 90):
        lower, upper = (_floats(data.to_original(end)) for end in prediction.interval(percent / 100))
        arrays[f"lower_{percent}"], arrays[f"upper_{percent}"] = lower, upper
        scores[f"coverage_{percent}"] = scoring.interval_coverage(lower, upper, targets)
        scores[f"width_{percent}"] = scoring.interval_width(lower, upper)
    scores["miscalibration_area"] = scoring.miscalibration_area(arrays["pit"])
    scores["epistemic_share"] = float(np.mean(arrays["epistemic_stddev"] ** 2) / np.mean(arrays["stddev"] ** 2))


def _classification(prediction: Prediction, data: Dataset, result: Evaluation) -> None:
    arrays = result.arrays = _summary(prediction, data, "")
    labels, probs = data.y_test.cpu().numpy(), arrays["probs"]
    arrays["y"] = labels
    arrays["nll"] = -_floats(prediction.log_prob(data.y_test))
    scores = result.scores
    scores["accuracy"] = scoring.accuracy(probs, labels)
    scores["nll"] = float(arrays["nll"].mean())
    scores["nll_stderr"] = _standard_error(arrays["nll"])
    scores["brier"] = float(scoring.brier(probs, labels).mean())
    scores["ece"] = scoring.ece(probs, labels)
    scores["ece_baseline"] = scoring.ece_baseline(probs)
    total = float(arrays["entropy"].mean())
    scores["epistemic_share"] = float(arrays["mutual_information"].mean()) / total if total > 0 else 0.0


def _summary(prediction: Prediction, data: Dataset, prefix: str) -> Arrays:
    """What distances and plots need of a prediction, in original units."""
    if data.task == "classification":
        found = {
            "probs": _floats(prediction.probs),
            "entropy": _floats(prediction.entropy),
            "mutual_information": _floats(prediction.mutual_information),
        }
        # Rows of float32 probabilities sum to 1 only to 1e-6.
        found["probs"] = found["probs"] / found["probs"].sum(axis=1, keepdims=True)
    else:
        levels = LEVELS if prefix != "grid_" else np.array([0.05, 0.25, 0.75, 0.95])
        found = {
            "mean": _floats(data.to_original(prediction.mean)),
            "stddev": _floats(data.scale_to_original(prediction.stddev)),
            "epistemic_stddev": _floats(data.scale_to_original(prediction.epistemic_variance.sqrt())),
            "quantiles": mixture_quantiles(prediction, levels) * data.y_std + data.y_mean,
        }
    return {f"{prefix}{name}": values for name, values in found.items()}


def _standard_error(values: NDArray[Any]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _floats(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()
