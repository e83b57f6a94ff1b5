"""Models whose posterior is known in closed form: the truth that backends are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Conjugate:
    """A model with data and its exact posterior.

    Attributes:
        name: Identifies the problem.
        model: Pyro model.
        x: Inputs.
        y: Targets.
        site: The one latent site.
        mean: Posterior mean of the constrained site.
        covariance: Posterior covariance of the constrained site (flattened).
        log_evidence: Exact log marginal likelihood in nats.
        gaussian: Whether the posterior is Gaussian in theta.
        mode: Mode of the density of theta (unconstrained, Jacobian included).
        precision: Minus the Hessian of the log density of theta at ``mode``.
        log_density: Exact normalised log posterior of theta, (P,) to ().
    """

    name: str
    model: Callable[..., Any]
    x: Tensor
    y: Tensor
    site: str
    mean: Tensor
    covariance: Tensor
    log_evidence: float
    gaussian: bool
    mode: Tensor
    precision: Tensor
    log_density: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearTruth:
    """Closed form of Bayesian linear regression with known noise.

    Attributes:
        mean: Posterior mean, (D,).
        covariance: Posterior covariance, (D, D).
        precision: Its inverse.
        log_evidence: Nats.
        noise: Noise standard deviation.
    """

    mean: Tensor
    covariance: Tensor
    precision: Tensor
    log_evidence: float
    noise: float

    def predictive(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (noise included) of y at new inputs, each (B,)."""
        return x @ self.mean, torch.einsum("bi,ij,bj->b", x, self.covariance, x) + self.noise**2


def linear_truth(x: Tensor, y: Tensor, prior_scale: float, noise: float) -> LinearTruth:
    """Posterior of w ~ N(0, s^2 I), y ~ N(x w, noise^2)."""
    precision = x.T @ x / noise**2 + torch.eye(x.shape[1], dtype=x.dtype) / prior_scale**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ x.T @ y / noise**2
    marginal = prior_scale**2 * x @ x.T + noise**2 * torch.eye(len(x), dtype=x.dtype)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), marginal).log_prob(y)
    return LinearTruth(mean, covariance, precision, float(evidence), noise)


def linear_regression(
    num: int = 30, dim: int = 3, seed: int = 0, noise: float = 0.5, prior_scale: float = 1.5
) -> Conjugate:
    """y = x w + noise with a Gaussian prior: everything is Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    x[:, -1] = x[:, -1] + 0.8 * x[:, 0]  # a correlated posterior
    y = x @ torch.linspace(-1, 1, dim, dtype=torch.float64)
    y = y + noise * torch.randn(num, generator=generator, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(dim), prior_scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    truth = linear_truth(x, y, prior_scale, noise)
    return _gaussian("linear_regression", model, x, y, "w", truth.mean, truth.covariance, truth.log_evidence)


def correlated_gaussian(correlation: float = 0.9, num: int = 4, seed: int = 0) -> Conjugate:
    """Mean of correlated data under a correlated Gaussian prior; the posterior keeps the correlation."""
    generator = torch.Generator().manual_seed(seed)
    cov = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    y = 1.0 + torch.randn(num, 2, generator=generator, dtype=torch.float64)
    x = torch.zeros(num, 1, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(2), cov.to(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.MultivariateNormal(mean.expand(len(x), 2), cov.to(x)), obs=y)

    posterior_cov = cov / (num + 1)
    posterior_mean = y.sum(0) / (num + 1)
    joint = torch.kron(torch.eye(num, dtype=torch.float64) + 1.0, cov)
    flat = torch.distributions.MultivariateNormal(torch.zeros(2 * num, dtype=torch.float64), joint)
    evidence = float(flat.log_prob(y.reshape(-1)))
    return _gaussian("correlated_gaussian", model, x, y, "mean", posterior_mean, posterior_cov, evidence)


def beta_bernoulli(a: float = 2.0, b: float = 3.0, ones: int = 7, zeros: int = 5) -> Conjugate:
    """A coin with a Beta prior; theta is the logit of its bias."""
    y = torch.cat([torch.ones(ones), torch.zeros(zeros)]).double()
    x = torch.zeros(len(y), 1, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        p = pyro.sample("p", dist.Beta(a, b))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(p.expand(len(x))), obs=y)

    post_a, post_b = a + ones, b + zeros
    total = post_a + post_b
    normaliser = _log_beta([post_a, post_b])

    def log_density(theta: Tensor) -> Tensor:
        p = theta[0].sigmoid()
        return post_a * p.log() + post_b * (-p).log1p() - normaliser

    mode = torch.tensor([math.log(post_a / post_b)], dtype=torch.float64)
    precision = torch.tensor([[post_a * post_b / total]], dtype=torch.float64)
    return Conjugate(
        "beta_bernoulli",
        model,
        x,
        y,
        "p",
        torch.tensor(post_a / total, dtype=torch.float64),
        torch.tensor([[post_a * post_b / (total**2 * (total + 1))]], dtype=torch.float64),
        normaliser - _log_beta([a, b]),
        False,
        mode,
        precision,
        log_density,
    )


def dirichlet_categorical(
    concentration: tuple[float, ...] = (1.0, 2.0, 3.0), counts: tuple[int, ...] = (5, 2, 4)
) -> Conjugate:
    """A die with a Dirichlet prior; theta are its stick-breaking coordinates (K - 1 of them)."""
    y = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    x = torch.zeros(len(y), 1, dtype=torch.float64)
    prior = torch.tensor(concentration, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        probs = pyro.sample("probs", dist.Dirichlet(prior.to(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(probs.expand(len(x), len(concentration))), obs=y)

    post = prior + torch.tensor(counts, dtype=torch.float64)
    total = post.sum()
    mean = post / total
    covariance = (torch.diag(mean) - torch.outer(mean, mean)) / (total + 1)
    normaliser = _log_beta(post.tolist())
    transform = torch.distributions.biject_to(torch.distributions.constraints.simplex)

    def log_density(theta: Tensor) -> Tensor:
        probs = transform(theta)
        return ((post - 1) * probs.log()).sum() - normaliser + transform.log_abs_det_jacobian(theta, probs)

    # Each stick is a Beta in logit space, shifted by the log of how many sticks are left: mode log(a/b) + log K_left.
    rest = total - post.cumsum(0)
    left = torch.arange(len(post) - 1, 0, -1, dtype=torch.float64)
    mode = (post[:-1] / rest[:-1]).log() + left.log()
    precision = torch.diag(post[:-1] * rest[:-1] / (post[:-1] + rest[:-1]))
    return Conjugate(
        "dirichlet_categorical",
        model,
        x,
        y,
        "probs",
        mean,
        covariance,
        normaliser - _log_beta(list(concentration)),
        False,
        mode,
        precision,
        log_density,
    )


def problems() -> list[Conjugate]:
    """All of them, at their defaults."""
    return [linear_regression(), correlated_gaussian(), beta_bernoulli(), dirichlet_categorical()]


def _gaussian(
    name: str, model: Callable[..., Any], x: Tensor, y: Tensor, site: str, mean: Tensor, cov: Tensor, evidence: float
) -> Conjugate:
    posterior = torch.distributions.MultivariateNormal(mean, cov, validate_args=False)
    precision = torch.linalg.inv(cov)
    return Conjugate(name, model, x, y, site, mean, cov, evidence, True, mean, precision, posterior.log_prob)


def _log_beta(parameters: list[float]) -> float:
    return sum(map(math.lgamma, parameters)) - math.lgamma(sum(parameters))
