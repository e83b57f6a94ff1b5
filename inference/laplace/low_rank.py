r"""Laplace with the curvature's leading eigenvectors: the prior everywhere, narrowed in R directions.

Of the whitened curvature :math:`A^{-1/2} H A^{-1/2}` the R largest eigenpairs (m, q) are found by Lanczos on products
with the GGN (one forward and one backward product each, no matrix). The covariance

.. math:: \Sigma = A^{-1/2} \Big(I - Q\,\mathrm{diag}\big(\tfrac{m}{1+m}\big) Q^\top\Big) A^{-1/2}

is the exact inverse of A plus what was kept. What is left out counts as no curvature, so variances are too large, by a
factor of at most 1 + m with m the largest eigenvalue left out. Exact at R = P, the prior at R = 0; memory is R P.
References: Daxberger et al. (2021); implicitly restarted Lanczos as in ARPACK.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from inference import hessians
from inference.backend import Run, check_integer
from inference.curvature import ggn, ggn_product
from inference.distributions import SpectralGaussian
from inference.kronecker import require_curved
from inference.laplace.base import Laplace, Notes, site_of
from inference.laplace.memory import require_structure
from inference.taps import num_outputs
from inference.target import Target


@dataclass(frozen=True, kw_only=True)
class LowRankLaplace(Laplace):
    """Gaussian at the mode whose precision is the prior's plus the R leading eigenpairs of the curvature.

    Attributes:
        rank: Number R of eigenpairs; all of them from P on.
    """

    rank: int = 50

    curvatures: ClassVar[tuple[str, ...]] = ("ggn",)
    bias: ClassVar[str] = "exact at rank P; below it too wide in the directions left out, at most the prior"
    reference: ClassVar[str] = "Daxberger et al. 2021"

    def __post_init__(self) -> None:
        """Check the rank."""
        super().__post_init__()
        check_integer(self, "rank", minimum=0)

    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[SpectralGaussian, Notes]:
        """Take the leading eigenpairs of the curvature at a point.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian, and what had to be left out.
        """
        prior, exact = hessians.prior_diagonal(target, theta)
        notes = [] if exact else ["the prior couples entries of theta: its curvature between them is left out"]
        require_curved(prior, site_of(target, int(prior.argmin())))
        values, vectors, missing = self._eigenpairs(target, theta, prior.rsqrt(), run)
        if missing:
            notes.append(f"Lanczos found {len(values)} of {len(values) + missing} eigenpairs; the rest are left out")
        smallest = float(values.min()) if 0 < len(values) < target.dim else 0.0
        run.info.extra["smallest_eigenvalue_kept"] = smallest
        if smallest > 1:
            notes.append(
                f"the smallest of {len(values)} eigenvalues kept is {smallest:.3g} prior precisions: directions left "
                f"out may have variances up to {1 + smallest:.3g} times too large; raise `rank`"
            )
        scale = (target.temperature / prior).sqrt()
        basis, shrink = vectors.to(target.dtype).contiguous(), (1 / (1 + values)).to(target.dtype)
        return SpectralGaussian(theta, scale.to(target.dtype), basis, shrink), notes

    def _check_target(self, target: Target) -> None:
        super()._check_target(target)
        require_structure(target, "LowRankLaplace", rank=self.rank)

    def _eigenpairs(self, target: Target, theta: Tensor, whiten: Tensor, run: Run) -> tuple[Tensor, Tensor, int]:
        """Leading eigenvalues (R,) and eigenvectors (P, R) of the whitened curvature, and how many were not found."""
        tempering = target.likelihood_temperature
        outputs = num_outputs(target, theta, target.x)
        rank = min(self.rank, target.dim, target.num_data * outputs)  # the GGN has no more
        if rank >= target.dim:
            run.count(outputs)
            matrix = whiten[:, None] * ggn(target, theta) * whiten / tempering
            values, vectors = torch.linalg.eigh(matrix)
            return values.clamp(min=0), vectors, 0
        if rank == 0:
            return whiten.new_zeros(0), whiten.new_zeros(target.dim, 0), 0
        with run.bar(10 * rank, "Lanczos products") as bar:

            def product(vector: np.ndarray) -> np.ndarray:
                run.count(2)
                bar.advance(1)
                tangent = (whiten * torch.as_tensor(vector.reshape(-1)).to(whiten)).to(theta.dtype)
                return (whiten * ggn_product(target, theta, tangent) / tempering).cpu().numpy()

            return _lanczos(product, target.dim, rank, run, torch.finfo(theta.dtype).eps ** 0.5, whiten)


def _lanczos(
    product: Callable[[np.ndarray], np.ndarray], dim: int, rank: int, run: Run, tolerance: float, like: Tensor
) -> tuple[Tensor, Tensor, int]:
    operator = LinearOperator((dim, dim), matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    start = torch.randn(dim, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64).numpy()
    try:
        values, vectors = eigsh(operator, k=rank, which="LA", v0=start, tol=tolerance)  # type: ignore[arg-type]
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    basis = np.linalg.qr(vectors)[0]  # orthonormal to rounding; ARPACK's are to its tolerance
    return torch.as_tensor(values).to(like).clamp(min=0), torch.as_tensor(basis).to(like), rank - len(values)
