r"""One Gaussian process per output: function values of different outputs are independent.

For each entry c of eta there is a covariance of theta of its own, a prior narrowed in R directions,

.. math:: \Sigma_c = \mathrm{diag}(s)\,\big(I + U_c(\Lambda_c - I)U_c^\top\big)\,\mathrm{diag}(s), \qquad
          \mathrm{Cov}(\eta_c(x), \eta_{c'}(x')) = \delta_{cc'}\, J_c(x)\, \Sigma_c\, J_c(x')^\top .

No single Gaussian over theta has these function values, so there is nothing to draw and no density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from inference.errors import CapabilityError
from inference.flat_gaussian import FlatGaussian, require_finite, require_positive, require_shape


@dataclass(frozen=True, eq=False)
class OutputGaussians(FlatGaussian):
    """Independent Gaussians over function values, one for each entry of eta.

    Attributes:
        loc: The linearisation point, shape (P,).
        scale: Prior standard deviations s > 0, shape (P,).
        basis: Orthonormal columns of every U, shape (E, P, R).
        eigenvalues: Variances along them in units of the prior's, > 0, shape (E, R).
    """

    scale: Tensor
    basis: Tensor
    eigenvalues: Tensor

    over_theta: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check shapes and signs.

        Raises:
            ValueError: If the basis has another shape than (E, P, R).
        """
        super().__post_init__()
        require_shape("scale", self.scale, self.loc.shape, "P")
        require_positive("scale", self.scale)
        if self.basis.dim() != 3 or self.basis.shape[1] != self.dim:
            raise ValueError(f"basis must have shape (E, {self.dim}, R), got {tuple(self.basis.shape)}")
        require_finite("basis", self.basis)
        require_shape("eigenvalues", self.eigenvalues, self.basis.shape[::2], "E, R")
        if self.eigenvalues.numel():
            require_positive("eigenvalues", self.eigenvalues.flatten())

    def quadratic(self, jacobian: Tensor) -> Tensor:
        r"""Covariance of the outputs at each input, diagonal.

        Args:
            jacobian: Jacobians of all outputs, shape (..., E, P).

        Returns:
            Covariances, shape (..., E, E).
        """
        scaled, inside = self._projected(jacobian)
        variance = scaled.square().sum(-1) + (inside.square() * (self.eigenvalues - 1)).sum(-1)
        return torch.diag_embed(variance.clamp(min=0))

    def joint(self, jacobian: Tensor) -> Tensor:
        """Covariance of the outputs at all inputs, zero between outputs.

        Args:
            jacobian: Jacobians, shape (B, E, P).

        Returns:
            Covariance, shape (B, E, B, E).
        """
        scaled, inside = self._projected(jacobian)
        covariance = torch.einsum("bep,cep->bce", scaled, scaled)
        covariance = covariance + torch.einsum("ber,cer,er->bce", inside, inside, self.eigenvalues - 1)
        return torch.diag_embed(covariance).transpose(1, 2)  # (B, B, E, E) to (B, E, B, E)

    def covariance_times(self, vector: Tensor) -> Tensor:
        """Product with the mean of the outputs' covariances, which bounds a Newton decrement from above.

        Args:
            vector: Vectors, shape (..., P).

        Returns:
            Products, shape (..., P).
        """
        scaled = self.scale * vector
        inside = torch.einsum("...p,epr->...er", scaled, self.basis) * (self.eigenvalues - 1)
        moved = torch.einsum("...er,epr->...p", inside, self.basis) / len(self.basis)
        return self.scale * (scaled + moved)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        self._refuse("draws of theta")

    def log_prob(self, theta: Tensor) -> Tensor:  # noqa: D102
        self._refuse("density of theta")

    @property
    def variance(self) -> Tensor:  # noqa: D102
        self._refuse("variances of theta")

    def covariance(self) -> Tensor:  # noqa: D102
        self._refuse("covariance of theta")

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"loc": self.loc, "scale": self.scale, "basis": self.basis, "eigenvalues": self.eigenvalues}

    def _projected(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened Jacobians (..., E, P), and their parts along each output's own directions (..., E, R)."""
        scaled = jacobian * self.scale
        return scaled, torch.einsum("...ep,epr->...er", scaled, self.basis)

    def _refuse(self, what: str) -> NoReturn:
        raise CapabilityError(
            f"independent outputs are one Gaussian process each, and no Gaussian over theta has them: no {what}; "
            "`predict` and `function_covariance` work, and FunctionalLaplace(independent_outputs=False) has all"
        )
