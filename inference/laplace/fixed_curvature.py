r"""A likelihood's curvature held fixed while prior precisions and the noise change: decomposed once, then elementwise.

.. math:: \log\det(\tau H + A), \qquad A = \mathrm{diag}(a_{g(i)} b_i),

with :math:`\tau` the square of the declared noise scale over the present one. What is decomposed, and what an
evaluation costs, by the structure of H:

- diagonal: nothing; P.
- dense, one group: eigenvalues of :math:`b^{-1/2} H b^{-1/2}`; P. More groups share no eigenbasis: a Cholesky
  factorisation each time, P^3 / 3.
- Kronecker: see :mod:`inference.laplace.block_curvature`; P.
- low rank, :math:`H = W W^\top`: one R x R matrix per group, whose weighted sum is factorised; R^3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from inference.curvature import ggn_diagonal
from inference.distributions import DenseGaussian, DiagonalGaussian, FlatGaussian, SpectralGaussian
from inference.laplace.prior_groups import PriorGroups
from inference.target import Target


class FixedCurvature(ABC):
    """The likelihood's curvature H at one theta, in the structure of one backend."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal of H, (P,), float64."""

    @abstractmethod
    def prepare(self, groups: PriorGroups) -> None:
        """Decompose for one grouping of the prior precisions, before `log_determinant` is called.

        Args:
            groups: The groups.
        """

    @abstractmethod
    def log_determinant(self, log_precision: Tensor, tau: Tensor) -> Tensor:
        r"""Log determinant of the posterior precision, :math:`\log\det(\tau H + A)`, differentiable.

        Args:
            log_precision: Logarithms of the groups' factors, (G,).
            tau: Factor of H, ().

        Returns:
            ().
        """

    @abstractmethod
    def gaussian(self, target: Target, theta: Tensor, precision: Tensor, tau: float) -> FlatGaussian:
        r"""The Gaussian :math:`N(\theta, (\tau H + A)^{-1})` in the structure of its backend.

        Args:
            target: The model, for dtype and names.
            theta: Mean, (P,).
            precision: Prior precisions, (P,).
            tau: Factor of H.

        Returns:
            The Gaussian.
        """


class DiagonalCurvature(FixedCurvature):
    """Of `DiagonalLaplace`.

    Args:
        values: Diagonal of H, (P,).
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def diagonal(self) -> Tensor:  # noqa: D102
        return self.values

    def prepare(self, groups: PriorGroups) -> None:  # noqa: D102
        self.groups = groups

    def log_determinant(self, log_precision: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        return (tau * self.values + self.groups.precision(log_precision)).log().sum()

    def gaussian(self, target: Target, theta: Tensor, precision: Tensor, tau: float) -> DiagonalGaussian:  # noqa: D102
        return DiagonalGaussian(theta, (tau * self.values + precision).rsqrt().to(theta.dtype))


class DenseCurvature(FixedCurvature):
    """Of `DenseLaplace`.

    Args:
        matrix: H, (P, P).
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def diagonal(self) -> Tensor:  # noqa: D102
        return self.matrix.diagonal().clone()

    def prepare(self, groups: PriorGroups) -> None:  # noqa: D102
        self.groups = groups
        root = groups.base.rsqrt()
        self._log_base = groups.base.log().sum()
        self._scaled = root[:, None] * self.matrix * root
        if groups.uniform:
            self._values = torch.linalg.eigvalsh(self._scaled).clamp(min=0)

    def log_determinant(self, log_precision: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        if self.groups.uniform:
            return (tau * self._values + log_precision.exp()).log().sum() + self._log_base
        factors = self.groups.factors(log_precision)[self.groups.index]
        return _log_determinant(tau * self._scaled + factors.diag()) + self._log_base

    def gaussian(self, target: Target, theta: Tensor, precision: Tensor, tau: float) -> DenseGaussian:  # noqa: D102
        factor = torch.linalg.cholesky(tau * self.matrix + precision.diag())
        return DenseGaussian(theta, precision_tril=factor.to(theta.dtype))


class LowRankCurvature(FixedCurvature):
    r"""Of `LowRankLaplace`: what was kept of it, :math:`H = W W^\top`.

    The directions kept led under the declared prior. Where that is far too narrow, ones that were left out may matter.

    Args:
        target: The model.
        theta: Where, (P,).
        gaussian: The fitted Gaussian, which holds the eigenpairs.
        prior: Declared prior precisions it was fitted with, (P,).
    """

    def __init__(self, target: Target, theta: Tensor, gaussian: SpectralGaussian, prior: Tensor) -> None:
        self._at = target, theta
        values = (1 / gaussian.eigenvalues.double() - 1).clamp(min=0)
        self.root = prior.sqrt()[:, None] * gaussian.basis.double() * values.sqrt()

    def diagonal(self) -> Tensor:
        """Diagonal of the whole GGN, not only of what was kept of it, (P,), float64."""
        return ggn_diagonal(*self._at)

    def prepare(self, groups: PriorGroups) -> None:  # noqa: D102
        self.groups = groups
        self._log_base = groups.base.log()
        self._root = groups.base.rsqrt()[:, None] * self.root
        rank, few = self.root.shape[1], groups.num_groups < len(groups.index)
        self._products = self.root.new_zeros(groups.num_groups + 1 if few else 0, rank, rank)
        for group in range(len(self._products)):
            own = self._root[groups.index == group]
            self._products[group] = own.mT @ own

    def log_determinant(self, log_precision: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        factors = self.groups.factors(log_precision)
        own = factors[self.groups.index]
        if len(self._products):
            inner = (self._products / factors[:, None, None]).sum(0)
        else:
            inner = self._root.mT @ (self._root / own[:, None])
        identity = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        return _log_determinant(identity + tau * inner) + own.log().sum() + self._log_base.sum()

    def gaussian(self, target: Target, theta: Tensor, precision: Tensor, tau: float) -> SpectralGaussian:  # noqa: D102
        whitened = tau**0.5 * self.root / precision.sqrt()[:, None]
        basis, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
        values = 1 / (1 + singular.square())
        basis, values = basis.to(theta.dtype).contiguous(), values.to(theta.dtype)
        return SpectralGaussian(theta, precision.rsqrt().to(theta.dtype), basis, values)


def _log_determinant(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix; eigenvalues that rounding made negative count as the smallest number."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return 2 * factor.diagonal().log().sum()
    return torch.linalg.eigvalsh(matrix).clamp(min=torch.finfo(matrix.dtype).tiny).log().sum()
