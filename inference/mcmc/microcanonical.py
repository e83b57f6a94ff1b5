r"""Microcanonical chains in lock step: the sampler behind MCLMC and MILE, and how it tunes itself, chain by chain.

Warm-up has three phases. In the first two the step size follows the energy errors E of the steps: with
:math:`\xi = E^2/(P v)` for the goal v, it is :math:`(\sum w\xi\epsilon^{-6} / \sum w)^{-1/6}` over a fading window, the
weights :math:`w = \exp(-\tfrac12(\log\xi/(6\tau))^2)` playing down outliers; the sixth power because the variance of
the error grows as :math:`\epsilon^6`. The second phase also averages the positions, and ends with the decoherence
length L = root of the summed posterior variances (or with preconditioning by these variances, :math:`L=\sqrt P`, and a
new step size). The third sets :math:`L = 0.4\,\epsilon\,n/\mathrm{ESS}` from the autocorrelations of n steps.
Source: robnik2023microcanonical; as in blackjax's ``mclmc_find_L_and_step_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inference.diagnostics import ess_mean
from inference.graph import Captured, hot
from inference.mcmc.isokinetic import Moving, isokinetic_step, normalised
from inference.mcmc.lockstep import Figures, Gradients, Problem

_LENGTH_FACTOR = 0.4
# A step that was not finite lowers the largest step size to this share of its own.
_SHRINK = 0.8
_NOISE_BLOCK = 2**18
_ESS_STEPS, _ESS_PARAMETERS = 2000, 500
_FEWEST_STEPS = 20
_REPORT_EVERY = 20
_STATE = ("position", "direction", "gradient", "log_density", "step_size", "length", "scale", "squares")
# Columns of the tuner's state.
_STEP, _CEILING, _SUM, _WEIGHT, _TIME = range(5)


@dataclass(frozen=True)
class Tuning:
    r"""What warm-up does.

    Attributes:
        steps: Steps of the four parts: step size; step size and variances; step size after preconditioning; length.
        step_size: Where the step size starts.
        length: Where the decoherence length starts.
        adapt_step_size: Whether the step size is tuned, or kept.
        adapt_length: Whether the length is tuned, or kept.
        precondition: Whether parameters are scaled by their standard deviations.
        first_goal: Mean squared energy error per parameter to aim at in the first step.
        last_goal: The same in the last step of the second part; linear in between.
        trust: Width :math:`\tau` of the weights.
        window: Effective number of steps of the fading window.
    """

    steps: tuple[int, int, int, int]
    step_size: float
    length: float
    adapt_step_size: bool
    adapt_length: bool
    precondition: bool
    first_goal: float
    last_goal: float
    trust: float
    window: float

    @property
    def decay(self) -> float:
        """Factor by which the window forgets at each step."""
        return (self.window - 1.0) / (self.window + 1.0)


def tuned(tuner: Tensor, error: Tensor, finite: Tensor, goal: Tensor, dim: int, tuning: Tuning) -> Tensor:
    """The tuner's state after one step.

    Args:
        tuner: Step size, its ceiling, fading sums of weighted errors and of weights, time averaged over; (C, 5).
        error: Energy error of the step in nats, (C,).
        finite: Whether the step was taken, (C,).
        goal: Mean squared error per parameter to aim at, ().
        dim: Number P of parameters.
        tuning: Weights and window.

    Returns:
        The new state, (C, 5).
    """
    step_size, ceiling, total, weight, time = tuner.unbind(-1)
    xi = error.square() / (dim * goal) + 1e-8
    own = torch.exp(-0.5 * (xi.log() / (6.0 * tuning.trust)).square())
    total = tuning.decay * total + own * xi / step_size**6
    weight = tuning.decay * weight + own
    ceiling = torch.where(finite, ceiling, _SHRINK * step_size)
    new = torch.minimum((total / weight) ** (-1.0 / 6.0), ceiling)
    step_size = torch.where(torch.isfinite(new), new, step_size)
    return torch.stack([step_size, ceiling, total, weight, time], -1)


class Microcanonical:
    """All chains of one MCLMC run.

    Args:
        problem: The target.
        tuning: What warm-up does.
        num_samples: Steps a chain after warm-up.
        thinning: Steps a draw.
    """

    def __init__(self, problem: Problem, tuning: Tuning, num_samples: int, thinning: int) -> None:
        self.dim = problem.dim
        # On a line there are but two directions; a second, standard normal parameter leaves the first as it is.
        problem = _padded(problem) if problem.dim == 1 else problem
        self.problem, self.tuning, self.thinning = problem, tuning, thinning
        num, dim = problem.starts.shape
        self.gradients = num
        values, grads = problem.at_start()
        self.moving = Moving(problem.starts, normalised(problem.noise.normal(dim)), grads, values)
        double = {"dtype": torch.float64, "device": grads.device}
        self.step_size = torch.full((num,), tuning.step_size, **double)
        self.length = torch.full((num,), tuning.length, **double)
        self.scale = torch.ones_like(grads)
        self.squares, self.steps = torch.zeros(num, **double), 0
        self._noise: list[Tensor] = []
        self._tuner, self._moments = self._fresh()
        self._block = max(1, min(64, _NOISE_BLOCK // (2 * dim)))
        calls = num_samples + sum(tuning.steps)
        self._move = _move_program(problem, calls)
        self._tune = _tune_program(problem, tuning, calls) if sum(tuning.steps[:3]) else self._move

    @property
    def compiled(self) -> bool:
        """Whether steps went through Inductor."""
        return self._move.compiled

    def warm_up(self) -> Iterator[tuple[int, Figures]]:
        """The phases of the tuning.

        Yields:
            Steps done since the last time, and figures.
        """
        tuning = self.tuning
        first, second, third, fourth = tuning.steps
        total = first + second
        goals = [
            tuning.first_goal + (tuning.last_goal - tuning.first_goal) * i / max(total - 1, 1) for i in range(total)
        ]
        yield from self._adapt(goals, first)
        if second > 1:
            weight = self._tuner[:, _TIME].unsqueeze(-1).to(self.scale.dtype)
            mean = self._moments[0] / weight
            variances = (self._moments[1] / weight - mean.square()).clamp_min(0.0)
            if tuning.precondition:
                self.scale = torch.where(variances > 0, variances.sqrt(), self.scale)
            if tuning.adapt_length:
                self._set_length((variances / self.scale.square()).double().sum(-1).sqrt())
        yield from self._adapt([tuning.last_goal] * third, third)
        yield from self._fit_length(fourth)
        self.squares, self.steps = torch.zeros_like(self.squares), 0

    def draw(self) -> tuple[Tensor, dict[str, Tensor], Figures]:
        """Move ``thinning`` steps.

        Returns:
            Positions (C, P), statistics (C,), figures.
        """
        broken = torch.zeros_like(self.squares, dtype=torch.bool)
        for _ in range(self.thinning):
            error, taken = self._advance()
            broken = broken | ~taken
        stats = {
            "diverging": broken,
            "lp": self.moving.log_density,
            "energy_change": error,
            "step_size": self.step_size,
            "n_steps": torch.full_like(broken, self.thinning, dtype=torch.int64),
        }
        return self.moving.position[:, : self.dim], stats, self._figures()

    def report(self) -> dict[str, object]:
        """Step sizes, lengths and energy errors, one per chain."""
        per_parameter = self.squares / (max(self.steps, 1) * self.problem.dim)
        return {
            "step_size": self.step_size.tolist(),
            "decoherence_length": self.length.tolist(),
            "energy_variance": per_parameter.tolist(),
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and tensors from which :meth:`restore` goes on."""
        held = (*self.moving.tensors(), self.step_size, self.length, self.scale, self.squares)
        tensors: dict[str, Tensor] = dict(zip(_STATE, held, strict=True))
        tensors["unused_noise"] = torch.stack(self._noise) if self._noise else self.scale.new_zeros(0)
        return {"gradients": self.gradients, "steps": self.steps}, tensors | self.problem.noise.state()

    def restore(self, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state`."""
        held = [tensors[name].to(self.scale.device) for name in _STATE]
        self.moving = Moving(*held[:4])
        self.step_size, self.length, self.scale, self.squares = held[4:]
        self.gradients, self.steps = figures["gradients"], figures["steps"]
        self._noise = list(tensors["unused_noise"].to(self.scale.device))
        self.problem.noise.restore(tensors)

    def _figures(self) -> Figures:
        return {"step_size": float(self.step_size.mean()), "length": float(self.length.mean())}

    def _fresh(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self.step_size)
        tuner = torch.stack([self.step_size, torch.full_like(zero, torch.inf), zero, zero, zero], -1)
        return tuner, torch.zeros(2, *self.scale.shape, dtype=self.scale.dtype, device=self.scale.device)

    def _adapt(self, goals: list[float], skipped: int) -> Iterator[tuple[int, Figures]]:
        """Steps that tune the step size; those after the first ``skipped`` are averaged over."""
        self._tuner, self._moments = self._fresh()
        origin, length, since = self.moving.position, self.length.to(self.scale.dtype), 0
        goal_rows = torch.tensor(goals, dtype=torch.float64, device=self.scale.device)
        for n in range(len(goals)):
            if n == skipped:
                origin = self.moving.position
            collect = goal_rows.new_full((), float(n >= skipped))
            *state, self._tuner, self._moments = self._tune(
                *self.moving.tensors(),
                self._next_noise(),
                length,
                self.scale,
                self._tuner,
                self._moments,
                origin,
                goal_rows[n],
                collect,
                *self.problem.data,
            )
            self.moving, self.step_size = Moving(*state), self._tuner[:, _STEP].contiguous()
            self.gradients += 2 * self.problem.num_chains
            since += 1
            if since == _REPORT_EVERY or n + 1 == len(goals):
                yield since, self._figures()
                since = 0

    def _fit_length(self, num_steps: int) -> Iterator[tuple[int, Figures]]:
        stride = max(1, -(-num_steps // _ESS_STEPS))
        columns = torch.linspace(0, self.dim - 1, min(self.dim, _ESS_PARAMETERS), device=self.scale.device).long()
        seen: list[Tensor] = []
        for n in range(num_steps):
            self._advance()
            if n % stride == 0:
                seen.append(self.moving.position[:, columns])
            if (n + 1) % _REPORT_EVERY == 0 or n + 1 == num_steps:
                yield (n % _REPORT_EVERY) + 1, self._figures()
        if num_steps < _FEWEST_STEPS or not self.tuning.adapt_length:
            return
        paths = torch.stack(seen, 1)  # (C, n, columns)
        sizes = [torch.as_tensor(ess_mean(path[None])) for path in paths]
        share = torch.stack([(num_steps / size).nanmean() for size in sizes]).to(self.step_size)
        self._set_length(_LENGTH_FACTOR * self.step_size * share)

    def _set_length(self, length: Tensor) -> None:
        # Below a tenth of a step the direction is a new one each time anyway.
        self.length = torch.where(torch.isfinite(length), torch.maximum(length, 0.1 * self.step_size), self.length)

    def _advance(self) -> tuple[Tensor, Tensor]:
        dtype = self.scale.dtype
        *state, error, taken = self._move(
            *self.moving.tensors(),
            self._next_noise(),
            self.length.to(dtype),
            self.scale,
            self.step_size.to(dtype),
            *self.problem.data,
        )
        self.moving = Moving(*state)
        self.gradients += 2 * self.problem.num_chains
        self.squares += error.square()
        self.steps += 1
        return error, taken

    def _next_noise(self) -> Tensor:
        if not self._noise:
            block = self.problem.noise.normal(self._block, 2, self.problem.dim)
            self._noise = list(block.transpose(0, 1).contiguous())
        return self._noise.pop()


def _move_program(problem: Problem, num_calls: float) -> Captured:
    """One step of all chains as a recorded graph."""

    def move(
        position: Tensor,
        direction: Tensor,
        gradient: Tensor,
        log_density: Tensor,
        noise: Tensor,
        length: Tensor,
        scale: Tensor,
        step_size: Tensor,
        *data: Tensor,
    ) -> tuple[Tensor, ...]:
        state = Moving(position, direction, gradient, log_density)
        new, error, taken = isokinetic_step(
            state, step_size, length, scale, noise, lambda q: problem.gradients(q, *data)
        )
        return (*new.tensors(), error, taken)

    example = (*_example(problem), problem.starts.new_zeros(problem.num_chains), *problem.data)
    return hot(move, *example, compile=problem.compile, num_calls=num_calls)


def _tune_program(problem: Problem, tuning: Tuning, num_calls: float) -> Captured:
    """One step of all chains and of their tuners as a recorded graph."""
    num, dim = problem.starts.shape

    def tune(
        position: Tensor,
        direction: Tensor,
        gradient: Tensor,
        log_density: Tensor,
        noise: Tensor,
        length: Tensor,
        scale: Tensor,
        tuner: Tensor,
        moments: Tensor,
        origin: Tensor,
        goal: Tensor,
        collect: Tensor,
        *data: Tensor,
    ) -> tuple[Tensor, ...]:
        state = Moving(position, direction, gradient, log_density)
        step_size = tuner[:, _STEP]
        new, error, taken = isokinetic_step(
            state, step_size.to(position.dtype), length, scale, noise, lambda q: problem.gradients(q, *data)
        )
        if tuning.adapt_step_size:
            tuner = tuned(tuner, error, taken | (error != 0), goal, dim, tuning)
        weight = collect * taken * step_size
        offset = new.position - origin
        weights = weight.to(offset.dtype).unsqueeze(-1)
        moments = moments + torch.stack([weights * offset, weights * offset.square()])
        tuner = torch.cat([tuner[:, :_TIME], (tuner[:, _TIME] + weight).unsqueeze(-1)], -1)
        return (*new.tensors(), tuner, moments)

    tuner = torch.zeros(num, 5, dtype=torch.float64, device=problem.starts.device)
    scalar = tuner.new_zeros(())
    moments = problem.starts.new_zeros(2, num, dim)
    example = (*_example(problem), tuner, moments, problem.starts, scalar, scalar)
    return hot(tune, *example, *problem.data, compile=problem.compile, num_calls=num_calls)


def _example(problem: Problem) -> tuple[Tensor, ...]:
    starts = problem.starts
    num, dim = starts.shape
    log_density = torch.zeros(num, dtype=torch.float64, device=starts.device)
    return starts, starts, starts, log_density, starts.new_zeros(num, 2, dim), starts.new_zeros(num), starts


def _padded(problem: Problem) -> Problem:
    inner: Gradients = problem.gradients

    def gradients(theta: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = inner(theta[:, :1], *data)
        return value - 0.5 * theta[:, 1].double().square(), torch.cat([grad, -theta[:, 1:]], -1)

    starts = torch.cat([problem.starts, problem.noise.normal(1)], -1)
    return replace(problem, gradients=gradients, starts=starts)
