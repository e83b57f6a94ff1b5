r"""A Kronecker-factored curvature held fixed while prior precisions and the noise change.

Eigenvalues of the factors of each layer are taken once, after dividing them by the factors of the relative precisions
b: with :math:`\lambda^o, \lambda^i` those of outputs and inputs, and a one prior precision for the layer,

.. math:: \log\det = \sum_{ij} \log(\tau \lambda^o_i \lambda^i_j + a) .

A bias with a precision a' of its own enters by its Schur complement, which needs the same eigenbasis: with v the
products of the weights' inputs with the bias's, in that basis, and n the bias's own entry,

.. math:: \sum_i \log\Big(a' + \tau \lambda^o_i \Big(n - \sum_j \frac{\tau \lambda^o_i v_j^2}
          {\tau \lambda^o_i \lambda^i_j + a}\Big)\Big) .
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inference.distributions import KroneckerGaussian
from inference.kronecker import Factors, KroneckerCurvature, factored_prior
from inference.laplace.fixed_curvature import FixedCurvature
from inference.laplace.kronecker import KroneckerLaplace
from inference.laplace.prior_groups import PriorGroups
from inference.target import Target


class BlockCurvature(FixedCurvature):
    """Of `KroneckerLaplace`.

    Args:
        backend: It.
        curvature: The factors.
    """

    def __init__(self, backend: KroneckerLaplace, curvature: KroneckerCurvature) -> None:
        self.backend, self.curvature = backend, curvature

    def diagonal(self) -> Tensor:
        """Diagonal of H, (P,), float64; units and inputs that no datum uses count as the others on average."""
        held = self.curvature
        size = sum(f.positions.numel() for f in held.layers) + sum(len(e) for e, _ in held.sites) + len(held.entries)
        out = torch.zeros(size, dtype=torch.float64, device=held.diagonal.device)
        for factors in held.layers:
            inputs = factors.inputs if factors.inputs.dim() == 1 else factors.inputs.diagonal()
            product = torch.outer(_filled(factors.outputs.diagonal()), _filled(inputs))
            out[factors.positions] = product / factors.terms
        for entries, matrix in held.sites:
            out[entries] = matrix.diagonal()
        out[held.entries] = held.diagonal
        return out

    def prepare(self, groups: PriorGroups) -> None:
        """Decompose every block.

        Args:
            groups: The groups.

        Raises:
            ValueError: If a block would need a decomposition for every value of the precisions.
        """
        self.groups = groups
        self._log_base = groups.base.log().sum()
        held = self.curvature
        self._blocks: list[_LayerTerm | _SiteTerm] = [_LayerTerm(factors, groups) for factors in held.layers]
        self._blocks += [_SiteTerm(entries, matrix, groups) for entries, matrix in held.sites]

    def log_determinant(self, log_precision: Tensor, tau: Tensor) -> Tensor:  # noqa: D102
        factors = self.groups.factors(log_precision)
        entries = self.curvature.entries
        rest = tau * self.curvature.diagonal / self.groups.base[entries] + factors[self.groups.index[entries]]
        total = rest.log().sum() + self._log_base
        return total + sum(block.log_determinant(factors, tau) for block in self._blocks)

    def gaussian(self, target: Target, theta: Tensor, precision: Tensor, tau: float) -> KroneckerGaussian:  # noqa: D102
        held = self.curvature
        scaled = replace(
            held,
            layers=[replace(factors, outputs=tau * factors.outputs) for factors in held.layers],
            sites=[(entries, tau * matrix) for entries, matrix in held.sites],
            diagonal=tau * held.diagonal,
        )
        return self.backend.assemble(target, theta, scaled, precision, [])


class _LayerTerm:
    """Log determinant of one layer's block relative to its b, with one factor for the weight and one for the bias.

    Args:
        factors: The layer's factors.
        groups: The groups.

    Raises:
        ValueError: If the precisions are not of that form.
    """

    def __init__(self, factors: Factors, groups: PriorGroups) -> None:
        index = groups.index[factors.positions]
        self.weight, self.bias = int(index[0, 0]), int(index[0, -1])
        if not bool((index[:, :-1] == self.weight).all() & (index[:, -1] == self.bias).all()):
            raise ValueError(
                f"KroneckerLaplace has one prior precision for the weight and one for the bias of a layer, but those "
                f'of {factors.name!r} are in {len(index.unique())} groups: take groups="site" or "all", or fit '
                "DiagonalLaplace or DenseLaplace"
            )
        out_root, in_root, _ = factored_prior(groups.base[factors.positions])
        outputs = factors.outputs / (out_root[:, None] * out_root) / factors.terms
        self._outputs = torch.linalg.eigvalsh(outputs).clamp(min=0)[:, None]  # (out, 1)
        if factors.inputs.dim() == 1:
            self._inputs, split = factors.inputs / in_root.square(), len(factors.inputs)
        else:
            inputs, split = factors.inputs / (in_root[:, None] * in_root), len(factors.inputs)
            split -= int(self.weight != self.bias)
            if split < len(inputs):
                self._inputs, vectors = torch.linalg.eigh(inputs[:split, :split])
                self._mixed, self._own = (vectors.mT @ inputs[:split, split:]).square()[:, 0], inputs[-1, -1]
            else:
                self._inputs = torch.linalg.eigvalsh(inputs)
            self._inputs = self._inputs.clamp(min=0)
        self._single = split == factors.positions.shape[1]

    def log_determinant(self, factors: Tensor, tau: Tensor) -> Tensor:
        """() from the factors (G + 1,) and the factor of H ()."""
        outputs = tau * self._outputs
        precision = outputs * self._inputs + factors[self.weight]  # (out, in)
        total = precision.log().sum()
        if self._single:
            return total
        # Of the bias given the weights: what its column adds beyond them cannot be negative.
        left = (self._own - outputs * (self._mixed / precision).sum(1, keepdim=True)).clamp(min=0)
        return total + (outputs * left + factors[self.bias]).log().sum()


class _SiteTerm:
    """Log determinant of a small dense block relative to its b.

    Args:
        entries: Its entries of theta, all in one group.
        matrix: Its curvature.
        groups: The groups.

    Raises:
        ValueError: If the entries are in several groups.
    """

    def __init__(self, entries: Tensor, matrix: Tensor, groups: PriorGroups) -> None:
        index = groups.index[entries]
        self.group = int(index[0])
        if not bool((index == self.group).all()):
            raise ValueError(
                f"KroneckerLaplace has one prior precision for a site outside the layers, got {len(index.unique())}: "
                'take groups="site" or "all", or fit DiagonalLaplace or DenseLaplace'
            )
        root = groups.base[entries].rsqrt()
        self._values = torch.linalg.eigvalsh(root[:, None] * matrix * root).clamp(min=0)

    def log_determinant(self, factors: Tensor, tau: Tensor) -> Tensor:
        """() from the factors (G + 1,) and the factor of H ()."""
        return (tau * self._values + factors[self.group]).log().sum()


def _filled(values: Tensor) -> Tensor:
    """Zeros replaced by the geometric mean of the rest, so that products of rows and columns stay products."""
    return torch.where(values > 0, values, values[values > 0].log().mean().exp() if bool((values > 0).any()) else 1.0)
