"""Chains in lock step on closed-form densities."""

import torch
from torch import Tensor

from inference.mcmc.chees import ChEESHMC
from inference.mcmc.chees_chains import ChEESChains
from inference.mcmc.integrators import LogDensity
from inference.mcmc.lockstep import Noise, Problem, Sampler, batched_gradients
from inference.mcmc.microcanonical import Microcanonical, Tuning
from tests.inference.mcmc.sampling import streams


def problem(log_density: LogDensity, starts: Tensor, seed: int = 0) -> Problem:
    num = starts.shape[0]
    return Problem(batched_gradients(log_density, num), (), starts, Noise(streams(num, seed), starts))


def tuning(
    step_size: float, length: float, steps: tuple[int, int, int, int] = (0, 0, 0, 0), **changes: object
) -> Tuning:
    fields: dict[str, object] = {
        "adapt_step_size": sum(steps) > 0,
        "adapt_length": sum(steps) > 0,
        "precondition": False,
        "first_goal": 5e-4,
        "last_goal": 5e-4,
        "trust": 1.5,
        "window": 150.0,
    }
    return Tuning(steps, step_size, length, **{**fields, **changes})  # type: ignore[arg-type]


@torch.no_grad()
def microcanonical(
    log_density: LogDensity, starts: Tensor, settings: Tuning, thinning: int = 1, seed: int = 0
) -> Microcanonical:
    sampler = Microcanonical(problem(log_density, starts, seed), settings, 1000, thinning)
    for _ in sampler.warm_up():
        pass
    return sampler


@torch.no_grad()
def chees(log_density: LogDensity, starts: Tensor, options: ChEESHMC, seed: int = 0) -> ChEESChains:
    sampler = ChEESChains(options, problem(log_density, starts, seed))
    for _ in sampler.warm_up():
        pass
    return sampler


@torch.no_grad()
def draw(sampler: Sampler, num: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws (C, S, P) and their statistics (C, S)."""
    taken = [sampler.draw()[:2] for _ in range(num)]
    stats = {name: torch.stack([s[name] for _, s in taken], 1) for name in taken[0][1]}
    return torch.stack([position for position, _ in taken], 1), stats
