r"""Predictions of a network linearised at the mean of a Gaussian over its weights.

.. math:: \eta_{lin}(x) = \eta(x, \theta^*) + J(x)(\theta - \theta^*), \qquad
          \eta_{lin}(x) \sim N(\eta(x, \theta^*), J \Sigma J^T)

Exact in the moments of f and, for Normal likelihoods, of y (Daxberger et al. 2021; Immer et al. 2021). Components at
different inputs are drawn from each input's marginal with common noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inference.curvature import linearized_moments
from inference.data import Tree, index
from inference.distributions import FlatGaussian
from inference.prediction import Moments, Params, location, mixture_moments
from inference.target import Target


class LinearisedSource:
    """Mixture components of a linearised network.

    A Normal likelihood with fixed scale needs one exact component. With a latent scale, the log scale is drawn and the
    location integrated out given it. Any other likelihood draws eta.

    Args:
        target: The model.
        gaussian: Gaussian over theta; its mean is the linearisation point.
        x: Inputs, every leaf (N, ...).
        num_samples: Number of components S where draws are needed.
        seed: Random seed.
    """

    def __init__(self, target: Target, gaussian: FlatGaussian, x: Tree, num_samples: int, seed: int) -> None:
        self.target, self.gaussian, self.x = target, gaussian, x
        self.family = target.family(index(x, slice(0, 1)))
        self._names = self.family.eta_names
        self._exact = self.family.kind == "normal" and "scale" not in self._names
        size = 1 if self._exact else num_samples
        self.weights = gaussian.loc.new_full((size,), 1 / size)
        self._generator_seed = seed
        self._last: tuple[slice, Tensor, Tensor, Params] | None = None

    def params(self, rows: slice) -> Params:
        """Parameters of every component at some inputs, each (S, n, ...)."""
        eta, covariance, base = self._linearise(rows)
        if self.family.kind == "normal":
            return self._normal(eta, covariance, base)
        factor = torch.linalg.cholesky(_jitter(covariance))
        draws = eta + torch.einsum("nij,sj->sni", factor, self._noise(eta.shape[-1]))
        return self.family.from_eta(draws, base)

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments of y and f; those of f are exact, and those of y for Normal likelihoods."""
        eta, covariance, base = self._linearise(rows)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        center = location(self.family, {k: v.unsqueeze(0) for k, v in base.items()})[0]
        size = math.prod(center.shape[1:])
        f_variance = variance[:, :size].reshape(center.shape)
        if self.family.kind != "normal":
            sampled = mixture_moments(self.family, params, self.weights)
            return Moments(sampled.mean, sampled.aleatoric, sampled.epistemic, center, f_variance)
        noise = base["scale"].square()
        if "scale" in self._names:  # E[s^2] of a log-normal scale
            noise = (2 * eta[:, -size:] + 2 * variance[:, -size:]).exp().reshape(center.shape)
        if "loc" not in self._names:
            f_variance = torch.zeros_like(center)
        return Moments(base["loc"], noise, f_variance, base["loc"], f_variance)

    def _normal(self, eta: Tensor, covariance: Tensor, base: Params) -> Params:
        shape = base["loc"].shape
        size = math.prod(shape[1:])
        if self._exact:
            variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(shape)
            return {"loc": base["loc"].unsqueeze(0), "scale": (base["scale"].square() + variance).sqrt().unsqueeze(0)}
        log_scale, spread = eta[:, -size:], covariance[:, -size:, -size:]
        factor = torch.linalg.cholesky(_jitter(spread))
        noise = self._noise(size)
        log_draws = log_scale + torch.einsum("nij,sj->sni", factor, noise)
        if "loc" in self._names:
            cross = covariance[:, :size, -size:]  # (n, L, L)
            gain = torch.linalg.solve_triangular(factor, cross.mT, upper=False)  # factor^-1 C_sl
            loc = eta[:, :size] + torch.einsum("nji,sj->sni", gain, noise)
            variance = covariance[:, :size, :size].diagonal(dim1=-2, dim2=-1) - gain.square().sum(-2)
        else:
            loc, variance = base["loc"].reshape(-1, size).expand(log_draws.shape), torch.zeros_like(log_scale)
        scale = (log_draws.mul(2).exp() + variance.clamp(min=0)).sqrt()
        full = (log_draws.shape[0], *shape)
        return {"loc": loc.reshape(full), "scale": scale.reshape(full)}

    def _noise(self, size: int) -> Tensor:
        """Standard normal draws (S, size), the same at every input."""
        like = self.gaussian.loc
        generator = torch.Generator(device=like.device).manual_seed(self._generator_seed)
        return torch.randn(self.weights.shape[0], size, generator=generator, dtype=like.dtype, device=like.device)

    def _linearise(self, rows: slice) -> tuple[Tensor, Tensor, Params]:
        if self._last is None or self._last[0] != rows:
            x = index(self.x, rows)
            eta, covariance = linearized_moments(self.target, self.gaussian, self.gaussian.loc, x)
            with torch.no_grad():
                base = self.target.parameters(self.gaussian.loc, x)
            self._last = (rows, eta, covariance, base)
        return self._last[1:]


def _jitter(covariance: Tensor) -> Tensor:
    """Add a relative 1e-10 (1e-6 in float32) to the diagonal: J S J^T is singular wherever outputs outnumber weights."""
    relative = 1e-10 if covariance.dtype == torch.float64 else 1e-6
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return covariance + torch.diag_embed(relative * diagonal.mean(-1, keepdim=True).expand(diagonal.shape) + 1e-30)
