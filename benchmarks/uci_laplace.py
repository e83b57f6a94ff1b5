"""Laplace approximations with priors and noise from the evidence, on UCI data: one JSON record for each row and split.

    python -m benchmarks.uci_laplace --data energy,yacht --splits 5 --rows map,kronecker,nuts --seconds 120
    python -m benchmarks.uci_laplace --data energy,naval --gaps --rows map,last_layer,kronecker,dense,deep_ensemble
    python -m benchmarks.uci_laplace_page                      writes docs/uci_laplace.md from the records

A record that exists is kept, so a run that was stopped goes on where it was. Records of standard splits keep mean and
standard deviation of the predictions at the test inputs, from which distances to NUTS are computed later. Gap split j
holds out the rows whose feature j is in its middle third (Foong et al. 2019).
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import number
from benchmarks.reference import DATA, SCORES, Fit, chain_start, costs, heading, limited, make_missing, mixing
from bnn_models import MLP, likelihoods
from bnn_zoo.data import Dataset, available, load
from bnn_zoo.data.registry import did_you_mean
from bnn_zoo.errors import UsageError
from bnn_zoo.evaluate import Arrays, evaluate
from bnn_zoo.models import ModelSpec
from inference import (
    MAP,
    NUTS,
    DeepEnsemble,
    DenseLaplace,
    KroneckerLaplace,
    SampledLaplace,
    Subset,
    TunedPrior,
    tune_prior,
)
from inference.backend import Backend
from inference.posterior import GaussianPosterior, Posterior

RESULTS = Path(__file__).parent / "results" / "uci_laplace"
# The gaps that hold back different rows: where features determine each other, or are constant, their gaps are the same.
GAPS = {"energy": (0, 2, 3, 4, 5, 6, 7), "naval": (0, 7, 8, 14, 15)}
NUM_SPLITS = 5
# From the mode that the rows of a split share, the way to the mode under the model of a row is short.
NEARBY = MAP(num_steps=300, step_size=1e-3)
ROWS: dict[str, Backend] = {
    "map": MAP(),
    "last_layer": Subset(DenseLaplace(start=NEARBY), sites="layers.1.*", rest=NEARBY),
    "kronecker": KroneckerLaplace(start=NEARBY),
    "dense": DenseLaplace(start=NEARBY),
    "dense_refitted": DenseLaplace(start=NEARBY),
    "sampled_em": SampledLaplace(em_rounds=10, groups="all", learn_noise=True, start=NEARBY),
    "dense_declared": DenseLaplace(start=NEARBY),
    "deep_ensemble": DeepEnsemble(num_members=5, num_steps=2000),
    "nuts": NUTS(num_samples=200, warmup_steps=200, num_chains=4, max_tree_depth=8, mass_matrix="low_rank"),
}
# Rows whose prior and noise the evidence chooses: how often, each time at the mode under what was chosen before.
ROUNDS = {"last_layer": 1, "kronecker": 1, "dense": 1, "dense_refitted": 3}
FROM_MODE = (*ROUNDS, "sampled_em", "dense_declared")
STANDARD_ROWS = ("map", *FROM_MODE, "nuts")
GAP_ROWS = ("map", "last_layer", "kronecker", "dense", "deep_ensemble")
MOMENTS = ("mean", "stddev", "epistemic_stddev")
NOISE = "likelihood.scale"


def run(fit: Fit) -> dict[str, Any]:
    """Fit, score and diagnose.

    Args:
        fit: What to do; its name is one of `ROWS`.

    Returns:
        The record, for JSON; with "failed" in place of figures where the time ended before the first draw.
    """
    data = load(fit.data, split=fit.split)
    record, load_before = heading(fit, data), os.getloadavg()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kept in the record
        if fit.name in FROM_MODE:
            _mode(fit.data, fit.split, fit.spec, fit.seed)
        began = time.process_time()
        try:
            posterior, found = _fitted(fit, data)
        except TimeoutError as error:
            return record | {"failed": str(error)}
    # Of the processor: the machine may be shared. What the shared mode took is in the row of MAP.
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    evaluation = evaluate(posterior, data)
    record |= costs(posterior, load_before) | found
    record["scores"] = {name: number(evaluation.scores[name]) for name in SCORES}
    record["constant_nll"] = number(constant_nll(data))
    record["mixing"] = mixing(posterior, data)
    if not str(fit.split).startswith("gap"):
        record["predictions"] = moments(evaluation.arrays)
    return record


def constant_nll(data: Dataset) -> float:
    """What predicting the training part's mean and standard deviation everywhere scores on the test part.

    Args:
        data: A regression.

    Returns:
        Negative log likelihood per datum, nats, in original units.
    """
    return 0.5 * math.log(2 * math.pi) + 0.5 * float(data.y_test.double().square().mean()) + data.nll_offset


def moments(arrays: Arrays) -> dict[str, list[float | None]]:
    """Mean and standard deviations of the predictions, and of each half of the chains.

    Args:
        arrays: Arrays of :func:`bnn_zoo.evaluate.evaluate`.

    Returns:
        By name, one figure for each test input, original units.
    """
    names = [f"{half}{name}" for half in ("", "half0_", "half1_") for name in MOMENTS]
    return {name: [number(value) for value in arrays[name]] for name in names if name in arrays}


def _fitted(fit: Fit, data: Dataset) -> tuple[Posterior, dict[str, Any]]:
    """The posterior, and what its record says beyond `reference.costs`."""
    if fit.name in ROUNDS:
        return _by_evidence(fit, data)
    if fit.name == "sampled_em":
        return _by_em(fit, data)
    model = fit.spec.build(data)
    begun = _mode(fit.data, fit.split, fit.spec, fit.seed) if fit.name in FROM_MODE else None
    init = chain_start(fit, model, data) if begun is None else begun
    posterior = fit.backend.fit(model, data.x_train, data.y_train, seed=fit.seed, init=init)
    evidence = posterior.log_evidence if isinstance(posterior, GaussianPosterior) else None
    return posterior, {"log_evidence": number(evidence)}


def _by_evidence(fit: Fit, data: Dataset) -> tuple[Posterior, dict[str, Any]]:
    """Mode and evidence in turn; the last round."""
    model, init = _start(fit, data)
    chosen: list[TunedPrior] = []
    for _ in range(ROUNDS[fit.name]):
        posterior: Any = fit.backend.fit(model, data.x_train, data.y_train, seed=fit.seed, init=init)
        chosen.append(tune_prior(posterior, noise=True))
        model, init = chosen[-1].model, chosen[-1].posterior
    tuned = chosen[-1]
    found = {
        "gradients": round(sum(choice.posterior.info.gradients for choice in chosen)),
        "log_evidence": number(tuned.log_evidence),
        "rounds": [number(choice.log_evidence) for choice in chosen],
        "noise": number(tuned.noise_scale),
        "prior_scales": {name: number(float(scale)) for name, scale in tuned.scales.items()},
    }
    return tuned.posterior, found


def _by_em(fit: Fit, data: Dataset) -> tuple[Posterior, dict[str, Any]]:
    """Expectation-maximisation at the first mode."""
    model, init = _start(fit, data)
    posterior: Any = fit.backend.fit(model, data.x_train, data.y_train, seed=fit.seed, init=init)
    at_mode = model.likelihood.scale  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        "log_evidence": None,
        "rounds": len(posterior.info.extra["em_history"]),
        "noise_at_mode": number(at_mode),
        "noise": number(at_mode * posterior.noise_factor**0.5),
        "prior_scales": {name: number(float(scale.mean())) for name, scale in posterior.prior_scales().items()},
        "relative_residual": number(posterior.info.extra["relative_residual"]),
    }
    return posterior, found


def _start(fit: Fit, data: Dataset) -> tuple[MLP, dict[str, Tensor]]:
    """The model with a known noise scale, that of the mode, and the weights there."""
    mode = _mode(fit.data, fit.split, fit.spec, fit.seed)
    sites = {name: value[0] for name, value in mode.sample_sites(1).items()}
    noise = float(sites.pop(NOISE))
    declared = fit.spec.build(data)
    model = MLP(declared.sizes, fit.spec.activation, declared.prior, likelihoods.Normal(noise))
    return model, sites


@lru_cache(maxsize=1)
def _mode(data_name: str, split: int | str, spec: ModelSpec, seed: int) -> Posterior:
    """The mode of the declared model, which the Laplace rows of a split share."""
    data = load(data_name, split=split)
    return ROWS["map"].fit(spec.build(data), data.x_train, data.y_train, seed=seed)


def planned(
    data: Sequence[str], num_splits: int | None, gaps: bool, backends: dict[str, Backend], spec: ModelSpec
) -> list[Fit]:
    """All fits, split by split.

    Args:
        data: Names of the data sets.
        num_splits: How many splits, from the first on; None for all.
        gaps: Gap splits that differ instead of standard ones.
        backends: Backends by row.
        spec: The network.

    Returns:
        The fits, in the order of running.
    """
    each: dict[str, Sequence[int | str]] = {}
    for info in available():
        if gaps:
            each[info.name] = [f"gap{j}" for j in GAPS.get(info.name, range(info.gap_splits))][:num_splits]
        else:
            each[info.name] = range(info.splits)[:num_splits]
    return [
        Fit(name, each[name][place], row, backend, spec)
        for place in range(max(len(each[name]) for name in data))
        for name in data
        if place < len(each[name])
        for row, backend in backends.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the records that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"names, separated by commas ({','.join(DATA)}; for gaps {','.join(GAPS)})")
    parser.add_argument("--splits", type=int, help=f"how many, from 0 on ({NUM_SPLITS}; for gaps, all)")
    parser.add_argument("--gaps", action="store_true", help="gap splits instead of standard ones")
    parser.add_argument("--rows", help=f"some of {','.join(ROWS)}; by default all that belong to the splits")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of one fit of NUTS (%(default)s)")
    parser.add_argument("--hidden", type=int, default=50, help="hidden units (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    num_splits = options.splits if options.splits is not None or options.gaps else NUM_SPLITS
    if (num_splits is not None and num_splits < 1) or options.seconds <= 0:
        parser.error(f"--splits and --seconds must be positive, got {num_splits} and {options.seconds:g}")
    data = options.data.split(",") if options.data else tuple(GAPS) if options.gaps else DATA
    rows = options.rows.split(",") if options.rows else GAP_ROWS if options.gaps else STANDARD_ROWS
    try:
        _check_names(data, [info.name for info in available() if info.kind == "table"], "data sets")
        _check_names(rows, ROWS, "rows")
        spec = ModelSpec(hidden=(options.hidden,))
    except UsageError as error:
        parser.error(str(error))
    fits = planned(data, num_splits, options.gaps, {n: limited(ROWS[n], options.seconds) for n in rows}, spec)
    torch.set_num_threads(1)
    make_missing(fits, options.out, run)


def _check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what[:-1]} {name!r}: {did_you_mean(name, known, what)}")


if __name__ == "__main__":
    main()
