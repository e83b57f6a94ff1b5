r"""The objective of mean-field inference per datum, and its gradient.

.. math:: \frac{F}{N} = \frac{1}{N} \mathrm{KL}(q \| p) - \frac{1}{B} \sum_{n \in B} E_q[\log p(y_n \mid x_n, \theta)]

Where the prior of a weight is Gaussian, its part of the KL is in closed form; any other prior is evaluated at the same
draw as the likelihood. The expected log-likelihood is estimated by :mod:`inference.variational.estimators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import softplus

from inference.data import Tree
from inference.target import Target

Likelihood = Callable[[Tensor, Tensor, Tensor, Tree, Tensor], Tensor]
"""Estimate of the expected log-likelihood of a batch from means (P,), standard deviations (P,), noise, x and y."""

_PROBES = (-100.0, -10.0, -1.0, 1.0, 10.0, 100.0)  # where priors are told from Gaussians


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
    mask = ((slopes - middle).abs() <= _tolerance(target) * middle.abs()).all(0) & (middle < 0)
    return GaussianPrior(mask, torch.where(mask, -middle, torch.zeros_like(middle)), bool(mask.all()))


def free_energy(
    target: Target, prior: GaussianPrior, params: Tensor, eps: Tensor, x: Tree, y: Tensor, kl_weight: Tensor | float
) -> Tensor:
    """Objective per datum, F/N, by reparameterisation, written out; tempered as the target is.

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
    loc, rho = params.split(dim)
    scale = softplus(rho)
    theta = loc + scale * eps  # (K, P)
    closed = -0.5 * (prior.precision * scale.square()).sum()
    log_prior = mean_over(target.log_prior, _prior_at(prior, loc, theta)) + closed
    log_likelihood = mean_over(lambda t: target.log_likelihood(t, x, y).sum(), theta)
    entropy = scale.log().sum() + 0.5 * dim * math.log(2 * math.pi * math.e)
    kl = -entropy - log_prior / target.temperature
    likelihood = log_likelihood * (target.num_data / y.shape[0]) / (target.likelihood_temperature * target.temperature)
    return (kl_weight * kl - likelihood) / target.num_data


def free_energy_and_grad(
    target: Target, prior: GaussianPrior, likelihood: Likelihood
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Gradient and value of the objective, with those of the closed parts written out: half the passes over theta.

    Args:
        target: The target.
        prior: Where the KL is in closed form.
        likelihood: Estimator of the expected log-likelihood of a batch.

    Returns:
        Function of mu and rho (2P,), noise, x, y and the weight of the KL () to the gradient (2P,) and the value ().
    """
    dim, temperature = target.dim, target.temperature
    everywhere = _Quadratic(target, prior) if prior.everywhere else None
    precision = prior.precision if everywhere is None else everywhere.precision
    entropy_of_one = 0.5 * dim * math.log(2 * math.pi * math.e)

    def call(params: Tensor, noise: Tensor, x: Tree, y: Tensor, kl_weight: Tensor) -> tuple[Tensor, Tensor]:
        loc, rho = params.split(dim)
        scale = softplus(rho)
        weight = kl_weight / target.num_data

        def sampled(loc: Tensor, scale: Tensor) -> Tensor:
            per_datum = likelihood(loc, scale, noise, x, y) / y.shape[0]
            energy = -per_datum / (target.likelihood_temperature * temperature)
            if everywhere is None:
                at = _prior_at(prior, loc, loc + scale * noise[:, :dim])
                energy = energy - (weight / temperature) * mean_over(target.log_prior, at)
            return energy

        (loc_grad, scale_grad), value = grad_and_value(sampled, argnums=(0, 1))(loc, scale)
        scale_grad, squares = _add_quadratic(scale_grad, scale, precision, weight / temperature)
        scale_grad = scale_grad.addcdiv(-weight, scale)
        value = value + 0.5 * squares - weight * (scale.log().sum() + entropy_of_one)
        if everywhere is not None:
            centred = loc if everywhere.mean is None else loc - everywhere.mean
            loc_grad, squares = _add_quadratic(loc_grad, centred, precision, weight / temperature)
            value = value + 0.5 * squares + (weight / temperature) * everywhere.offset
        rho_grad = torch.ops.aten.softplus_backward(scale_grad, rho, 1, 20)
        return torch.cat([loc_grad, rho_grad]), value

    return call


def _add_quadratic(gradient: Tensor, at: Tensor, precision: Tensor | float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient plus that of w/2 sum of p z^2, and w times the sum, in as few passes as the precision allows."""
    if isinstance(precision, float):
        weight = weight * precision
        return gradient.addcmul(weight, at), weight * torch.dot(at, at)
    pull = precision * at
    return gradient.addcmul(weight, pull), weight * torch.dot(pull, at)


class _Quadratic:
    """A log prior that is Gaussian in every coordinate, read from its gradient.

    Attributes:
        precision: One number if all are alike, or (P,).
        mean: (P,), or None for zero.
        offset: Minus the log prior at the mean, nats.
    """

    def __init__(self, target: Target, prior: GaussianPrior) -> None:
        zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
        low, high = float(prior.precision.min()), float(prior.precision.max())
        alike = high - low <= _tolerance(target) * high
        self.precision: Tensor | float = float(prior.precision.median()) if alike else prior.precision
        slope = grad(target.log_prior)(zero)
        self.mean: Tensor | None = slope / prior.precision if bool(slope.any()) else None
        self.offset = -float(target.log_prior(zero if self.mean is None else self.mean))


def mean_over(fn: Callable[[Tensor], Tensor], thetas: Tensor) -> Tensor:
    """Mean of a function over draws (K, P); one draw goes without vmap, whose batched products of one are slower."""
    return fn(thetas[0]) if thetas.shape[0] == 1 else vmap(fn)(thetas).mean()


def _prior_at(prior: GaussianPrior, loc: Tensor, theta: Tensor) -> Tensor:
    """Draws with their Gaussian coordinates at the means, (K, P); all in closed form need one."""
    return loc.unsqueeze(0) if prior.everywhere else torch.where(prior.mask, loc, theta)


def _tolerance(target: Target) -> float:
    return 1e-8 if target.dtype == torch.float64 else 1e-4
