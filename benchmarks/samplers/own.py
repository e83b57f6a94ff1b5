"""Our samplers and Pyro's as contestants: `python -m benchmarks.samplers.own SPECIFICATION.json`.

Answers one line of JSON for each line of JSON it reads, like the scripts in `benchmarks/peers/`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import inference
from benchmarks.samplers.posteriors import POSTERIORS, Posterior
from inference import graph
from inference.bridges import PyroMCMC

_building = [0.0]


def _timed(name: str) -> None:
    inner = getattr(graph, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), _building[0]
        out = inner(*args, **kwargs)
        _building[0] = before + time.perf_counter() - start  # calls inside calls count once
        return out

    setattr(graph, name, outer)


def backend_of(sampler: str, options: dict[str, Any]) -> inference.Backend:
    """The backend of a contestant.

    Args:
        sampler: Name of one of our classes, or "Pyro NUTS".
        options: Its fields.

    Returns:
        The backend.
    """
    if sampler == "Pyro NUTS":
        run = {name: options[name] for name in ("num_samples", "warmup_steps", "num_chains")}
        tree = {"max_tree_depth": options["max_tree_depth"]}
        return PyroMCMC(kernel="NUTS", options=tree, allow_one_chain=True, **run)
    return getattr(inference, sampler)(**options, allow_one_chain=True)  # one chain is what one of the rows times


def fit(posterior: Posterior, backend: inference.Backend, seed: int, path: str) -> dict[str, Any]:
    """One whole fit.

    Args:
        posterior: What to sample.
        backend: The sampler.
        seed: Its seed.
        path: File for the function values (C, S, F).

    Returns:
        Seconds of all of it, seconds without recording and compiling, and gradient evaluations.
    """
    model = posterior.model
    if isinstance(backend, PyroMCMC) and posterior.plain_model is not None:
        model = posterior.plain_model
    x, y = (torch.from_numpy(posterior.arrays[name]) for name in ("x", "y"))
    _building[0] = 0.0
    start = time.perf_counter()
    found = backend.fit(model, x, y, seed=seed)
    seconds = time.perf_counter() - start
    draws: Tensor = found.draws
    values = posterior.functions(found.target.unravel(draws.flatten(0, 1)))
    np.save(path, values.unflatten(0, draws.shape[:2]).double().numpy())
    return {
        "seconds": seconds,
        "sampling_seconds": seconds - _building[0],
        "gradients": found.info.gradients,
        "divergences": int(found.sample_stats["diverging"].sum()) if "diverging" in found.sample_stats else 0,
    }


def main() -> None:
    """Get ready, say so, and answer orders until the input ends."""
    with open(sys.argv[1]) as file:
        specification = json.load(file)
    torch.set_num_threads(specification["threads"])
    warnings.simplefilter("ignore")
    for name in ("capture", "_inductor"):
        _timed(name)
    posterior = POSTERIORS[specification["posterior"]]()
    backend = backend_of(specification["sampler"], specification["options"])
    print(json.dumps({"versions": {}}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(fit(posterior, backend, order["seed"], order["path"])), flush=True)


if __name__ == "__main__":
    main()
