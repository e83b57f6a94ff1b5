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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import softplus

from inference.backend import Backend, Batches, Run, check_integer, check_positive
from inference.data import Tree, chunks, map_tree
from inference.distributions import DiagonalGaussian
from inference.errors import NonFiniteError
from inference.graph import CompileOption, capture, hot, worth_compiling
from inference.posterior import GaussianPosterior, Posterior
from inference.target import Target

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's published defaults
_ELBO_DRAWS = 1000
_PROBES = (-100.0, -10.0, -1.0, 1.0, 10.0, 100.0)  # where priors are told from Gaussians


@dataclass(frozen=True, kw_only=True)
class MeanFieldVI(Backend):
    """Independent Gaussians over the unconstrained weights, fitted by stochastic gradients of the ELBO.

    Attributes:
        num_steps: Optimisation steps. On UCI energy (8-50-1) the ELBO is 291 after 5,000, 399 after 10,000.
        step_size: Adam's learning rate on F/N, decayed to zero by a cosine.
        batch_size: Data per step; None: all of them.
        num_particles: Draws of theta per step, advanced together.
        init_scale: Starting standard deviation of every weight (0.1, Pyro's default, is too large from width 100 on).
        kl_annealing: Share of the steps over which the weight of the KL grows from 0 to 1; reported is the ELBO at 1.
    """

    num_steps: int = 10_000
    step_size: float = 0.01
    batch_size: int | None = None
    num_particles: int = 1
    init_scale: float = 0.01
    kl_annealing: float = 1 / 3

    family: ClassVar[str] = "variational"
    bias: ClassVar[str] = "variances too small where weights are correlated; no uncertainty between clusters of data"
    reference: ClassVar[str] = "Blundell et al. 2015"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_density", "log_evidence", "minibatches", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "num_steps", "batch_size", "num_particles")
        check_positive(self, "step_size", "init_scale")
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
        rho = torch.full_like(loc, self.init_scale + math.log(-math.expm1(-self.init_scale)))
        batches = Batches(target, self.batch_size, [run.stream(3)])  # 0 is the starting point's
        step = make_step(target, batches, self.num_particles, torch.cat([loc, rho]), self.compile, self.num_steps)
        noise = run.stream(1)
        ramp = max(1, round(self.kl_annealing * self.num_steps))
        with run.bar(self.num_steps, "MeanFieldVI") as bar:
            for t in range(self.num_steps):
                shape = (self.num_particles, target.dim)
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


class GaussianPrior(NamedTuple):
    """Coordinates of theta whose prior is an independent Gaussian.

    Attributes:
        mask: (P,), True where it is.
        precision: (P,), prior precision there, 0 elsewhere.
        everywhere: Whether that is all of them.
    """

    mask: Tensor
    precision: Tensor
    everywhere: bool


def gaussian_prior(target: Target) -> GaussianPrior:
    """Find the coordinates whose log prior is quadratic and separable, from its gradient at points of several sizes.

    A gradient that has one constant slope in its own coordinate, while all others move too, is that of a Gaussian.

    Args:
        target: The target.

    Returns:
        Mask and precisions.
    """
    generator = target.stream(0, 12345)
    shape = (len(_PROBES), target.dim)
    order = torch.rand(shape, generator=generator, device=target.device).argsort(0)
    points = torch.tensor(_PROBES, dtype=target.dtype, device=target.device)[order]
    # Stretched at random, so that no coordinate is a multiple of another that its prior may depend on.
    points = points * (1 + 0.3 * torch.rand(shape, generator=generator, dtype=target.dtype, device=target.device))
    slopes = vmap(grad(target.log_prior))(points).diff(dim=0) / points.diff(dim=0)
    middle = slopes.median(0).values
    # Taking a Gaussian for another prior costs a little variance, the reverse a bias: so the tolerance is narrow.
    tolerance = 1e-8 if target.dtype == torch.float64 else 1e-4
    mask = ((slopes - middle).abs() <= tolerance * middle.abs()).all(0) & (middle < 0)
    return GaussianPrior(mask, torch.where(mask, -middle, torch.zeros_like(middle)), bool(mask.all()))


def free_energy(
    target: Target, prior: GaussianPrior, params: Tensor, eps: Tensor, x: Tree, y: Tensor, kl_weight: Tensor | float
) -> Tensor:
    """Objective per datum, F/N, by reparameterisation; tempered as the target is.

    Args:
        target: The target.
        prior: Where the KL is in closed form.
        params: mu and rho, (2P,).
        eps: Standard normal noise, (K, P).
        x: Inputs, every leaf (B, ...).
        y: Targets, (B, ...).
        kl_weight: Weight of the KL in [0, 1].

    Returns:
        () nats per datum.
    """
    dim = target.dim
    loc, rho = params.split(dim)  # whose gradient is one concatenation, where that of two slices fills and adds
    scale = softplus(rho)
    theta = loc + scale * eps  # (K, P)
    num = y.shape[0]
    closed = -0.5 * (prior.precision * scale.square()).sum()
    at = loc.unsqueeze(0) if prior.everywhere else torch.where(prior.mask, loc, theta)
    log_prior = _mean(target.log_prior, at) + closed
    log_likelihood = _mean(lambda t: target.log_likelihood(t, x, y).sum(), theta)
    entropy = scale.log().sum() + 0.5 * dim * math.log(2 * math.pi * math.e)
    kl = -entropy - log_prior / target.temperature
    likelihood = log_likelihood * (target.num_data / num) / (target.likelihood_temperature * target.temperature)
    return (kl_weight * kl - likelihood) / target.num_data


class Step:
    """One Adam step on the free energy; eager: recorded gradient and torch's fused Adam; compiled: one graph.

    Attributes:
        params: mu and rho, (2P,).
    """

    def __init__(self, params: Tensor, gradient: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.params = params.clone()
        self._gradient = gradient
        self._optimiser = torch.optim.Adam([self.params], lr=1.0, betas=_BETAS, eps=_EPSILON, fused=True)

    def __call__(self, eps: Tensor, x: Tree, y: Tensor, kl_weight: float, rate: float) -> Tensor:
        """Advance; returns the free energy per datum before the step."""
        with torch.no_grad():
            self.params.grad, value = self._gradient(self.params, eps, x, y, self.params.new_tensor(kl_weight))
            self._optimiser.param_groups[0]["lr"] = rate
            self._optimiser.step()
        return value


class CompiledStep:
    """The same arithmetic with gradient and Adam in one compiled graph.

    Attributes:
        params: mu and rho, (2P,).
    """

    def __init__(self, params: Tensor, whole: Callable[..., tuple[Tensor, ...]]) -> None:
        self.params, self._whole = params.clone(), whole
        self._first, self._second = torch.zeros_like(params), torch.zeros_like(params)
        self._count = 0

    def __call__(self, eps: Tensor, x: Tree, y: Tensor, kl_weight: float, rate: float) -> Tensor:
        """Advance; returns the free energy per datum before the step."""
        self._count += 1
        corrections = [1 - beta**self._count for beta in _BETAS]
        numbers = self.params.new_tensor([kl_weight, rate / corrections[0], math.sqrt(corrections[1])])
        with torch.no_grad():
            state = (self.params, self._first, self._second)
            self.params, self._first, self._second, value = self._whole(*state, eps, x, y, numbers)
        return value


def make_step(
    target: Target, batches: Batches, num_particles: int, params: Tensor, compile: CompileOption, num_steps: int
) -> Step | CompiledStep:
    """Record one step, compiled as a whole where that pays.

    Args:
        target: The target.
        batches: Supplies shapes.
        num_particles: Draws per step K.
        params: Starting mu and rho, (2P,).
        compile: True, False or "auto".
        num_steps: Expected number of calls.

    Returns:
        A callable step.
    """
    prior = gaussian_prior(target)
    x, y = batches.example()
    if not batches.full:
        x, y = _only(x), y[0]
    eps = torch.zeros(num_particles, target.dim, dtype=target.dtype, device=target.device)

    def energy(p: Tensor, e: Tensor, a: Tree, b: Tensor, w: Tensor) -> Tensor:
        return free_energy(target, prior, p, e, a, b, w)

    gradient = capture(grad_and_value(energy), params, eps, x, y, params.new_ones(()))
    if compile is False or (compile == "auto" and not worth_compiling(gradient, num_steps)):
        return Step(params, gradient)

    def whole(p: Tensor, m: Tensor, v: Tensor, e: Tensor, a: Tree, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        g, value = grad_and_value(energy)(p, e, a, b, numbers[0])
        m = _BETAS[0] * m + (1 - _BETAS[0]) * g
        v = _BETAS[1] * v + (1 - _BETAS[1]) * g.square()
        return p - numbers[1] * m / (v.sqrt() / numbers[2] + _EPSILON), m, v, value

    zeros = torch.zeros_like(params)
    return CompiledStep(params, hot(whole, params, zeros, zeros.clone(), eps, x, y, params.new_ones(3), compile=True))


def estimate_elbo(target: Target, gaussian: DiagonalGaussian, generator: torch.Generator) -> tuple[float, float]:
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


def _mean(fn: Callable[[Tensor], Tensor], thetas: Tensor) -> Tensor:
    """Mean over draws; one draw goes without vmap, whose batched products of one are slower."""
    return fn(thetas[0]) if thetas.shape[0] == 1 else vmap(fn)(thetas).mean()


def _only(x: Tree) -> Tree:
    """Drop the member dimension of a single member's batch."""
    return map_tree(lambda leaf: leaf[0], x)


def _where(target: Target, params: Tensor, loss: float, step: int, step_size: float) -> str:
    """Say where the free energy broke down: at the sites whose gradient (so now their mean) is not finite."""
    broken = [s.name for s in target.sites if not params[s.start : s.stop].isfinite().all()]
    named = f", first at site {broken[0]!r}" if 0 < len(broken) < len(target.sites) else ""
    advice = f"lower `step_size`, now {step_size}, or check the data's scale"
    return f"the free energy is {loss} at step {step}{named}; {advice}"
