"""Simulation-based calibration of several backends on one of two small models: which are exact, and how others miss.

``linear``: Bayesian linear regression with correlated inputs, where all can be said in closed form. ``mlp``: a 1-10-1
tanh network with a known noise, looked at through its functions and through scalars of the weights that do not change
when hidden units are swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.budgets import make_backends
from bnn_zoo.check import EXPECTED
from bnn_zoo.errors import UsageError
from bnn_zoo.run_folder import write_arrays, write_json
from inference.backend import Backend
from inference.registry import BACKENDS
from inference.sbc import Calibration, calibrate
from inference.uniformity import Uniformity, uniformity

Verdict = Literal["uniform", "NOT UNIFORM", "fails as expected", "no deviation seen"]

LEVEL = 0.01
MODELS = ("linear", "mlp")
_MIN_REPLICATES = 40

# Short runs: a replicate is one fit, and there are hundreds. What is not named keeps the backend's default.
_LINEAR: dict[str, dict[str, Any]] = {
    "map": {"num_steps": 300},
    "mean_field_vi": {"num_steps": 1000, "step_size": 0.02},
    "hmc": {"num_samples": 75, "warmup_steps": 150},
    "nuts": {"num_samples": 75, "warmup_steps": 150},
    "chees_hmc": {"num_samples": 50, "warmup_steps": 150},
    "mclmc": {"num_samples": 2000, "warmup_steps": 2000},
    "mile": {"num_samples": 2000, "warmup_steps": 2000, "num_chains": 4},
    "dense_laplace": {"start.num_steps": 300},
    "diagonal_laplace": {"start.num_steps": 300},
    "swag": {"num_steps": 1000},
    "deep_ensemble": {"num_steps": 2000, "num_members": 5},
    "svgd": {"num_particles": 50, "num_steps": 500},
    "pyro_guide_vi": {"num_steps": 1000},
    "pyro_mcmc": {"num_samples": 50, "warmup_steps": 100},
}
_MLP: dict[str, dict[str, Any]] = {
    **_LINEAR,
    "hmc": {"num_samples": 60, "warmup_steps": 120, "num_chains": 8},
    "nuts": {"num_samples": 75, "warmup_steps": 150, "max_tree_depth": 8},
}


@dataclass(frozen=True)
class Problem:
    """A model with inputs.

    Attributes:
        model: Pyro model.
        x: Inputs of every replicate, (N, D).
        probes: Inputs whose function values are ranked, (n, D).
    """

    model: Any
    x: torch.Tensor
    probes: torch.Tensor


@dataclass(frozen=True)
class Row:
    """Result of one backend.

    Attributes:
        name: Command-line name.
        backend: The backend.
        model: "linear" or "mlp".
        calibration: The ranks.
        tests: One verdict per scalar.
    """

    name: str
    backend: Backend
    model: str
    calibration: Calibration
    tests: tuple[Uniformity, ...]

    @property
    def exact(self) -> bool:
        """Whether the method promises the posterior of this model."""
        return promises_exactness(self.name, self.model)

    @property
    def pvalue(self) -> float:
        """Smallest p-value of all scalars and both tests, corrected for their number (Bonferroni)."""
        return min(1.0, len(self.tests) * min(test.pvalue for test in self.tests))

    @property
    def verdict(self) -> Verdict:
        """The verdict; replicates that could not be fitted count against a method."""
        deviates = self.pvalue < LEVEL or bool(self.calibration.failures)
        if self.exact:
            return "NOT UNIFORM" if deviates else "uniform"
        return "fails as expected" if deviates else "no deviation seen"

    @property
    def worst(self) -> Uniformity:
        """The scalar with the smallest p-value; among equals the one that deviates most."""
        return min(self.tests, key=lambda t: (t.pvalue, -max(abs(t.shift), abs(t.spread))))

    def why(self) -> str:
        """The verdict's reason: what is documented of the method, or what to look at."""
        if self.verdict == "fails as expected":
            return BACKENDS[self.name].bias
        failed, warned = len(self.calibration.failures), sum(bool(r.warnings) for r in self.calibration.replicates)
        notes = [f"{failed} fits failed: {self.calibration.failures[0]}"] if failed else []
        if self.verdict == "NOT UNIFORM":
            notes.append("it promises the exact posterior: longer chains, or a fault")
        if warned:
            notes.append(f"{warned} of {len(self.calibration.replicates)} fits gave warnings")
        return "; ".join(notes)


def promises_exactness(name: str, model: str) -> bool:
    """Whether a backend should have uniform ranks: all exact ones on the linear model, samplers only on the network."""
    entry = BACKENDS[name]
    exact = name in EXPECTED and EXPECTED[name].law == "exact"
    return exact and (model == "linear" or "chains" in entry.capabilities)


def problem(model: str) -> Problem:
    """One of the two problems, in float64.

    Args:
        model: "linear" or "mlp".

    Returns:
        Model and inputs.

    Raises:
        UsageError: If there is no such model.
    """
    if model not in MODELS:
        raise UsageError(f"--model must be one of {', '.join(MODELS)} with --sbc, got {model!r}")
    generator = torch.Generator().manual_seed(0)
    if model == "linear":
        shared = torch.randn(20, 1, generator=generator, dtype=torch.float64)
        x = 0.8 * shared + 0.6 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
        made = MLP([3, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(scale=0.5))
        return Problem(made, x, torch.cat([x[:2], 2 * torch.eye(3, dtype=torch.float64)[:1]]))
    x = torch.linspace(-2, 2, 10, dtype=torch.float64).unsqueeze(-1)
    made = MLP([1, 10, 1], prior=priors.Normal(scale="fan_in"), likelihood=likelihoods.Normal(scale=0.5))
    return Problem(made, x, torch.tensor([[-3.0], [-1.0], [0.2], [2.0]], dtype=torch.float64))


def run(
    names: Sequence[str],
    model: str = "linear",
    *,
    num_replicates: int = 200,
    changes: Sequence[str] = (),
    n_jobs: int = 1,
    seed: int = 0,
    listen: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> list[Row]:
    """Calibrate several backends.

    Args:
        names: Command-line names.
        model: "linear" or "mlp".
        num_replicates: Number of simulated data sets R.
        changes: Texts such as ``nuts.num_samples=500``.
        n_jobs: Worker processes.
        seed: Seed of everything.
        listen: Called with the backend's name and replicates done and in all.

    Returns:
        One row per backend.

    Raises:
        UsageError: If there are too few replicates for a test, or a name or change is unknown.
    """
    if num_replicates < _MIN_REPLICATES:
        raise UsageError(
            f"--replicates must be at least {_MIN_REPLICATES}, got {num_replicates}: fewer ranks show nothing"
        )
    task = problem(model)
    rows = []
    for name, backend in make_backends(names, {}, [*defaults(names, model), *changes]).items():
        ranks = calibrate(
            backend,
            task.model,
            task.x,
            torch.zeros(len(task.x), dtype=torch.float64),
            probes=task.probes,
            num_replicates=num_replicates,
            n_jobs=n_jobs,
            seed=seed,
            progress=lambda done, total, name=name: listen(name, done, total),
        )
        if len(ranks.replicates) < _MIN_REPLICATES // 2:
            raise UsageError(f"{name}: {len(ranks.failures)} of {num_replicates} fits failed: {ranks.failures[0]}")
        tests = tuple(uniformity(scalar, ranks.pit[:, i]) for i, scalar in enumerate(ranks.names))
        rows.append(Row(name, backend, model, ranks, tests))
    return rows


def defaults(names: Sequence[str], model: str) -> list[str]:
    """The short runs' hyperparameters, as changes that the user's own may follow."""
    fields: Mapping[str, dict[str, Any]] = _LINEAR if model == "linear" else _MLP
    return [f"{name}.{key}={value!r}" for name in names for key, value in fields.get(name, {}).items()]


def overview(rows: Sequence[Row]) -> Table:
    """One line per backend."""
    table = _table("backend", "verdict", "p-value", "worst scalar", "shape", "spread", "draws", "s / fit", "")
    for row in rows:
        worst = row.worst
        figures = (f"{worst.ratio:.2f}", f"{row.calibration.num_draws:.0f}", f"{row.calibration.seconds:.2g}")
        table.add_row(row.name, row.verdict, written(row.pvalue), worst.name, worst.shape, *figures, row.why())
    return table


def details(rows: Sequence[Row]) -> Table:
    """One line per backend and scalar."""
    table = _table("backend", "scalar", "chi-square p", "envelope p", "shift z", "spread z", "spread", "shape")
    for row in rows:
        for test in row.tests:
            figures = (f"{test.shift:+.1f}", f"{test.spread:+.1f}", f"{test.ratio:.2f}")
            shape = test.shape if test.pvalue < LEVEL else ""
            table.add_row(row.name, test.name, written(test.chi_square), written(test.envelope), *figures, shape)
    return table


def save(folder: Path, rows: Sequence[Row], seed: int) -> None:
    """Write ``sbc.json`` with every figure and ``ranks.npz`` with the ranks.

    Args:
        folder: Where to; made if it is not there.
        rows: The results.
        seed: Seed they were made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "backend": row.name,
            "hyperparameters": repr(row.backend),
            "model": row.model,
            "seed": seed,
            "replicates": len(row.calibration.replicates),
            "failures": list(row.calibration.failures),
            "verdict": row.verdict,
            "pvalue": row.pvalue,
            "seconds_per_fit": row.calibration.seconds,
            "median_draws": row.calibration.num_draws,
            "scalars": [vars(test) | {"shape": test.shape} for test in row.tests],
        }
        for row in rows
    ]
    write_json(folder / "sbc.json", content)
    write_arrays(folder / "ranks.npz", {row.name: np.asarray(row.calibration.pit) for row in rows})


def written(pvalue: float) -> str:
    """A p-value as text."""
    return f"{pvalue:.3f}" if pvalue >= 0.001 else f"{pvalue:.0e}"


def _table(*heads: str) -> Table:
    return Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
