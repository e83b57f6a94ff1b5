r"""Annealed importance sampling: a reference log evidence for any model, with its standard error.

Particles start as draws from the prior and move through :math:`p_t(\theta) \propto p(\theta) p(y|\theta)^{\beta_t}`
with :math:`0 = \beta_0 < \dots < \beta_T = 1`, by one Hamiltonian transition that leaves each of them invariant. Then

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log p(y \mid \theta_{t-1}), \qquad E[w] = p(y),

so the mean of w is unbiased at any number of temperatures, and its logarithm is too small by about half the variance of
log w. Run backwards from an exact posterior draw, which simulated data have, it gives an upper bound. Step sizes are
adapted per temperature by other particles in a pilot run and then frozen, which keeps the estimate unbiased.

Cost: num_particles num_temperatures (num_leapfrogs + 1) gradients, and as many at most for the pilot; memory 6 M P. The
prior must be normalised (no `pyro.factor`). It fails where the posterior has modes that particles cannot reach from the
prior: the effective sample size of the weights is the first sign. Sources: neal2001annealed; grosse2015sandwiching;
wu2017quantitative for the schedule [recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.backend import check_integer
from inference.errors import NonFiniteError
from inference.graph import CompileOption, hot
from inference.sbc import simulate
from inference.target import Target, compile_target

Schedule = Literal["sigmoid", "power"]

_SIGMOID_RANGE, _POWER = 4.0, 5
_ADAPTATION_RATE, _FIRST_STEP, _WARMUP = 0.5, 0.5, 30
_JITTER = 0.2
_FEW_PARTICLES = 128


@dataclass(frozen=True)
class Evidence:
    r"""Estimate of the log evidence of a model.

    Attributes:
        log_evidence: Estimate in nats.
        standard_error: Of the estimate, in nats, from the spread of the weights; too small when ``ess`` is a few.
        ess: Effective number of particles, :math:`(\sum w)^2 / \sum w^2`.
        log_weights: Of each particle, (M,); the exponential of each is an unbiased estimate of the evidence.
        particles: Where the particles ended, (M, P); with the weights, draws from the posterior.
        acceptance: Mean acceptance per temperature, (T,).
        step_sizes: Per temperature, (T,), in prior standard deviations.
        gradients: Gradient evaluations, the pilot included.
    """

    log_evidence: float
    standard_error: float
    ess: float
    log_weights: Tensor
    particles: Tensor
    acceptance: Tensor
    step_sizes: Tensor
    gradients: int

    def __str__(self) -> str:
        return (
            f"log evidence {self.log_evidence:.3f} nats, standard error {self.standard_error:.3f}; effective particles "
            f"{self.ess:.1f} of {len(self.log_weights)}, acceptance {self.acceptance.mean():.2f}, "
            f"{self.gradients:,} gradients"
        )


@dataclass(frozen=True)
class Bounds:
    """Log evidence of simulated data from below and from above.

    Attributes:
        lower: Particles from the prior to the posterior; its expectation is at most the log evidence.
        upper: Particles from an exact posterior draw back to the prior; its expectation is at least the log evidence.
            Their ``log_weights`` have the mean of 1/w unbiased.
        y: The simulated targets, (N, ...).
    """

    lower: Evidence
    upper: Evidence
    y: Tensor

    @property
    def gap(self) -> float:
        """Upper minus lower estimate in nats: how far off each of them can be, on average over data."""
        return self.upper.log_evidence - self.lower.log_evidence


@dataclass(frozen=True, kw_only=True)
class AnnealingOptions:
    """How particles move from the prior to the posterior.

    Attributes:
        num_particles: Number of particles M.
        num_temperatures: Number of temperatures T after the prior.
        num_leapfrogs: Leapfrogs per temperature.
        target_accept: Mean acceptance that the pilot adapts step sizes to, in (0, 1).
        schedule: "sigmoid" (even steps of the logit of beta in -4..4) or "power" ((t / T)^5: small steps near the
            prior, for data that the prior finds very unlikely).
        compile: Put Inductor on the leapfrog: True, False or "auto".
    """

    num_particles: int = 100
    num_temperatures: int = 500
    num_leapfrogs: int = 5
    target_accept: float = 0.7
    schedule: Schedule = "sigmoid"
    compile: CompileOption = "auto"

    def __post_init__(self) -> None:
        check_integer(self, "num_particles", minimum=2)
        check_integer(self, "num_temperatures", "num_leapfrogs")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"`target_accept` must be between 0 and 1, got {self.target_accept!r}")
        if self.schedule not in ("sigmoid", "power"):
            raise ValueError(f'`schedule` must be "sigmoid" or "power", got {self.schedule!r}')

    def betas(self) -> Tensor:
        """Inverse temperatures from 0 to 1, (T + 1,)."""
        grid = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.float64)
        if self.schedule == "power":
            return grid**_POWER
        curve = torch.sigmoid(_SIGMOID_RANGE * (2 * grid - 1))
        return (curve - curve[0]) / (curve[-1] - curve[0])


def annealed_importance_sampling(
    model: Any, x: Any = None, y: Any = None, *, seed: int = 0, **options: Any
) -> Evidence:
    r"""Estimate the log evidence of a model, :math:`\log p(y \mid x)`.

    Args:
        model: Pyro callable ``model(x, y=None)``, or a compiled target (then without x and y).
        x: Inputs, every leaf (N, ...).
        y: Targets, (N, ...).
        seed: Seed of all randomness.
        **options: Fields of :class:`AnnealingOptions`, such as ``num_particles`` and ``num_temperatures``.

    Returns:
        The estimate.

    Raises:
        ValueError: If an option is out of range, or the target is tempered or restricted.
        NonFiniteError: If a log-likelihood is NaN, or the data are impossible under all particles.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def coin(x, y=None):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Bernoulli(p.expand(len(x))), obs=y)
        >>> y = torch.tensor([1.0, 0.0, 1.0])
        >>> found = annealed_importance_sampling(coin, torch.zeros(3), y, num_temperatures=100)
        >>> abs(found.log_evidence - math.log(1 / 12)) < 0.05  # B(3, 2)
        True
    """
    path = _Path(_plain_target(model, x, y), AnnealingOptions(**options), seed)
    start = path.target.sample_prior(path.options.num_particles, seed)
    log_weights, particles, acceptance = path.run(start, path.target.stream(seed, 2))
    return path.result(log_weights, particles, acceptance)


def evidence_bounds(model: Any, x: Any, y: Any, *, seed: int = 0, **options: Any) -> Bounds:
    """Bidirectional Monte Carlo: the log evidence of data simulated from the model, from both sides.

    On simulated data the weights that made them are an exact posterior draw. A small gap says that annealing works for
    this model and number of data, so that its estimate on the real data can be believed too.

    Args:
        model: Pyro callable ``model(x, y=None)``, or a compiled target.
        x: Inputs, every leaf (N, ...).
        y: Targets that give shape and dtype, (N, ...); their values are not used.
        seed: Seed of data and particles.
        **options: Fields of :class:`AnnealingOptions`.

    Returns:
        Both estimates. The standard error of the upper one is too small: its particles share one starting point.
    """
    target, truth = simulate(_plain_target(model, x, y), seed)
    path = _Path(target, AnnealingOptions(**options), seed)
    num = path.options.num_particles
    lower = path.result(*path.run(target.sample_prior(num, seed + 1), target.stream(seed, 2)))
    start = truth.expand(num, -1).contiguous()
    log_weights, particles, acceptance = path.run(start, target.stream(seed, 3), backwards=True)
    return Bounds(lower, path.result(log_weights, particles, acceptance, backwards=True), target.y)


class _Path:
    """The distributions between prior and posterior, one recorded leapfrog for all, and tuned step sizes."""

    def __init__(self, target: Target, options: AnnealingOptions, seed: int) -> None:
        self.target, self.options = target, options
        self.betas = options.betas().to(target.device)
        self.gradients = 0
        few = options.num_particles <= _FEW_PARTICLES  # then one recorded graph serves the pilot too
        pilot = target.sample_prior(options.num_particles if few else options.num_particles // 4, seed + 1)
        # Prior variances as inverse masses: step sizes are then in prior standard deviations.
        self.inverse_mass = pilot.var(0).clamp(min=1e-12)
        calls = (options.num_temperatures + _WARMUP) * (options.num_leapfrogs + 1)
        self._programs = {num: self._program(num, calls) for num in {len(pilot), options.num_particles}}
        self.steps = self._tuned(pilot, target.stream(seed, 1))

    def run(self, theta: Tensor, stream: torch.Generator, *, backwards: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (M,), final particles (M, P) and acceptance (T,) of one pass, from prior or from posterior."""
        state = self._evaluate(theta)
        log_weights = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        acceptance = torch.zeros(len(self.steps), dtype=torch.float64)
        places = range(len(self.steps))
        for t in reversed(places) if backwards else places:
            width = self.betas[t + 1] - self.betas[t]
            if not backwards:
                log_weights += width * state.log_likelihood
            state, acceptance[t] = self._transition(state, self.betas[t + 1], float(self.steps[t]), stream)
            if backwards:
                log_weights += width * state.log_likelihood
        return log_weights, state.theta, acceptance

    def result(
        self, log_weights: Tensor, particles: Tensor, acceptance: Tensor, *, backwards: bool = False
    ) -> Evidence:
        """The estimate; backwards the mean of 1/w estimates one over the evidence."""
        if bool(torch.isnan(log_weights).any()) or not bool((log_weights > -math.inf).any()):
            raise NonFiniteError(
                "the log-likelihood is NaN, or minus infinity for all particles: the data are impossible at all draws "
                "from the prior; check them, or use a wider prior"
            )
        sign = -1.0 if backwards else 1.0
        scaled = sign * log_weights
        shares = (scaled - scaled.max()).exp()
        mean, num = shares.mean(), len(shares)
        error = float(shares.std() / mean / math.sqrt(num))
        ess = float(shares.sum().square() / shares.square().sum())
        estimate = sign * float(scaled.max() + mean.log())
        steps = torch.as_tensor(self.steps)
        return Evidence(estimate, error, ess, log_weights, particles, acceptance, steps, self.gradients)

    def _tuned(self, theta: Tensor, stream: torch.Generator) -> Sequence[float]:
        """Step sizes that give the wanted acceptance along the path, from particles that are then thrown away."""
        state, step, steps = self._evaluate(theta), _FIRST_STEP, []
        betas = [float(self.betas[1])] * _WARMUP + self.betas[1:].tolist()
        for beta in betas:
            steps.append(step)
            state, rate = self._transition(state, torch.as_tensor(beta).to(self.betas), step, stream)
            step *= math.exp(_ADAPTATION_RATE * (rate - self.options.target_accept))
        return steps[_WARMUP:]

    def _transition(self, state: _State, beta: Tensor, step: float, stream: torch.Generator) -> tuple[_State, float]:
        """One Hamiltonian transition of every particle that leaves the distribution at ``beta`` invariant."""
        uniform = torch.rand(len(state.theta) + 1, generator=stream, dtype=torch.float64, device=beta.device)
        noise = torch.randn(state.theta.shape, generator=stream, dtype=state.theta.dtype, device=state.theta.device)
        step *= 1 + _JITTER * (2 * float(uniform[-1]) - 1)
        momentum = noise / self.inverse_mass.sqrt()
        first = self._leapfrog(state.theta, momentum, torch.zeros_like(noise), beta, 0.0)  # the gradient at this beta
        new = first
        for _ in range(self.options.num_leapfrogs):
            new = self._leapfrog(new.theta, new.momentum, new.gradient, beta, step)
        gain = new.log_joint(beta) - new.kinetic - first.log_joint(beta) + first.kinetic
        gain = torch.where(torch.isnan(gain), -math.inf, gain)
        accepted = uniform[:-1].log() < gain
        return new.where(accepted, first), float(gain.exp().clamp(max=1.0).mean())

    def _evaluate(self, theta: Tensor) -> _State:
        zero = torch.zeros_like(theta)
        return self._leapfrog(theta, zero, zero, self.betas[0], 0.0)

    def _leapfrog(self, theta: Tensor, momentum: Tensor, gradient: Tensor, beta: Tensor, step: float) -> _State:
        self.gradients += len(theta)
        size = torch.as_tensor(step, dtype=theta.dtype, device=theta.device)
        target = self.target
        with torch.no_grad():
            out = self._programs[len(theta)](
                theta, momentum, gradient, beta, size, self.inverse_mass, target.x, target.y
            )
        return _State(*out)

    def _program(self, num: int, num_calls: int) -> Callable[..., Any]:
        target = self.target

        def tempered(theta: Tensor, beta: Tensor, x: Any, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            prior, likelihood = target.programs.joint(theta, x, y)
            prior, total = prior.double(), likelihood.double().sum()
            return prior + beta * total, (prior, total)

        single = grad_and_value(tempered, has_aux=True)

        def leapfrog(
            theta: Tensor,
            momentum: Tensor,
            gradient: Tensor,
            beta: Tensor,
            step: Tensor,
            inverse: Tensor,
            x: Any,
            y: Any,
        ) -> tuple[Tensor, ...]:
            momentum = momentum + step / 2 * gradient
            theta = theta + step * inverse * momentum
            gradient, (_, (prior, total)) = vmap(single, in_dims=(0, None, None, None))(theta, beta, x, y)
            momentum = momentum + step / 2 * gradient
            return theta, momentum, gradient, prior, total, (momentum.square() * inverse).sum(1).double() / 2

        rows = torch.zeros(num, target.dim, dtype=target.dtype, device=target.device)
        one = torch.ones((), dtype=target.dtype, device=target.device)
        example = (rows, rows, rows, self.betas[0], one, rows[0], target.x, target.y)
        return hot(leapfrog, *example, compile=self.options.compile, num_calls=num_calls)


@dataclass(frozen=True)
class _State:
    """Particles after a leapfrog; all but ``momentum`` and ``kinetic`` belong to the position."""

    theta: Tensor  # (M, P)
    momentum: Tensor
    gradient: Tensor
    log_prior: Tensor  # (M,)
    log_likelihood: Tensor
    kinetic: Tensor

    def log_joint(self, beta: Tensor) -> Tensor:
        return self.log_prior + beta * self.log_likelihood

    def where(self, chosen: Tensor, other: _State) -> _State:
        """Rows of this state where chosen, and of the other elsewhere."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _State(*(torch.where(chosen.unsqueeze(-1) if a.dim() == 2 else chosen, a, b) for a, b in pairs))


def _plain_target(model: Any, x: Any, y: Any) -> Target:
    """The target of an evidence: whole and untempered."""
    if not isinstance(model, Target):
        return compile_target(model, x, y)
    if model.temperature != 1 or model.likelihood_temperature != 1 or model.kept is not None:
        raise ValueError("the evidence is that of the whole model at temperature 1; pass an untempered, full target")
    return model
