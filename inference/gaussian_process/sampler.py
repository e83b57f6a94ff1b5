r"""Posterior draws of a Gaussian process or a Bayesian linear model, by pathwise conditioning and stochastic descent.

.. math:: (f \mid y)(\cdot) = f(\cdot) + k(\cdot, X)(K + \sigma^2 I)^{-1}(y - f(X) - \epsilon), \qquad
          f \sim GP(0, k), \; \epsilon \sim N(0, \sigma^2 I)

A draw is a prior draw (random features) plus a correction whose N weights solve one linear system; the systems of the
mean and of all k draws are solved together (:mod:`inference.gaussian_process.descent`). Memory is a few times k N and a
block of the kernel; N x N is never formed. Far from the data the correction vanishes and draws are the prior's,
whatever the solver did. This is an estimator of its own: its unknown is a function, not the weights of a Pyro model.
References: Wilson et al. (2020), Lin et al. (2023, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.backend import check_integer, check_positive
from inference.gaussian_process.descent import Descent, Method, System, descend, kernel_times
from inference.gaussian_process.kernels import Features, Kernel
from inference.optimisation import check_choice
from inference.progress import Bar


@dataclass(frozen=True)
class FunctionMoments:
    """Posterior moments of a function at some inputs.

    Attributes:
        mean: Of the function and of new observations, (n,).
        f_variance: Of the function, without noise, (n,); from the draws.
        variance: Of new observations, noise included, (n,).
    """

    mean: Tensor
    f_variance: Tensor
    variance: Tensor


class FunctionPosterior:
    """Mean and draws of a Gaussian process given data, as functions.

    Args:
        kernel: The covariance function.
        x: Training inputs, (N, D).
        noise: Standard deviation of the noise.
        mean_weights: Weights of the mean, (N,).
        draw_weights: Weights of the corrections of the draws, (N, k).
        features: Feature map of the prior draws.
        coefficients: Their coefficients, (F, k).
        residual: Largest relative residual of the linear systems, Euclidean.

    Attributes:
        residual: As given.
    """

    def __init__(
        self,
        kernel: Kernel,
        x: Tensor,
        noise: float,
        mean_weights: Tensor,
        draw_weights: Tensor,
        features: Features,
        coefficients: Tensor,
        residual: float,
    ) -> None:
        self.kernel, self.x, self.noise, self.residual = kernel, x, noise, residual
        self.mean_weights, self.draw_weights = mean_weights, draw_weights
        self._features, self._coefficients = features, coefficients

    @property
    def num_samples(self) -> int:
        """Number of draws k."""
        return self.draw_weights.shape[1]

    def sample(self, x: Tensor) -> Tensor:
        """The draws at new inputs: the same functions at every call.

        Args:
            x: Inputs, (n, D).

        Returns:
            Function values without noise, (k, n).
        """
        x = self._inputs(x)
        prior = self._features(x) @ self._coefficients
        return (prior + kernel_times(self.kernel, x, self.x, self.draw_weights)).T

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean at new inputs, (n, D) to (n,)."""
        return kernel_times(self.kernel, self._inputs(x), self.x, self.mean_weights[:, None])[:, 0]

    def predict(self, x: Tensor) -> FunctionMoments:
        r"""Moments at new inputs; the variance is that of k draws about the mean, with relative error sqrt(2/k).

        Args:
            x: Inputs, (n, D).

        Returns:
            Mean and variances.
        """
        mean = self.mean(x)
        spread = (self.sample(x) - mean).square().mean(0)
        return FunctionMoments(mean, spread, spread + self.noise**2)

    def _inputs(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.x.shape[1]:
            raise ValueError(f"x must have shape (n, {self.x.shape[1]}), got {tuple(x.shape)}")
        return x.to(self.x)


@dataclass(frozen=True, kw_only=True)
class SGDPosteriorSampler:
    """Gaussian-process regression by stochastic descent, for more data than a Cholesky factor allows.

    Defaults are those published with the methods, but for the number of steps (100,000 there) and the step size, which
    is taken from the largest eigenvalue of the kernel matrix.

    Attributes:
        kernel: Covariance function.
        noise: Standard deviation of the observations' noise, > 0.
        num_samples: Number of draws k.
        method: "dual" (stochastic dual descent; better conditioned, with larger steps) or "primal".
        num_steps: Steps, each one block of the kernel.
        batch_size: Rows of that block.
        step_size: Learning rate on gradients divided by N; None to have it chosen.
        momentum: Nesterov's, in [0, 1).
        averaging: r T: iterates of the last T / averaging steps are averaged.
        num_prior_features: Random features of the prior draws.
        num_features: Random features of a step of the primal method.
        progress: Show a bar: True, False, or None (on a terminal only).

    Example:
        >>> from inference.gaussian_process import RBF
        >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
        >>> sampler = SGDPosteriorSampler(kernel=RBF(lengthscale=0.3), noise=0.1, num_samples=8, num_steps=500)
        >>> posterior = sampler.fit(x, (6 * x[:, 0]).sin())
        >>> posterior.sample(x[:5]).shape
        torch.Size([8, 5])
    """

    kernel: Kernel
    noise: float
    num_samples: int = 64
    method: Method = "dual"
    num_steps: int = 10_000
    batch_size: int = 512
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float = 100.0
    num_prior_features: int = 2_000
    num_features: int = 100
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            TypeError: If the kernel is none.
            ValueError: If a field is out of its range.
        """
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"`kernel` must be a kernel such as RBF(), got {self.kernel!r}")
        check_positive(self, "noise", "step_size", "averaging")
        check_integer(self, "num_samples", "num_steps", "batch_size", minimum=1)
        check_integer(self, "num_prior_features", "num_features", minimum=2)
        check_choice(self, "method", ("dual", "primal"))
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}")

    def fit(self, x: Tensor, y: Tensor, *, seed: int = 0) -> FunctionPosterior:
        """Condition on data; the prior mean is zero, so center y first.

        Args:
            x: Inputs, (N, D).
            y: Targets, (N,).
            seed: Seed of all randomness; the global random state is not touched.

        Returns:
            The posterior mean and draws.
        """
        _check(x, y)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        options = {"generator": generator, "dtype": x.dtype, "device": x.device}
        features = self.kernel.features(self.num_prior_features, x, generator)
        coefficients = torch.randn(features.num, self.num_samples, **options)
        noise = torch.randn(len(x), self.num_samples, **options) / self.noise  # delta: over the noise variance
        prior = features(x) @ coefficients
        system = System(
            self.kernel,
            x,
            self.noise,
            torch.cat([y[:, None].to(x), prior], 1),
            torch.cat([torch.zeros_like(noise[:, :1]), noise], 1),
        )
        descent = Descent(
            self.method,
            self.num_steps,
            self.batch_size,
            self.step_size,
            self.momentum,
            self.averaging,
            self.num_features,
        )
        with Bar(self.num_steps, f"{self.method} descent", self.progress) as bar, torch.no_grad():
            alpha = descend(system, descent, generator, lambda: bar.advance(1))
            left = system.rhs - kernel_times(self.kernel, x, x, alpha) - self.noise**2 * alpha
        residual = float((left.norm(dim=0) / system.rhs.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny)).max())
        mean = alpha[:, 0]
        return FunctionPosterior(
            self.kernel, x, self.noise, mean, mean[:, None] - alpha[:, 1:], features, coefficients, residual
        )


def _check(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError("x and y must be torch.Tensors; convert them with torch.as_tensor")
    if x.dim() != 2 or y.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(f"x must have shape (N, D) and y (N,), with N >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must hold floating-point numbers, got {x.dtype}; convert it with x.double()")
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(y).all()):
        raise ValueError("x and y must be finite; remove or impute the other rows first")
