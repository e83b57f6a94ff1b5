r"""Mean-field variational inference (Bayes by Backprop).

.. math:: q(\theta) = \prod_i N(\mu_i, s_i^2), \quad s_i = \mathrm{softplus}(\rho_i), \qquad
          F = \mathrm{KL}(q \| p) - \frac{N}{B} \sum_{n \in B} E_q[\log p(y_n \mid x_n, \theta)]

Minimises F/N by Adam with reparameterised noise :math:`\theta = \mu + s \epsilon`. Where the prior of a weight is
Gaussian its part of the KL is in closed form,
:math:`E_q[\log p(\theta_i)] = \log p(\mu_i) - s_i^2 / (2 \sigma_0^2)`; any other prior is evaluated at the same draw as
the likelihood. Targets the posterior through independent Gaussians: the mean is right for Gaussian posteriors, the
variances are 1/diag(precision), so too small wherever weights are correlated, and uncertainty between clusters of data
is missing (Foong et al. 2019). Cost: one or two gradients a step; memory 2P.

Reference: Graves 2011; Blundell et al. 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import softplus

from inference.adam import BETAS, EPSILON, Adam
from inference.backend import Backend, Batches, Run, check_integer, check_positive
from inference.data import Tree, chunks, map_tree
from inference.distributions import DiagonalGaussian, FlatGaussian
from inference.errors import NonFiniteError
from inference.graph import CompileOption, capture, hot, worth_compiling
from inference.optimisation import check_choice
from inference.posterior import GaussianPosterior, Posterior
from inference.starting import layers_of
from inference.target import Target
from inference.variational.estimators import ESTIMATORS, EstimatorName, make_estimator
from inference.variational.free_energy import free_energy_and_grad, gaussian_prior

_ELBO_DRAWS = 1000
_SCALE, _OUTPUT_SCALE = 0.1, 0.7


@dataclass(frozen=True, kw_only=True)
class MeanFieldVI(Backend):
    """Independent Gaussians over the unconstrained weights, fitted by stochastic gradients of the ELBO.

    Attributes:
        num_steps: Optimisation steps. Mean ELBO of two seeds with a 1x50 tanh network and learnt noise on UCI energy,
            yacht and concrete: 462, 39, -708 nats after 5,000 of them and 477, 84, -688 after 10,000.
        step_size: Adam's learning rate on F/N, decayed to zero by a cosine. 0.05 was too large for the networks above.
        batch_size: Data per step; None: all of them.
        num_particles: Draws of theta per step, advanced together.
        init_scale: Starting standard deviation of every weight; None for 0.1, or 0.7/sqrt(fan_in) in layers with more
            than 50 inputs, so that noise on the weights does not drown their outputs.
        kl_annealing: Share of the steps over which the weight of the KL grows from 0 to 1; reported is the ELBO at 1.
        estimator: "reparameterised" (one draw of the weights per step), "local" (independent noise on every layer's
            outputs; dense layers only) or "flipout" (the draw with random signs for every datum); the last two lower
            the variance of minibatch gradients at the cost of a second forward pass.
    """

    num_steps: int = 10_000
    step_size: float = 0.03
    batch_size: int | None = None
    num_particles: int = 4
    init_scale: float | None = None
    kl_annealing: float = 1 / 3
    estimator: EstimatorName = "reparameterised"

    family: ClassVar[str] = "variational"
    bias: ClassVar[str] = "variances too small where weights are correlated; no uncertainty between clusters of data"
    reference: ClassVar[str] = "Blundell et al. 2015"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_density", "log_evidence", "minibatches", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", "batch_size", "num_particles")
        check_positive(self, "step_size", "init_scale")
        check_choice(self, "estimator", ESTIMATORS)
        if not 0 <= self.kl_annealing <= 1:
            raise ValueError(f"`kl_annealing` must be between 0 and 1, got {self.kl_annealing}")

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Optimise the ELBO.

        Args:
            target: The target.
            run: The run.

        Returns:
            A Gaussian; the log evidence is the ELBO (of full data, KL weight 1), a lower bound in nats.

        Raises:
            NonFiniteError: If the objective stops being finite.
        """
        loc = target.initial(1, run.seed, run.init)[0]
        scale = starting_scale(target) if self.init_scale is None else torch.full_like(loc, self.init_scale)
        rho = scale + (-(-scale).expm1()).log()
        batches = Batches(target, self.batch_size, [run.stream(3)])  # 0 is the starting point's
        start = torch.cat([loc, rho])
        step = make_step(target, batches, self.num_particles, start, self.compile, self.num_steps, self.estimator)
        noise = run.stream(1)
        ramp = max(1, round(self.kl_annealing * self.num_steps))
        with run.bar(self.num_steps, "MeanFieldVI") as bar:
            for t in range(self.num_steps):
                shape = (self.num_particles, step.noise_size)
                eps = torch.randn(shape, generator=noise, dtype=target.dtype, device=target.device)
                rate = self.step_size * 0.5 * (1 + math.cos(math.pi * t / self.num_steps))
                weight = min(1.0, (t + 1) / ramp) if self.kl_annealing else 1.0
                x, y = batches.next()
                loss = step(eps, x if batches.full else _only(x), y if batches.full else y[0], weight, rate)
                energy = float(loss)
                if not math.isfinite(energy):
                    raise NonFiniteError(_where(target, step.params, energy, t, self.step_size))
                run.count(batches.cost * self.num_particles)
                bar.advance(free_energy=energy * target.num_data)
        loc, rho = step.params[: target.dim], step.params[target.dim :]
        gaussian = DiagonalGaussian(loc, softplus(rho))
        elbo, error = estimate_elbo(target, gaussian, run.stream(2))
        run.info.extra.update(elbo=elbo, elbo_standard_error=error)
        return GaussianPosterior(target, gaussian, backend=self, info=run.info, log_evidence=elbo)


def starting_scale(target: Target) -> Tensor:
    """Standard deviations to start from: 0.1, and 0.7/sqrt(fan_in) in layers with more than 50 inputs.

    Args:
        target: The target.

    Returns:
        (P,).
    """
    scale = torch.full((target.full_dim,), _SCALE, dtype=target.dtype, device=target.device)
    for layer in layers_of(target):
        widest = _OUTPUT_SCALE * layer.fan_in**-0.5 / abs(layer.scale)
        for piece in (layer.weight, layer.bias):
            if piece is not None:
                scale[piece] = min(_SCALE, widest)
    return target.reduce(scale)


class Step:
    """One Adam step on the free energy; eager: recorded gradient and torch's fused Adam; compiled: one graph.

    Attributes:
        params: mu and rho, (2P,).
        noise_size: Standard normal numbers per draw.
    """

    def __init__(self, params: Tensor, gradient: Callable[..., tuple[Tensor, Tensor]], noise_size: int) -> None:
        self.params, self.noise_size = params.clone(), noise_size
        self._gradient = gradient
        self._adam = Adam(self.params)

    def __call__(self, noise: Tensor, x: Tree, y: Tensor, kl_weight: float, rate: float) -> Tensor:
        """Advance; returns the free energy per datum before the step."""
        with torch.no_grad():
            gradient, value = self._gradient(self.params, noise, x, y, self.params.new_tensor(kl_weight))
            self._adam.step(gradient, rate)
        return value


class CompiledStep:
    """The same arithmetic with gradient and Adam in one compiled graph.

    Attributes:
        params: mu and rho, (2P,).
        noise_size: Standard normal numbers per draw.
    """

    def __init__(self, params: Tensor, whole: Callable[..., tuple[Tensor, ...]], noise_size: int) -> None:
        self.params, self.noise_size, self._whole = params.clone(), noise_size, whole
        self._first, self._second = torch.zeros_like(params), torch.zeros_like(params)
        self._count = 0

    def __call__(self, noise: Tensor, x: Tree, y: Tensor, kl_weight: float, rate: float) -> Tensor:
        """Advance; returns the free energy per datum before the step."""
        self._count += 1
        corrections = [1 - beta**self._count for beta in BETAS]
        numbers = self.params.new_tensor([kl_weight, rate / corrections[0], math.sqrt(corrections[1])])
        with torch.no_grad():
            state = (self.params, self._first, self._second)
            self.params, self._first, self._second, value = self._whole(*state, noise, x, y, numbers)
        return value


def make_step(
    target: Target,
    batches: Batches,
    num_particles: int,
    params: Tensor,
    compile: CompileOption,
    num_steps: int,
    estimator: EstimatorName = "reparameterised",
) -> Step | CompiledStep:
    """Record one step, compiled as a whole where that pays.

    Args:
        target: The target.
        batches: Supplies shapes.
        num_particles: Draws per step K.
        params: Starting mu and rho, (2P,).
        compile: True, False or "auto".
        num_steps: Expected number of calls.
        estimator: Of the expected log-likelihood.

    Returns:
        A callable step.
    """
    estimate = make_estimator(target, estimator, batches.size)
    both = free_energy_and_grad(target, gaussian_prior(target), estimate.likelihood)
    x, y = batches.example()
    if not batches.full:
        x, y = _only(x), y[0]
    noise = torch.zeros(num_particles, estimate.size, dtype=target.dtype, device=target.device)
    gradient = capture(both, params, noise, x, y, params.new_ones(()))
    if compile is False or (compile == "auto" and not worth_compiling(gradient, num_steps)):
        return Step(params, gradient, estimate.size)

    def whole(p: Tensor, m: Tensor, v: Tensor, e: Tensor, a: Tree, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        g, value = both(p, e, a, b, numbers[0])
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g.square()
        return p - numbers[1] * m / (v.sqrt() / numbers[2] + EPSILON), m, v, value

    zeros = torch.zeros_like(params)
    program = hot(whole, params, zeros, zeros.clone(), noise, x, y, params.new_ones(3), compile=True)
    return CompiledStep(params, program, estimate.size)


def estimate_elbo(target: Target, gaussian: FlatGaussian, generator: torch.Generator) -> tuple[float, float]:
    """ELBO on the full data with KL weight 1, untempered, and its standard error.

    Args:
        target: The target.
        gaussian: The approximation.
        generator: Random stream.

    Returns:
        Mean and standard error over 1000 draws, nats.
    """
    thetas = gaussian.sample(_ELBO_DRAWS, generator)
    plain = target.tempered()
    with torch.no_grad():
        joint = torch.cat([vmap(plain.log_density)(thetas[part]) for part in chunks(_ELBO_DRAWS, 20)])
        terms = (joint - gaussian.log_prob(thetas)).double()
    return float(terms.mean()), float(terms.std() / math.sqrt(_ELBO_DRAWS))


def _only(x: Tree) -> Tree:
    """Drop the member dimension of a single member's batch."""
    return map_tree(lambda leaf: leaf[0], x)


def _where(target: Target, params: Tensor, loss: float, step: int, step_size: float) -> str:
    """Say where the free energy broke down: at the sites whose gradient (so now their mean) is not finite."""
    broken = [s.name for s in target.sites if not params[s.start : s.stop].isfinite().all()]
    named = f", first at site {broken[0]!r}" if 0 < len(broken) < len(target.sites) else ""
    advice = f"lower `step_size`, now {step_size}, or check the data's scale"
    return f"the free energy is {loss} at step {step}{named}; {advice}"
