r"""Does a backend hit a posterior that is known in closed form? Bayesian linear regression with known noise.

With design matrix X (a column of ones for the bias), noise sd s and a N(0, 1) prior on every weight,

.. math:: \Lambda = I + X^\top X / s^2, \qquad \theta \mid D \sim N(\Lambda^{-1} X^\top y / s^2,\; \Lambda^{-1})

Exact methods must reproduce mean and covariance up to their Monte-Carlo error. The others have a known answer of their
own: mean-field Gaussians the variances 1 / diag(precision), modes no variance at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from bnn_models import MLP, likelihoods, priors
from bnn_zoo.budgets import make_backends
from inference.backend import Backend
from inference.diagnostics import convergence
from inference.posterior import DrawsPosterior, GaussianPosterior, Posterior
from inference.registry import BACKENDS

Verdict = Literal["exact", "biased as documented", "wrong"]
Law = Literal["exact", "mean field", "point", "narrow", "any spread"]

NOISE = 0.5
_NUM_DATA, _NUM_INPUTS = 40, 3
_MAX_Z = 4.0


@dataclass(frozen=True)
class Expectation:
    """What a method gives on this problem by design.

    Attributes:
        law: "exact"; "mean field": variances 1 / diag(precision); "point": no variance; "narrow": a variance of
            0.2 to 1.25 times the exact one; "any spread": some variance, whatever its size.
        mean: Largest error of a mean, in posterior standard deviations; samplers are held to their own standard error.
        ratio: Largest factor between found and expected variance, either way; likewise.
    """

    law: Law
    mean: float
    ratio: float = 1.0


EXPECTED: dict[str, Expectation] = {
    "map": Expectation("point", 0.02),
    "mean_field_vi": Expectation("mean field", 0.1, 1.1),
    "pathfinder": Expectation("exact", 0.2, 1.3),
    "hmc": Expectation("exact", 0.0),
    "nuts": Expectation("exact", 0.0),
    "chees_hmc": Expectation("exact", 0.0),
    "mclmc": Expectation("exact", 0.0),
    "mile": Expectation("any spread", 0.5),
    "dense_laplace": Expectation("exact", 0.02, 1.02),
    "diagonal_laplace": Expectation("mean field", 0.02, 1.02),
    "kronecker_laplace": Expectation("exact", 0.02, 1.02),
    "low_rank_laplace": Expectation("exact", 0.02, 1.02),
    "functional_laplace": Expectation("exact", 0.02, 1.02),
    "sampled_laplace": Expectation("exact", 0.02, 1.1),  # 1.1: 4.5 standard errors of a variance from 4,000 draws
    "swag": Expectation("any spread", 0.5),
    "deep_ensemble": Expectation("point", 0.1),
    "svgd": Expectation("narrow", 0.1),
    "pyro_guide_vi": Expectation("mean field", 0.25, 1.3),
    "pyro_mcmc": Expectation("exact", 0.0),
}

# Enough for four weights; what is not named keeps the backend's default.
_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "hmc": {"num_samples": 1000, "warmup_steps": 500},
    "nuts": {"num_samples": 1000, "warmup_steps": 500},
    "mean_field_vi": {"num_steps": 5000, "num_particles": 4},
    "svgd": {"num_particles": 50},
    "deep_ensemble": {"batch_size": None},
    "sampled_laplace": {"num_samples": 4000},
    "mile": {"num_samples": 2000, "warmup_steps": 2000, "num_chains": 4},
    "pyro_mcmc": {"num_samples": 500, "warmup_steps": 300},
}


@dataclass(frozen=True)
class Problem:
    """Data and closed-form posterior.

    Attributes:
        model: Pyro model.
        x: Inputs, (N, D).
        y: Targets, (N,).
        mean: Posterior mean of the weights and the bias, (D + 1,).
        precision: Posterior precision, (D + 1, D + 1).
    """

    model: Any
    x: torch.Tensor
    y: torch.Tensor
    mean: np.ndarray
    precision: np.ndarray


@dataclass(frozen=True)
class Check:
    """Result of :func:`check`.

    Attributes:
        backend: The backend.
        expected: What it gives by design.
        exact_mean: Closed form, (P,).
        exact_variance: Closed form, (P,).
        expected_variance: What the method gives by design, (P,); NaN where any is allowed.
        mean: Found, (P,).
        variance: Found, (P,).
        mean_errors: Errors of the means, in ``unit``, (P,).
        unit: "standard errors" or "posterior sd".
        problems: What is off, in words; empty when nothing is.
    """

    backend: Backend
    expected: Expectation
    exact_mean: np.ndarray
    exact_variance: np.ndarray
    expected_variance: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    mean_errors: np.ndarray
    unit: str
    problems: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict."""
        if self.problems:
            return "wrong"
        return "exact" if self.expected.law == "exact" else "biased as documented"

    def table(self) -> Table:
        """One line per weight."""
        heads = (
            "weight",
            "exact mean",
            "found",
            f"error, {self.unit}",
            "exact var.",
            "by design",
            "found",
            "found / exact",
        )
        table = Table(
            *heads, box=None, pad_edge=False, padding=(0, 2, 0, 0), title=repr(self.backend), title_justify="left"
        )
        names = [f"w[{i}]" for i in range(len(self.mean) - 1)] + ["bias"]
        for i, name in enumerate(names):
            by_design = "any" if np.isnan(self.expected_variance[i]) else f"{self.expected_variance[i]:.3g}"
            figures = (self.exact_mean[i], self.mean[i], self.mean_errors[i], self.exact_variance[i])
            ratio = self.variance[i] / self.exact_variance[i]
            table.add_row(name, *(f"{v:.4g}" for v in figures), by_design, f"{self.variance[i]:.3g}", f"{ratio:.3f}")
        return table

    def verdict_line(self) -> str:
        """The verdict and why."""
        bias = BACKENDS[_name(self.backend)].bias
        why = "; ".join(self.problems) if self.problems else f"documented: {bias}"
        return f"verdict: {self.verdict} ({why})"


def problem(seed: int = 0) -> Problem:
    """Correlated inputs, so that a diagonal covariance is visibly not the posterior's.

    Args:
        seed: Seed of the data.

    Returns:
        The problem, in float64.
    """
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((_NUM_DATA, 1))
    x = 0.8 * shared + 0.6 * rng.standard_normal((_NUM_DATA, _NUM_INPUTS))
    design = np.column_stack([x, np.ones(_NUM_DATA)])
    y = design @ rng.standard_normal(_NUM_INPUTS + 1) + NOISE * rng.standard_normal(_NUM_DATA)
    precision = np.eye(_NUM_INPUTS + 1) + design.T @ design / NOISE**2
    mean = np.linalg.solve(precision, design.T @ y) / NOISE**2
    model = MLP([_NUM_INPUTS, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(scale=NOISE))
    return Problem(model, torch.as_tensor(x), torch.as_tensor(y), mean, precision)


def check(name: str, changes: Sequence[str] = (), seed: int = 0) -> Check:
    """Run a backend on the problem and judge it.

    Args:
        name: Command-line name.
        changes: Texts such as ``nuts.num_samples=500``.
        seed: Seed of the fit; the data stay the same.

    Returns:
        The figures and the verdict.
    """
    backend = make_backends([name], _HYPERPARAMETERS, changes)[name]
    truth = problem()
    posterior = backend.fit(truth.model, truth.x, truth.y, seed=seed)
    return judge(posterior, backend, truth)


def judge(posterior: Posterior, backend: Backend, truth: Problem) -> Check:
    """Compare a posterior with the closed form and with what its method gives by design.

    Args:
        posterior: What the backend returned.
        backend: The backend.
        truth: The problem it was fitted to.

    Returns:
        The figures and the verdict.
    """
    # A backend that nobody has described here is held to the exact posterior.
    expected = EXPECTED.get(_name(backend), Expectation("exact", 0.1, 1.1))
    exact = np.diag(np.linalg.inv(truth.precision))
    by_design = {
        "exact": exact,
        "narrow": exact,
        "mean field": 1 / np.diag(truth.precision),
        "point": np.zeros_like(exact),
        "any spread": np.full_like(exact, np.nan),
    }[expected.law]
    mean, variance = _moments(posterior)
    problems = []
    chains = isinstance(posterior, DrawsPosterior) and "chains" in getattr(backend, "capabilities", ())
    sampler = expected.law == "exact" and chains
    if sampler:
        figures = convergence(posterior.draws.cpu().numpy())
        errors, limit, unit = (mean - truth.mean) / figures.mcse_mean, _MAX_Z, "standard errors"
        size = np.minimum(figures.ess_bulk, figures.ess_tail)
        room = 1 + _MAX_Z * np.sqrt(2 / size)  # of a variance from that many draws
    else:
        errors, limit, unit = (mean - truth.mean) / np.sqrt(exact), expected.mean, "posterior sd"
        room = np.full_like(exact, expected.ratio)
    if not (np.abs(errors) <= limit).all():
        problems.append(f"a mean is off by {np.abs(errors).max():.3g} {unit}, where at most {limit:g} is allowed")
    problems += _variance_problems(expected.law, variance, exact, by_design, room)
    return Check(backend, expected, truth.mean, exact, by_design, mean, variance, errors, unit, tuple(problems))


def _variance_problems(
    law: Law, variance: np.ndarray, exact: np.ndarray, by_design: np.ndarray, room: np.ndarray
) -> list[str]:
    share = variance / exact
    if law == "any spread":
        return [] if (variance > 0).all() else ["a variance is 0, where there should be some spread"]
    if law == "point":
        return (
            []
            if (share <= 0.01).all()
            else [f"a variance is {share.max():.3g} of the posterior's, where a point has none"]
        )
    if law == "narrow":
        fits = (share >= 0.2) & (share <= 1.25)
        return (
            []
            if fits.all()
            else [f"a variance is {share[~fits][0]:.3g} of the posterior's, where 0.2 to 1.25 is expected"]
        )
    ratio = variance / by_design
    worst = np.maximum(ratio, 1 / np.maximum(ratio, 1e-300))
    if (worst <= room).all():
        return []
    place = int((worst / room).argmax())
    return [f"a variance is {ratio[place]:.3g} of the expected one, where a factor of {room[place]:.3g} is allowed"]


def _moments(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of theta: of a Gaussian its own, of draws theirs."""
    if isinstance(posterior, GaussianPosterior):
        variance = posterior.gaussian.variance
    elif isinstance(posterior, DrawsPosterior):
        deviations = posterior.flat_draws - posterior.mean_theta
        variance = torch.tensordot(posterior.weights.reshape(-1), deviations.square(), dims=1)
    else:
        variance = posterior.sample(10_000).var(0)
    return posterior.mean_theta.double().cpu().numpy(), variance.double().cpu().numpy()


def _name(backend: Backend) -> str:
    return next(entry.name for entry in BACKENDS.values() if entry.cls is type(backend))
