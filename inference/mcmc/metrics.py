r"""The mass matrix M of Hamiltonian samplers: what it does to momenta, and its estimate from draws.

Momenta are :math:`p \sim N(0, M)` and the inverse mass is an estimate of the posterior covariance, so that all
directions are explored at the same pace. The estimate is regularised as in Stan,

.. math:: \hat\Sigma = \frac{n}{n+5} S_n + 10^{-3}\frac{5}{n+5} I,

which matters for networks: fewer than a few hundred draws say little about a thousand variances.
Source: carpenter2017stan and Stan's reference manual, "HMC algorithm parameters" [recalled, not re-read]; for the low
rank form see :mod:`inference.mcmc.low_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from inference.mcmc.integrators import velocity
from inference.mcmc.low_rank import LowRankEstimator

MassMatrix = Literal["diagonal", "dense", "low_rank", "identity", "prior"]
MASS_MATRICES: tuple[MassMatrix, ...] = ("diagonal", "dense", "low_rank", "identity", "prior")


class Estimator(Protocol):
    """Collects draws and turns them into an inverse mass."""

    def add(self, theta: Tensor, gradient: Tensor) -> None:
        """Take one draw (P,) and the gradient of the log density there (P,) into account."""
        ...

    def regularised(self, dtype: torch.dtype) -> Tensor:
        """Estimate, in the storage of its metric."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        ...


@dataclass(frozen=True)
class Metric:
    r"""Mass matrix of one chain.

    Attributes:
        kind: How it is held: "identity", "diagonal", "dense" or "low_rank".
        inverse_mass: Estimated posterior variances (P,), covariance (P, P), or for "low_rank"
            :math:`\mathrm{diag}(s)(I + U(\Lambda-I)U^\top)\mathrm{diag}(s)` as the rows
            :math:`s^2`, :math:`(sU(\Lambda-I))^\top` and :math:`(sU)^\top`, (1 + 2 R, P).
        root: What turns white noise into momenta: standard deviations (P,), a lower Cholesky factor (P, P), or the
            rows :math:`s`, :math:`(s^{-1}U(\Lambda^{-1/2}-I))^\top` and :math:`U^\top`, (1 + 2 R, P).
        adapts: Whether warm-up replaces it.
    """

    kind: Literal["identity", "diagonal", "dense", "low_rank"]
    inverse_mass: Tensor
    root: Tensor
    adapts: bool = True

    @classmethod
    def identity(cls, kind: MassMatrix, like: Tensor, rank: int = 10) -> Metric:
        """The metric before anything is known.

        Args:
            kind: "diagonal", "dense", "low_rank" or "identity".
            like: A theta, (P,), for size, dtype and device.
            rank: Directions R of "low_rank", at most (P - 2) / 2.

        Returns:
            Unit masses in the storage of ``kind``.
        """
        ones = torch.ones_like(like)
        if kind == "dense":
            return cls("dense", torch.diag(ones), torch.diag(ones))
        if kind == "low_rank":
            rows = 2 * min(rank, max(0, (like.shape[0] - 2) // 2))
            packed = torch.cat([ones[None], ones.new_zeros(rows, like.shape[0])])
            return cls("low_rank", packed, packed)
        return cls("identity" if kind == "identity" else "diagonal", ones, ones, kind == "diagonal")

    @classmethod
    def fixed(cls, kind: Literal["diagonal", "dense", "low_rank"], inverse_mass: Tensor) -> Metric:
        """A metric that warm-up leaves as it is.

        Args:
            kind: Its storage.
            inverse_mass: In that storage.

        Returns:
            The metric.

        Raises:
            ValueError: If the inverse mass is not positive definite.
        """
        empty = cls(kind, inverse_mass, inverse_mass, adapts=False)
        made = empty.updated(inverse_mass)
        if made is empty:
            raise ValueError("the mass matrix must be positive definite and finite")
        return made

    def estimator(self, like: Tensor) -> Estimator | None:
        """What collects draws for :meth:`updated`; None where the masses stay.

        Args:
            like: A theta, (P,).

        Returns:
            A new estimator.
        """
        if self.kind == "identity" or not self.adapts:
            return None
        if self.kind == "low_rank":
            return LowRankEstimator(self.inverse_mass.shape[0] // 2, like)
        return CovarianceEstimator(self.kind == "dense", like)

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`with_tensors` needs, for checkpoints."""
        return {"inverse_mass": self.inverse_mass, "root": self.root}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Metric:
        """This metric with the masses of another of its kind."""
        return replace(self, **{k: tensors[k].to(self.root) for k in ("inverse_mass", "root")})

    def updated(self, covariance: Tensor) -> Metric:
        """The metric with another inverse mass.

        Args:
            covariance: Inverse mass in the storage of this kind.

        Returns:
            A new metric; the old one if the covariance is not positive definite.
        """
        if not torch.isfinite(covariance).all():
            return self
        if self.kind == "dense":
            root, failed = torch.linalg.cholesky_ex(covariance)
            if int(failed) or not torch.isfinite(root).all():
                return self
            # LAPACK's factors lie column by column; laid out as when read from a checkpoint, momenta agree to the bit.
            return replace(self, inverse_mass=covariance.contiguous(), root=root.contiguous())
        if self.kind == "low_rank":
            return self._with_low_rank(covariance)
        if not (covariance > 0).all():
            return self
        return replace(self, inverse_mass=covariance, root=covariance.sqrt())

    def _with_low_rank(self, packed: Tensor) -> Metric:
        rank = packed.shape[0] // 2
        squared, left, right = packed.split([1, rank, rank])
        if not (squared > 0).all():
            return self
        scale = squared.sqrt()
        basis = right / scale
        eigenvalues = 1 + (basis * (left / scale)).sum(1, keepdim=True)
        if not (eigenvalues > 0).all():
            return self
        root = torch.cat([scale, basis / scale * (eigenvalues.rsqrt() - 1), basis])
        return replace(self, inverse_mass=packed.contiguous(), root=root)

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
        if self.kind == "low_rank":
            rank = self.root.shape[0] // 2
            scale, correction, basis = self.root.split([1, rank, rank])
            return noise / scale.squeeze(0) + (basis @ noise) @ correction
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

    def add(self, theta: Tensor, gradient: Tensor | None = None) -> None:
        """Take one draw into account.

        Args:
            theta: (P,).
            gradient: Of the log density there, (P,); not used here.
        """
        self.count += 1
        before = theta.double() - self.mean
        self.mean += before / self.count
        after = theta - self.mean
        if self.dense:
            self.squares.addr_(after, before)
        else:
            self.squares.addcmul_(after, before)

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs, for checkpoints."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        self.count = int(tensors["count"])
        self.mean, self.squares = tensors["mean"].to(self.mean), tensors["squares"].to(self.squares)

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
