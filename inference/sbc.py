r"""Simulation-based calibration: is a backend right on average over data that the model itself makes?

.. math:: \theta^* \sim p(\theta), \; y \sim p(y \mid x, \theta^*), \; \theta_1, \dots, \theta_L \sim q(\theta \mid y)
          \quad\Longrightarrow\quad r = \#\{l : h(\theta_l) < h(\theta^*)\} \sim U\{0, \dots, L\}

for every scalar h when q is the exact posterior. Ranks of correlated draws are not uniform, so chains are thinned to
no more draws than their effective sample size; a rank among M draws becomes the probability integral transform
(r + U) / (M + 1) with a uniform U, which is uniform for every M and lets replicates be thinned differently. The
log-likelihood of the data is one of the scalars: without it a q that returns the prior would pass.

What it cannot see: errors that cancel over data sets, and scalars that were not asked for. Weights of a network are
looked at through scalars that do not change when hidden units are swapped or flipped, because chains visit one of the
many equivalent modes. Sources: talts2018validating [recalled from the paper, not re-read]; modrak2023sbc for the
log-likelihood [recalled, not re-read]; thinning by the effective sample size is theirs, the randomised rank is ours.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from inference.arrays import Floats
from inference.backend import Backend
from inference.data import chunks, num_data
from inference.diagnostics import ess_bulk
from inference.errors import NonFiniteError
from inference.mixtures import location
from inference.posterior import DrawsPosterior, GaussianPosterior
from inference.posterior_base import Posterior
from inference.prediction import DrawSource, draws_per_chunk
from inference.target import Target, check_new_inputs, compile_target

_MAX_ENTRIES = 12
_BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class Replicate:
    """What one simulated data set gave.

    Attributes:
        pit: Randomised rank of the truth among the draws, as a number in (0, 1), (Q,).
        num_draws: Draws it was ranked among, after thinning.
        ess: Smallest bulk effective sample size over the scalars; NaN where draws are independent.
        seconds: Wall time of the fit.
        warnings: Names of the warnings that the fit gave.
    """

    pit: Floats
    num_draws: int
    ess: float
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """Ranks of one backend over all replicates.

    Attributes:
        names: Names of the Q scalars.
        pit: Randomised ranks of the finished replicates, (R, Q).
        replicates: The finished replicates.
        failures: Messages of the replicates whose fit stopped with a non-finite density.
    """

    names: tuple[str, ...]
    pit: Floats
    replicates: tuple[Replicate, ...]
    failures: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Mean wall time of one fit."""
        return float(np.mean([r.seconds for r in self.replicates])) if self.replicates else float("nan")

    @property
    def num_draws(self) -> float:
        """Median number of draws ranked among."""
        return float(np.median([r.num_draws for r in self.replicates])) if self.replicates else float("nan")


class Scalars:
    """The scalars h whose ranks are taken.

    Without hidden layers every entry of theta, up to twelve spread evenly; otherwise the mean square of each site (the
    site itself where it is a scalar). Then the latent function at the probe inputs and the log-likelihood of the data.

    Args:
        target: A target of the model, whatever its y.
        probes: Inputs at which the latent function is looked at, every leaf (n, ...).
    """

    def __init__(self, target: Target, probes: Any) -> None:
        self.probes = check_new_inputs(target, probes)
        self.hidden = len(target.layers) > 1
        self.entries = np.unique(np.linspace(0, target.dim - 1, min(target.dim, _MAX_ENTRIES)).round().astype(int))
        zero = torch.zeros(1, target.dim, dtype=target.dtype, device=target.device)
        outputs = self._functions(target, zero).shape[1]
        names = [self._entry_name(target, int(i)) for i in self.entries]
        if self.hidden:
            names = [s.name if s.size == 1 else f"mean square of {s.name}" for s in target.sites]
        self.num_weights = len(names)
        self.names = (*names, *(f"f[{i}]" for i in range(outputs)), "log likelihood")

    def __call__(self, target: Target, thetas: Tensor) -> Tensor:
        """Values at draws.

        Args:
            target: The target, whose y is the simulated one.
            thetas: (S, P).

        Returns:
            (S, Q).
        """
        size = draws_per_chunk(target.recorded())
        with torch.no_grad():
            fits = [vmap(target.log_likelihood)(thetas[part]).sum(-1) for part in chunks(len(thetas), size)]
        columns = [self._weights(target, thetas), self._functions(target, thetas), torch.cat(fits).unsqueeze(-1)]
        return torch.cat(columns, -1)

    def linearised(self, posterior: GaussianPosterior, values: Tensor, stream: torch.Generator) -> Tensor:
        """The same values with those of the function from the linearised network, which is what it predicts with."""
        predicted = posterior.predict(self.probes)
        mean, spread = predicted.f_mean.reshape(-1), predicted.f_variance.sqrt().reshape(-1)
        noise = torch.randn(len(values), len(mean), generator=stream, dtype=mean.dtype, device=mean.device)
        out = values.clone()
        out[:, self.num_weights : self.num_weights + len(mean)] = mean + spread * noise
        return out

    def _weights(self, target: Target, thetas: Tensor) -> Tensor:
        if not self.hidden:
            return thetas[:, self.entries]
        pieces = [thetas[:, s.start : s.stop] for s in target.sites]
        return torch.stack([p[:, 0] if p.shape[1] == 1 else p.square().mean(1) for p in pieces], -1)

    def _functions(self, target: Target, thetas: Tensor) -> Tensor:
        """Latent function at the probe inputs, (S, n K)."""
        source = DrawSource(target, thetas, thetas.new_ones(1), self.probes)
        parts = [location(source.family, source.params(rows)) for rows in chunks(num_data(self.probes), source.rows)]
        return torch.cat(parts, 1).flatten(1)

    @staticmethod
    def _entry_name(target: Target, entry: int) -> str:
        site = next(s for s in target.sites if s.start <= entry < s.stop)
        return site.name if site.size == 1 else f"{site.name}[{entry - site.start}]"


def calibrate(
    backend: Backend,
    model: Any,
    x: Any,
    y: Tensor,
    *,
    probes: Any = None,
    num_replicates: int = 200,
    num_draws: int = 99,
    n_jobs: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Calibration:
    """Rank the truth among a backend's draws on data sets simulated from the model.

    The model is recorded once per process; its graphs serve every replicate. Replicates depend on ``seed`` and their
    number only, not on ``n_jobs``.

    Args:
        backend: What to test.
        model: Pyro callable ``model(x, y=None)``.
        x: Inputs of every replicate, every leaf (N, ...).
        y: Targets that give shape and dtype, (N, ...); their values are not used.
        probes: Inputs at which the latent function is ranked; up to four of the training inputs by default.
        num_replicates: Number of simulated data sets R.
        num_draws: Largest number of draws L that the truth is ranked among.
        n_jobs: Worker processes.
        seed: Seed of all randomness.
        progress: Called as ``progress(done, total)`` in replicates.

    Returns:
        The ranks.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value in (("num_replicates", num_replicates), ("num_draws", num_draws), ("n_jobs", n_jobs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}")
    plan = _Plan(backend, model, x, y, probes, num_draws, seed, torch.get_default_dtype())
    done: list[Replicate | str] = []
    for results in _batches(plan, num_replicates, n_jobs):
        done += results
        if progress is not None:
            progress(len(done), num_replicates)
    finished = tuple(r for r in done if isinstance(r, Replicate))
    names = plan.scalars(plan.target()).names
    pit = np.stack([r.pit for r in finished]) if finished else np.empty((0, len(names)))
    return Calibration(names, pit, finished, tuple(r for r in done if isinstance(r, str)))


@dataclass(frozen=True)
class _Plan:
    """All that a worker process needs."""

    backend: Backend
    model: Any
    x: Any
    y: Tensor
    probes: Any
    num_draws: int
    seed: int
    dtype: torch.dtype

    def target(self) -> Target:
        return compile_target(self.model, self.x, self.y)

    def scalars(self, target: Target) -> Scalars:
        if self.probes is not None:
            return Scalars(target, self.probes)
        rows = torch.linspace(0, target.num_data - 1, min(target.num_data, 4), dtype=torch.float64).round().long()
        return Scalars(target, _rows(target, rows))


def _rows(target: Target, rows: Tensor) -> Any:
    from inference.data import index

    return target.x if target.programs.traced.local_sites else index(target.x, rows)


def _batches(plan: _Plan, total: int, n_jobs: int) -> Iterator[list[Replicate | str]]:
    """Results in order, one by one in this process, or batch by batch from workers."""
    if n_jobs == 1:
        yield from ([result] for result in _run(plan, range(total)))
        return
    import joblib

    size = max(1, -(-total // (n_jobs * _BATCHES_PER_WORKER)))
    parts = [range(start, min(total, start + size)) for start in range(0, total, size)]
    tasks = (joblib.delayed(_run_in_worker)(plan, part) for part in parts)
    yield from joblib.Parallel(n_jobs=n_jobs, return_as="generator")(tasks)  # type: ignore[misc]


def _run_in_worker(plan: _Plan, indices: Sequence[int]) -> list[Replicate | str]:
    torch.set_num_threads(1)
    torch.set_default_dtype(plan.dtype)
    return list(_run(plan, indices))


def _run(plan: _Plan, indices: Sequence[int]) -> Iterator[Replicate | str]:
    base = plan.target()
    scalars = plan.scalars(base)
    for number in indices:
        try:
            yield _replicate(plan, base, scalars, number)
        except NonFiniteError as error:
            yield f"replicate {number}: {error}"


def _replicate(plan: _Plan, base: Target, scalars: Scalars, number: int) -> Replicate:
    data_seed, fit_seed, rank_seed = (int(s) for s in np.random.SeedSequence((plan.seed, number)).generate_state(3))
    target, truth = simulate(base, data_seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are counted below
        posterior = plan.backend.fit_to(target, seed=fit_seed)
    seconds = time.perf_counter() - start
    values, ess = scalar_draws(posterior, scalars, plan.num_draws, rank_seed)
    pit = randomised_ranks(values, scalars(target, truth.unsqueeze(0))[0], rank_seed)
    names = tuple(name for name, _ in posterior.info.warnings)
    return Replicate(pit, len(values), ess, seconds, names)


def simulate(target: Target, seed: int) -> tuple[Target, Tensor]:
    """Weights from the prior and data from the likelihood at them.

    Args:
        target: The model with its inputs.
        seed: Seed of both.

    Returns:
        The same recorded model with the simulated targets, and the weights that made them, (P,).
    """
    theta = target.sample_prior(1, seed)[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(seed + 1)
        y = target.likelihood(theta).sample()
    return dataclasses.replace(target, y=y.to(target.y.dtype).reshape(target.y.shape)), theta


def scalar_draws(posterior: Posterior, scalars: Scalars, num_draws: int, seed: int) -> tuple[Tensor, float]:
    """Values of the scalars at nearly independent draws of a posterior.

    Chains are thinned evenly to ``num_draws`` or to their smallest effective sample size, whichever is less. Particles
    and ensemble members count as draws as they are. A single point stands for ``num_draws`` equal draws.

    Args:
        posterior: What a backend returned.
        scalars: What to evaluate.
        num_draws: Largest number of draws L.
        seed: Seed of the draws of a continuous posterior.

    Returns:
        Values (M, Q) with M <= L, and the smallest effective sample size (NaN where there are no chains).
    """
    target = posterior.target
    if not isinstance(posterior, DrawsPosterior):
        values = scalars(target, posterior.sample(num_draws, seed))
        if isinstance(posterior, GaussianPosterior) and posterior.linearized:
            values = scalars.linearised(posterior, values, target.stream(seed, 1))
        return values, float("nan")
    if "chains" in getattr(posterior.backend, "capabilities", ()) and posterior.equally_weighted:
        values = scalars(target, posterior.flat_draws)
        chains = values.reshape(*posterior.draws.shape[:2], -1)
        ess = float(np.nanmin(ess_bulk(chains), initial=len(values)))
        keep = max(2, min(num_draws, int(ess), len(values)))
        places = torch.arange(keep, device=values.device)
        return values[(2 * places + 1) * len(values) // (2 * keep)], ess
    total = len(posterior.flat_draws)
    few = 1 < total <= num_draws and posterior.equally_weighted
    return scalars(target, posterior.flat_draws if few else posterior.sample(num_draws, seed)), float("nan")


def randomised_ranks(draws: Tensor, truth: Tensor, seed: int) -> Floats:
    """Ranks of the truth among draws as numbers in (0, 1), uniform when truth and draws are exchangeable.

    Args:
        draws: (M, Q).
        truth: (Q,).
        seed: Seed of the uniform numbers, which also break ties.

    Returns:
        (r + U) / (M + 1) with r between the numbers of draws below and not above the truth, (Q,).
    """
    rng = np.random.default_rng(seed)
    below = (draws < truth).sum(0).double().cpu().numpy()
    ties = (draws == truth).sum(0).double().cpu().numpy()
    return (below + rng.random(len(below)) * (ties + 1)) / (len(draws) + 1)
