"""Records of the image studies: what a row's posterior predicts, what it costs, and where that is kept."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environments
from benchmarks.records import number
from inference import scoring
from inference.linearised_draws import LinearisedDrawsPosterior
from inference.links import Link
from inference.posterior import Posterior

RESULTS = Path(__file__).parent.parent / "results" / "images"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Images:
    """Images to learn from, to be tested on, and of other kinds.

    Attributes:
        name: Of the data set.
        x: Training images, (N, C, H, W).
        y: Their labels, (N,).
        x_test: Test images.
        y_test: Their labels.
        foreign: By name, images of other kinds, standardised alike.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    foreign: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """A posterior with its cost.

    Attributes:
        posterior: What predicts.
        seconds: By part of the work: "network", "fit", "prior".
        link: How class probabilities are made.
    """

    posterior: Posterior
    seconds: dict[str, float]
    link: Link = "monte_carlo"


def determined(posterior: Posterior) -> dict[str, float]:
    """Number of parameters that draws say the data determine.

    Args:
        posterior: Draws around a mode.

    Returns:
        The number and its standard error, by name; nothing for other posteriors.
    """
    if not isinstance(posterior, LinearisedDrawsPosterior):
        return {}
    return dict(zip(("determined", "determined_error"), posterior.determined_parameters(), strict=True))


def scored(fitted: Fitted, images: Images) -> dict[str, Any]:
    """Predict test and foreign images, and score.

    Args:
        fitted: The posterior.
        images: The images.

    Returns:
        Scores, AUROC by foreign set, and milliseconds of the processor's time per predicted image.
    """
    began = time.process_time()
    prediction = fitted.posterior.predict(images.x_test, link=fitted.link)
    foreign = {name: fitted.posterior.predict(x, link=fitted.link) for name, x in images.foreign.items()}
    count = len(images.x_test) + sum(len(x) for x in images.foreign.values())
    milliseconds = 1000 * (time.process_time() - began) / count
    probs = _probabilities(prediction.probs)
    labels = images.y_test.cpu()
    nll = -prediction.log_prob(images.y_test).double()
    scores = {
        "accuracy": scoring.accuracy(probs, labels),
        "nll": float(nll.mean()),
        "nll_stderr": float(nll.std()) / len(nll) ** 0.5,
        "ece": scoring.ece(probs, labels),
        "ece_baseline": scoring.ece_baseline(probs),
    }
    found: dict[str, Any] = {"scores": scores, "auroc": {}, "milliseconds_per_image": milliseconds}
    for name, other in foreign.items():
        pairs = {
            "entropy": (prediction.entropy, other.entropy),
            "max_prob": (-probs.amax(1), -_probabilities(other.probs).amax(1)),
        }
        found["auroc"][name] = {kind: _auroc(inside, outside) for kind, (inside, outside) in pairs.items()}
    return found


def _auroc(inside: Tensor, outside: Tensor) -> float:
    foreign = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    return scoring.auroc(torch.cat([inside, outside]).cpu(), foreign)


def _probabilities(probs: Tensor) -> Tensor:
    """In float64, with rows that sum to 1 to its precision."""
    probs = probs.cpu().double()
    return probs / probs.sum(1, keepdim=True)


def run(study: str, row: str, images: Images, seed: int, fit: Callable[[str], Fitted]) -> dict[str, Any]:
    """Make one record.

    Args:
        study: "outside" or "resnet".
        row: The row.
        images: The images.
        seed: For the record.
        fit: Fits a row.

    Returns:
        The record, for JSON; where something was raised, with its message as "failed" in place of figures.
    """
    record: dict[str, Any] = {
        "format": FORMAT,
        "study": study,
        "data": images.name,
        "row": row,
        "seed": seed,
        "num_train": len(images.x),
        "num_test": len(images.x_test),
        "num_foreign": {name: len(x) for name, x in images.foreign.items()},
        "environment": environments.record(),
    }
    load_before = os.getloadavg()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the fit are in the record
        try:
            fitted = fit(row)
            found = scored(fitted, images)
        except Exception as error:  # the other rows go on
            return record | {"failed": f"{type(error).__name__}: {error}"}
    info = fitted.posterior.info
    keys = (
        "prior_precision",
        "log_evidence",
        "determined",
        "determined_error",
        "passes_of_descent",
        "newton_decrement",
    )
    record |= {
        "settings": repr(fitted.posterior.backend),
        "parameters": fitted.posterior.target.dim,
        "link": fitted.link,
        "seconds": fitted.seconds,
        "gradients": info.gradients,
        "peak_mib": info.peak_bytes / 2**20,
        "load": [load_before, os.getloadavg()[0]],
        "warnings": info.warnings,
        "extra": {key: info.extra[key] for key in keys if key in info.extra},
    }
    return rounded(record | found)


def rounded(value: Any) -> Any:
    """Every float in a record to five digits; None where it is not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return number(value) if isinstance(value, float) else value
