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

from inference.data import Tree, chunks, index, num_data
from inference.distributions import FlatGaussian
from inference.jacobians import CHUNK_BYTES, eta_and_jacobian, linearised
from inference.mixtures import Moments, Params, location, mixture_moments
from inference.observation import LikelihoodFamily
from inference.prediction import MAX_ROWS, rows_per_chunk
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
        self.family, one = _first(target, gaussian, x)
        self._names = self.family.eta_names
        self._exact = self.family.kind == "normal" and "scale" not in self._names
        size = 1 if self._exact else num_samples
        self.weights = gaussian.loc.new_full((size,), 1 / size)
        outputs = sum(math.prod(one[name].shape[1:]) for name in self._names)
        self.rows = rows_per_chunk(min(num_data(x), MAX_ROWS), max(size, outputs), one)  # J S J^T is (n, E, E)
        self._generator_seed = seed
        self._last: tuple[slice, Tensor, Tensor, Params] | None = None

    def params(self, rows: slice) -> Params:
        """Parameters of every component at some inputs, each (S, n, ...)."""
        eta, covariance, base = self._linearise(rows)
        if self.family.kind == "normal":
            return self._normal(eta, covariance, base)
        root, _ = _roots(covariance)
        draws = eta + torch.einsum("nij,sj->sni", root, self._noise(eta.shape[-1]))
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
        root, inverse = _roots(spread)
        noise = self._noise(size)
        log_draws = log_scale + torch.einsum("nij,sj->sni", root, noise)
        if "loc" in self._names:
            gain = inverse @ covariance[:, :size, -size:].mT  # covariance of noise and loc, (n, L, L)
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
            self._last = (rows, *linearised(self.target, self.gaussian, self.gaussian.loc, index(self.x, rows)))
        return self._last[1:]


class LinearisedDraws:
    r"""Components of a linearised network at given draws, :math:`\eta(x, \theta^*) + J(x)(\theta_s - \theta^*)`.

    Args:
        target: The model.
        gaussian: Gaussian over theta; its mean is the linearisation point.
        thetas: Draws, (S, P).
        x: Inputs, every leaf (N, ...).
    """

    def __init__(self, target: Target, gaussian: FlatGaussian, thetas: Tensor, x: Tree) -> None:
        self.target, self.gaussian, self.thetas, self.x = target, gaussian, thetas, x
        self.family, one = _first(target, gaussian, x)
        outputs = sum(math.prod(one[name].shape[1:]) for name in self.family.eta_names)
        jacobian = max(1, CHUNK_BYTES // (4 * outputs * target.dim * thetas.element_size()))
        self.rows = rows_per_chunk(min(num_data(x), MAX_ROWS, jacobian), len(thetas), one)
        self.weights = thetas.new_full((len(thetas),), 1 / len(thetas))

    def params(self, rows: slice) -> Params:
        """Parameters of every component at some inputs, each (S, n, ...)."""
        x = index(self.x, rows)
        eta, jacobian = eta_and_jacobian(self.target, self.gaussian.loc, x)
        with torch.no_grad():
            base = self.target.parameters(self.gaussian.loc, x)
            draws = eta + torch.einsum("nep,sp->sne", jacobian, self.thetas - self.gaussian.loc)
        return self.family.from_eta(draws, base)

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments by the law of total variance over the draws."""
        return mixture_moments(self.family, params, self.weights)


def _first(target: Target, gaussian: FlatGaussian, x: Tree) -> tuple[LikelihoodFamily, Params]:
    """Family and parameters at the first few inputs."""
    rows = next(chunks(num_data(x), MAX_ROWS))
    with torch.no_grad():
        one = target.parameters(gaussian.loc, index(x, rows))
    return target.family(index(x, rows)), one


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of covariances and their pseudo-inverses, (n, E, E) each.

    Unlike a Cholesky factor they exist where a covariance is singular, as J S J^T is wherever logits are normalised or
    one noise scale is shared by several outputs, and they vary continuously with the input.

    Args:
        covariance: Symmetric, positive semi-definite up to rounding, (n, E, E).

    Returns:
        Roots and pseudo-inverse roots.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    kept = values > 10 * values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    roots = values.sqrt() * kept
    inverses = torch.where(kept, 1 / roots, 0.0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT, (vectors * inverses.unsqueeze(-2)) @ vectors.mT
