"""Running chains on closed-form densities, and the z-scores that judge them."""

import math

import numpy as np
import torch
from torch import Tensor

from inference.diagnostics import ess_mean
from inference.mcmc.chain import Schedule
from inference.mcmc.chains import Ensemble
from inference.mcmc.hmc import HMCKernel
from inference.mcmc.integrators import LogDensity
from inference.mcmc.lanes import Kernel, Transition
from inference.mcmc.metrics import MassMatrix, Metric
from inference.mcmc.nuts import NUTSKernel
from inference.mcmc.recording import Record, Recorder, Recording

NUTS = NUTSKernel(max_tree_depth=10)
HMC = HMCKernel(trajectory_length=math.pi / 2, num_leapfrogs=None, jitter=0.2, max_leapfrogs=1000)


def data() -> tuple[Tensor, Tensor]:
    """Twelve rows of a regression on two inputs, for fits whose posterior does not matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(12, generator=generator)


def streams(num: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + c) for c in range(num)]


def ensemble(
    log_density: LogDensity,
    starts: Tensor,
    kernel: Kernel = NUTS,
    seed: int = 0,
    mass_matrix: MassMatrix = "diagonal",
    thinning: int = 1,
    **changes: object,
) -> Ensemble:
    fields = {
        "num_samples": 300,
        "warmup_steps": 200,
        "step_size": None,
        "adapt_step_size": True,
        "target_accept": 0.8,
    }
    options = {k: changes.pop(k) for k in list(changes) if k not in fields}
    schedule = Schedule(**{**fields, **changes})  # type: ignore[arg-type]
    recorder = Recorder(Recording(schedule.num_samples, thinning), starts)
    metric = Metric.identity(mass_matrix, starts[0])
    common = {"metric": metric, "recorder": recorder, **options}
    return Ensemble(log_density, starts, streams(starts.shape[0], seed), kernel, schedule, **common)  # type: ignore[arg-type]


def transitions(record: Record) -> list[Transition]:
    names = ("acceptance_rate", "n_steps", "tree_depth", "diverging", "energy")
    columns = [record.stats.get(name, []) for name in names]
    return [Transition(a, int(n), int(d), bool(v), e) for a, n, d, v, e in zip(*columns, strict=True)]


def draws_of(
    log_density: LogDensity, starts: Tensor, kernel: Kernel = NUTS, seed: int = 0, **changes: object
) -> Tensor:
    running = ensemble(log_density, starts, kernel, seed, **changes)
    running.run()
    return torch.stack([r.draws for r in running.records])


def z_scores(draws: Tensor, expected: Tensor) -> np.ndarray:
    """(mean of draws - expected) in Monte-Carlo standard errors; draws (C, S, ...)."""
    flat = draws.flatten(0, 1)
    error = flat.std(0).numpy() / np.sqrt(np.asarray(ess_mean(draws)))
    return (flat.mean(0) - expected).numpy() / error


class CorrelatedGaussian:
    """N(loc, covariance) in 10 dimensions, standard deviations between about 0.5 and 2."""

    def __init__(self, dim: int = 10) -> None:
        generator = torch.Generator().manual_seed(1)
        factor = torch.randn(dim, dim, generator=generator)
        scale = torch.linspace(0.6, 1.6, dim)
        self.loc = torch.arange(float(dim))
        self.covariance = scale[:, None] * (factor @ factor.T / dim + 0.3 * torch.eye(dim)) * scale
        self.precision = torch.linalg.inv(self.covariance)
        self.root = torch.linalg.cholesky(self.covariance)

    def log_density(self, theta: Tensor) -> Tensor:
        offset = theta - self.loc
        return -0.5 * offset @ (self.precision @ offset)

    def sample(self, num: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.loc + torch.randn(num, self.loc.shape[0], generator=generator) @ self.root.T
