r"""The mass matrix M of Hamiltonian samplers: what it does to momenta, and its estimate from draws.

Momenta are :math:`p \sim N(0, M)` and the inverse mass is an estimate of the posterior covariance, so that all
directions are explored at the same pace. The estimate is regularised as in Stan,

.. math:: \hat\Sigma = \frac{n}{n+5} S_n + 10^{-3}\frac{5}{n+5} I,

which matters for networks: fewer than a few hundred draws say little about a thousand variances.
Source: carpenter2017stan and Stan's reference manual, "HMC algorithm parameters" [recalled, not re-read].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from inference.mcmc.integrators import velocity

MassMatrix = Literal["diagonal", "dense", "identity"]
MASS_MATRICES: tuple[MassMatrix, ...] = ("diagonal", "dense", "identity")


@dataclass(frozen=True)
class Metric:
    """Mass matrix of one chain.

    Attributes:
        kind: "diagonal", "dense" or "identity".
        inverse_mass: Estimated posterior variances (P,), or covariance (P, P) for "dense".
        root: Its square root (P,), or lower Cholesky factor (P, P).
    """

    kind: MassMatrix
    inverse_mass: Tensor
    root: Tensor

    @classmethod
    def identity(cls, kind: MassMatrix, like: Tensor) -> Metric:
        """The metric before anything is known.

        Args:
            kind: "diagonal", "dense" or "identity".
            like: A theta, (P,), for size, dtype and device.

        Returns:
            Unit masses in the storage of ``kind``.
        """
        ones = torch.ones_like(like)
        inverse_mass = torch.diag(ones) if kind == "dense" else ones
        return cls(kind, inverse_mass, inverse_mass)

    def updated(self, covariance: Tensor) -> Metric:
        """The metric with another inverse mass.

        Args:
            covariance: Variances (P,) or covariance (P, P), in the storage of this kind.

        Returns:
            A new metric; the old one if the covariance is not positive definite.
        """
        if self.kind == "dense":
            root, failed = torch.linalg.cholesky_ex(covariance)
            if int(failed) or not torch.isfinite(root).all():
                return self
            return replace(self, inverse_mass=covariance, root=root)
        if not torch.isfinite(covariance).all() or not (covariance > 0).all():
            return self
        return replace(self, inverse_mass=covariance, root=covariance.sqrt())

    def momentum(self, noise: Tensor) -> Tensor:
        r"""Momentum :math:`p \sim N(0, M)`.

        Args:
            noise: Standard normal numbers, (P,).

        Returns:
            (P,).
        """
        if self.kind == "dense":
            return torch.linalg.solve_triangular(self.root.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)
        if self.kind == "identity":
            return noise
        return noise / self.root

    def velocity(self, momentum: Tensor) -> Tensor:
        """Velocity of a momentum, (P,)."""
        return velocity(self.inverse_mass, momentum)


class CovarianceEstimator:
    """Running variances or covariance of draws, by Welford's updates in float64."""

    def __init__(self, dense: bool, like: Tensor) -> None:
        self.dense = dense
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        shape = (like.shape[0], like.shape[0]) if dense else like.shape
        self.squares = torch.zeros(shape, dtype=torch.float64, device=like.device)

    def add(self, theta: Tensor) -> None:
        """Take one draw (P,) into account."""
        self.count += 1
        before = theta.double() - self.mean
        self.mean += before / self.count
        after = theta - self.mean
        if self.dense:
            self.squares.addr_(after, before)
        else:
            self.squares.addcmul_(after, before)

    def regularised(self, dtype: torch.dtype) -> Tensor:
        r"""Stan's shrunken estimate, :math:`\frac{n}{n+5} S_n + 10^{-3}\frac{5}{n+5} I`.

        Args:
            dtype: Floating dtype of the result.

        Returns:
            Variances (P,) or covariance (P, P).
        """
        n = self.count
        estimate = self.squares * (n / ((n + 5.0) * max(n - 1, 1)))
        added = 1e-3 * 5.0 / (n + 5.0)
        if self.dense:
            estimate = 0.5 * (estimate + estimate.mT)
            estimate.diagonal().add_(added)
        else:
            estimate = estimate + added
        return estimate.to(dtype)
