"""Task "diagnostics": R-hat and effective sample sizes of many scalars, ours against ArviZ.

Draws are autoregressive with coefficient 0.8, four chains of 500, one scalar in seven with a shifted chain.
Neither side uses more than one thread: numpy's sorts and Fourier transforms have no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import arviz as az
import numpy as np

from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus
from inference import diagnostics

CHAINS, LENGTH = 4, 500
GOALS = {"rhat": 2.0, "ess_bulk": 3.0, "ess_tail": 3.0}


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """R-hat, bulk and tail ESS."""
    num_scalars = 20 if settings.quick else 10_000
    draws = autoregressive_draws(num_scalars)
    dataset = az.convert_to_dataset({"w": draws})
    pairs = {
        "rhat": (lambda: diagnostics.rhat(draws), lambda: az.rhat(dataset)["w"]),
        "ess_bulk": (lambda: diagnostics.ess_bulk(draws), lambda: az.ess(dataset)["w"]),
        "ess_tail": (lambda: diagnostics.ess_tail(draws), lambda: az.ess(dataset, method="tail")["w"]),
    }
    for name, (ours, theirs) in pairs.items():
        difference = np.abs(np.asarray(ours()) / np.asarray(theirs()) - 1).max()
        yield Case(
            f"{name}, {num_scalars:,} scalars x {CHAINS} chains x {LENGTH} draws",
            "s",
            "call",
            [Contestant("ours", ours), Contestant("ArviZ", theirs)],
            [Versus("ArviZ", "ours", GOALS[name])],
            {"largest relative difference": float(difference)},
        )


def autoregressive_draws(num_scalars: int) -> np.ndarray:
    """Draws of shape (4, 500, num_scalars), float64."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((CHAINS, LENGTH, num_scalars))
    for t in range(1, LENGTH):
        draws[:, t] += 0.8 * draws[:, t - 1]
    draws[0, :, ::7] += 1.0
    return draws
