r"""A diagonal mass matrix corrected along a few directions, from draws and gradients.

.. math:: M^{-1} = \mathrm{diag}(s)\,\big(I + U(\Lambda - I)U^\top\big)\,\mathrm{diag}(s)

With draws :math:`\theta_i` and gradients :math:`g_i` of one window, :math:`s^2 = \sqrt{\mathrm{Var}\,\theta /
\mathrm{Var}\,g}`. In these coordinates, and within the span of draws and gradients, the inverse mass is the geometric
mean of the covariance of the draws and the inverse covariance of the gradients, each plus :math:`10^{-5} I`: for a
Gaussian target both are the covariance, and the mean needs far fewer draws than either. Its eigenvalues between 1/2 and
2 are left at 1. Source: seyboldt2026preconditioning, algorithm 1, and its implementation nutpie [recalled from their
documentation, not re-read]; keeping only the R most extreme eigenvalues is our reconstruction, for a fixed shape.
Cost: P n^2 per window of n draws, O(P R) per leapfrog.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_REGULARISATION = 1e-5
_CUTOFF = 2.0
# Draws and gradients held per chain; later ones replace the oldest.
CAPACITY = 256


class LowRankEstimator:
    """Window of draws and gradients.

    Args:
        rank: Directions R.
        like: A theta, (P,).
    """

    def __init__(self, rank: int, like: Tensor) -> None:
        self.rank, self.like = rank, like
        self.rows: list[Tensor] = []  # (2, P) each

    def add(self, theta: Tensor, gradient: Tensor) -> None:
        """Take one draw and the gradient there into account, (P,) each."""
        self.rows.append(torch.stack([theta, gradient]))
        if len(self.rows) > CAPACITY:
            del self.rows[0]

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs, for checkpoints."""
        empty = self.like.new_zeros(0, 2, self.like.shape[0])
        return {"rows": torch.stack(self.rows) if self.rows else empty}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        self.rows = list(tensors["rows"].to(self.like).unbind(0))

    def regularised(self, dtype: torch.dtype) -> Tensor:
        """The inverse mass as the rows that :class:`~inference.mcmc.metrics.Metric` holds.

        Args:
            dtype: Floating dtype of the result.

        Returns:
            (1 + 2 R, P); not finite where draws or gradients are not.
        """
        rows = torch.stack(self.rows).double()
        draws, gradients = rows[:, 0] - rows[:, 0].mean(0), rows[:, 1] - rows[:, 1].mean(0)  # (n, P)
        scale = (draws.square().mean(0) / gradients.square().mean(0)).pow(0.25).clamp(1e-10, 1e10)
        packed = draws.new_zeros(1 + 2 * self.rank, draws.shape[1])
        packed[0] = scale.square()
        if self.rank and torch.isfinite(scale).all():
            basis, eigenvalues = correction(draws / scale, gradients * scale, self.rank)
            kept = basis.shape[1]
            packed[1 : 1 + kept] = (scale[:, None] * basis * (eigenvalues - 1)).mT
            packed[1 + self.rank : 1 + self.rank + kept] = (scale[:, None] * basis).mT
        return packed.to(dtype)


def correction(draws: Tensor, gradients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Directions in which scaled draws are far from isotropic.

    Args:
        draws: Centred and scaled, (n, P).
        gradients: Centred and scaled inversely, (n, P).
        rank: Largest number of directions.

    Returns:
        Orthonormal directions (P, r) and eigenvalues of the covariance along them (r,), r at most ``rank``.
    """
    count = draws.shape[0]
    spans = [torch.linalg.svd(part.mT, full_matrices=False)[0] for part in (draws, gradients)]
    basis, _ = torch.linalg.qr(torch.cat(spans, 1))  # (P, k), k at most min(P, 2 n)
    inside = [part @ basis for part in (draws, gradients)]
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    of_draws, of_gradients = (part.mT @ part / count + _REGULARISATION * identity for part in inside)
    values, vectors = torch.linalg.eigh(_geometric_mean(of_draws, of_gradients))
    extremity = values.clamp(min=1e-300).log().abs()
    order = extremity.argsort(descending=True)[:rank]
    order = order[extremity[order] > torch.tensor(_CUTOFF).log()]
    return (basis @ vectors[:, order]).contiguous(), values[order]


def _geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    r"""The positive definite X with X b X = a: the geometric mean of a and the inverse of b."""
    values, vectors = torch.linalg.eigh(b)
    root = (vectors * values.sqrt()) @ vectors.mT
    inverse_root = (vectors * values.rsqrt()) @ vectors.mT
    inner_values, inner_vectors = torch.linalg.eigh(root @ a @ root)
    inner = (inner_vectors * inner_values.clamp(min=0).sqrt()) @ inner_vectors.mT
    return inverse_root @ inner @ inverse_root
