"""The chains of ChEES-HMC: trajectories of all chains at once, and what warm-up does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.errors import NonFiniteError
from inference.graph import Captured, hot
from inference.mcmc.chees_adaptation import Adaptation, criterion_gradient, halton
from inference.mcmc.integrators import leapfrog
from inference.mcmc.lanes import DIVERGENCE
from inference.mcmc.lockstep import Figures, Problem

if TYPE_CHECKING:
    from inference.mcmc.chees import ChEESHMC

# Shares of the warm-up after which pooled variances become the mass matrix.
_MASS_UPDATES = (0.1, 0.25, 0.5)
# What a checkpoint keeps of the chains.
_FIGURES = ("gradients", "iteration", "warmup_divergences", "step_size", "length")
_TENSORS = ("position", "gradient", "log_density", "scale")


class ChEESChains:
    """All chains of one fit.

    Args:
        options: The backend.
        problem: The target.
    """

    def __init__(self, options: ChEESHMC, problem: Problem) -> None:
        self.options, self.problem = options, problem
        num, dim = problem.starts.shape
        self.gradients, self.iteration, self.warmup_divergences = num, 0, 0
        self.log_density, self.gradient = problem.at_start()
        self.position = problem.starts
        self.scale = torch.ones(dim, dtype=problem.starts.dtype, device=problem.starts.device)
        calls = (options.warmup_steps + options.num_samples) * min(options.max_leapfrogs, 20)
        self._program = _leapfrog_program(problem, calls)
        self.step_size = options.step_size or (self._find_step_size(0.1) if options.adapt else 0.1)
        self.length = options.trajectory_length or self.step_size
        self.centres, self.seen = self.position, 1

    def warm_up(self) -> Iterator[tuple[int, Figures]]:
        """Adapt step size, length and mass matrix.

        Yields:
            1, and figures, after every trajectory.
        """
        options = self.options
        adaptation = Adaptation(self.step_size, self.length, options)
        updates = {round(share * options.warmup_steps) for share in _MASS_UPDATES}
        pooled = _PooledVariances(self.position)
        for n in range(1, options.warmup_steps + 1):
            start = self.position
            trajectory = self._trajectory()
            self.warmup_divergences += int(trajectory.diverging.sum())
            if options.adapt:
                self._adapt(adaptation, start, trajectory)
            if options.mass_matrix == "diagonal":
                pooled.add(self.position)
                if n in updates and pooled.count * self.problem.num_chains >= 10:
                    self.scale = pooled.regularised().sqrt().to(self.position.dtype)
                    pooled = _PooledVariances(self.position)
                    if options.adapt:
                        self.step_size = self._find_step_size(self.step_size)
                        adaptation = Adaptation(self.step_size, max(1.0, self.step_size), options)
                        self.length = adaptation.length
            yield 1, self._figures(trajectory)
        if options.adapt:
            self.step_size, self.length = math.exp(adaptation.log_step_size), math.exp(adaptation.log_length)

    def draw(self) -> tuple[Tensor, dict[str, Tensor], Figures]:
        """Move by ``thinning`` trajectories.

        Returns:
            Positions (C, P), statistics (C,), figures.
        """
        broken = torch.zeros_like(self.log_density, dtype=torch.bool)
        steps = 0
        for _ in range(self.options.thinning):
            trajectory = self._trajectory()
            broken, steps = broken | trajectory.diverging, steps + trajectory.num_steps
        stats = {
            "diverging": broken,
            "n_steps": torch.full_like(broken, steps, dtype=torch.int64),
            "acceptance_rate": trajectory.acceptance,
            "energy": trajectory.energy,
            "lp": self.log_density,
            "step_size": torch.full_like(self.log_density, self.step_size),
        }
        return self.position, stats, self._figures(trajectory)

    def report(self) -> dict[str, object]:
        """What warm-up found."""
        return {
            "step_size": self.step_size,
            "trajectory_length": self.length,
            "warmup_divergences": self.warmup_divergences,
        }

    @property
    def compiled(self) -> bool:
        """Whether leapfrogs went through Inductor."""
        return self._program.compiled

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and tensors from which :meth:`restore` goes on."""
        return {name: getattr(self, name) for name in _FIGURES}, {
            **{name: getattr(self, name) for name in _TENSORS},
            **self.problem.noise.state(),
        }

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        for name in _FIGURES:
            setattr(self, name, figures[name])
        for name in _TENSORS:
            setattr(self, name, tensors[name].to(self.scale.device))
        self.problem.noise.restore(tensors)

    def _figures(self, trajectory: Trajectory) -> Figures:
        return {
            "acceptance": float(trajectory.acceptance.mean()),
            "length": self.length,
            "leapfrogs": trajectory.num_steps,
            "step_size": self.step_size,
        }

    def _adapt(self, adaptation: Adaptation, start: Tensor, trajectory: Trajectory) -> None:
        # Distances and velocities in units of the scales: as if the parameters had been divided by them.
        ok = ~trajectory.diverging
        centres = None
        if self.options.centre == "chain":
            self.seen += 1
            # A running mean that forgets where warm-up began.
            self.centres = self.centres + (self.position - self.centres) * max(1.0 / self.seen, 0.02)
            centres = (self.centres / self.scale)[ok]
        gradient = math.nan
        if bool(trajectory.acceptance[ok].sum() > 0):
            gradient = criterion_gradient(
                (start / self.scale)[ok],
                (trajectory.proposal / self.scale)[ok],
                (trajectory.momentum * self.scale)[ok],
                trajectory.acceptance[ok],
                trajectory.share * self.length,
                centres,
            )
        adaptation.update(trajectory.acceptance[ok], gradient)
        self.step_size, self.length = adaptation.step_size, adaptation.length

    def _trajectory(self) -> Trajectory:
        share = 1.0 - self.options.jitter * (1.0 - halton(self.iteration))
        self.iteration += 1
        num_steps = max(1, min(math.ceil(share * self.length / self.step_size), self.options.max_leapfrogs))
        before, state, after = self._integrate(num_steps, self.step_size)
        gain = before - after
        diverging = ~((gain > -DIVERGENCE) & (gain < math.inf))
        acceptance = torch.where(diverging, 0.0, gain.clamp_max(0.0).exp())
        accepted = self.problem.noise.log_uniform() < acceptance.log()
        rows = accepted.unsqueeze(-1)
        proposal, momentum, gradient, log_density = state
        self.position = torch.where(rows, proposal, self.position)
        self.gradient = torch.where(rows, gradient, self.gradient)
        self.log_density = torch.where(accepted, log_density, self.log_density)
        energy = torch.where(accepted, after, before)
        return Trajectory(proposal, momentum, acceptance, diverging, energy, num_steps, share)

    def _integrate(self, num_steps: int, step_size: float) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Leapfrogs of all chains from new momenta: energies before, the state after, energies after."""
        noise = self.problem.noise.normal(self.problem.dim)
        momentum, inverse_mass = noise / self.scale, self.scale.square().unsqueeze(0)
        kinetic = 0.5 * noise.double().square().sum(-1)
        before = kinetic - self.log_density
        position, gradient, log_density = self.position, self.gradient, self.log_density
        step = position.new_full((), step_size)
        for _ in range(num_steps):
            position, momentum, gradient, log_density = self._program(
                position, momentum, gradient, step, inverse_mass, *self.problem.data
            )
        self.gradients += num_steps * self.problem.num_chains
        kinetic = 0.5 * (momentum * self.scale).double().square().sum(-1)
        return before, (position, momentum, gradient, log_density), kinetic - log_density

    def _find_step_size(self, step_size: float) -> float:
        """Double or halve until the mean acceptance of one leapfrog crosses 0.8; the accepted side is returned."""
        direction = 0
        while True:
            before, _, after = self._integrate(1, step_size)
            accepted = float(torch.nan_to_num((before - after).clamp_max(0.0).exp()).mean())
            crossed = 1 if accepted > 0.8 else -1
            if direction not in (0, crossed):
                return step_size if crossed > 0 else 0.5 * step_size
            direction = crossed
            step_size *= 2.0**direction
            if not 1e-30 < step_size < 1e7:
                raise NonFiniteError(
                    f"no usable step size (reached {step_size:.1g}): the log density is flat or not smooth at the "
                    "starting points"
                )


@dataclass(frozen=True)
class Trajectory:
    """What all chains did in one iteration.

    Attributes:
        proposal: Positions proposed, (C, P).
        momentum: Momenta there, (C, P).
        acceptance: Acceptance probabilities, (C,).
        diverging: Whether the energy error exceeded 1000 nats, (C,).
        energy: Hamiltonian of the state kept, nats, (C,).
        num_steps: Leapfrogs taken.
        share: Element u of the Halton sequence.
    """

    proposal: Tensor
    momentum: Tensor
    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int
    share: float


class _PooledVariances:
    """Variances of the draws of all chains together, shrunken as in Stan."""

    def __init__(self, origin: Tensor) -> None:
        self.origin = origin.double().mean(0)
        self.chains, self.count = origin.shape[0], 0
        self.sum, self.squares = torch.zeros_like(self.origin), torch.zeros_like(self.origin)

    def add(self, position: Tensor) -> None:
        offset = position.double() - self.origin
        self.count += 1
        self.sum += offset.sum(0)
        self.squares += offset.square().sum(0)

    def regularised(self) -> Tensor:
        n = self.count * self.chains
        variance = (self.squares - self.sum.square() / n) / (n - 1)
        return variance * (n / (n + 5.0)) + 1e-3 * 5.0 / (n + 5.0)


def _leapfrog_program(problem: Problem, num_calls: float) -> Captured:
    """One leapfrog of all chains as a recorded graph."""

    def step(
        position: Tensor, momentum: Tensor, gradient: Tensor, step_size: Tensor, inverse_mass: Tensor, *data: Tensor
    ) -> tuple[Tensor, ...]:
        return leapfrog(position, momentum, gradient, step_size, inverse_mass, lambda q: problem.gradients(q, *data))

    starts = problem.starts
    example = (starts, starts, starts, starts.new_zeros(()), torch.zeros_like(starts[:1]), *problem.data)
    return hot(step, *example, compile=problem.compile, num_calls=num_calls)
