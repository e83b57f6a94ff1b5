r"""Laplace with Kronecker-factored blocks: one for every layer, and the weights of a layer correlated.

.. math:: \Lambda_l = \tfrac{1}{R} \sum g g^\top \otimes \sum a a^\top + \mathrm{diag}(\delta_l), \qquad
          \Sigma_l = (U_o \otimes U_i)\,\mathrm{diag}(\lambda^o_i \lambda^i_j + 1)^{-1} (U_o \otimes U_i)^\top

Exact on one linear layer with Gaussian noise of known scale. In deeper networks it neglects the covariance between
layers, and that of g with a within one (Martens & Grosse 2015). Memory is the sum of in^2 + out^2 over the layers, time
their cubes once and E gradients of the data. References: Ritter, Botev & Barber (2018) [recalled from the paper, not
re-read]; Daxberger et al. (2021).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inference import hessians
from inference.backend import Run
from inference.distributions import KroneckerGaussian
from inference.kronecker import KroneckerCurvature, kronecker_curvature, layer_block, require_curved
from inference.kronecker_gaussian import KroneckerBlock
from inference.laplace.base import NewtonLaplace, Notes, site_of, sites_of
from inference.laplace.memory import require_structure
from inference.taps import num_outputs
from inference.target import Target


@dataclass(frozen=True, kw_only=True)
class KroneckerLaplace(NewtonLaplace):
    """Gaussian at the mode with one Kronecker-factored covariance per layer.

    Sites outside the layers (noise scales, normalisation gains) have a dense block of their own up to 64 entries, and
    beyond that the exact diagonal, with a warning.

    Attributes:
        sharing: Weights used at several places (convolutions, sequences): "expand" counts places as data, "reduce"
            averages inputs and sums gradients over them first.
        damping: Add square roots of the prior precision to both factors instead of the prior precision to their
            product (Ritter et al. 2018). It counts cross terms that are not there, so there is no log evidence.
        newton_steps: Most Newton steps with this curvature after `polish_steps`; they end early where they do not
            converge quadratically.
    """

    sharing: Literal["expand", "reduce"] = "expand"
    damping: bool = False
    newton_steps: int = 3

    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "fisher", "monte_carlo")
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch", "layers"})
    bias: ClassVar[str] = "exact on one linear layer with Gaussian noise; elsewhere layers are independent"
    reference: ClassVar[str] = "Ritter et al. 2018; Daxberger et al. 2021"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ValueError: If a field is out of its range.
        """
        super().__post_init__()
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f'`sharing` must be "expand" or "reduce", got {self.sharing!r}')
        if not isinstance(self.damping, bool):
            raise ValueError(f"`damping` must be True or False, got {self.damping!r}")

    @property
    def has_evidence(self) -> bool:
        """Whether the curvature is one whose volume approximates the evidence."""
        return not self.damping

    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[KroneckerGaussian, Notes]:
        """Take the factored curvature at a point.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian, and what had to be left out.
        """
        curvature = self.kept_curvature(target, theta, run)
        prior, exact = hessians.prior_diagonal(target, theta)
        notes = [] if exact else ["the prior couples entries of theta: its curvature between them is left out"]
        negative = int((prior < 0).sum())
        if negative:
            notes.append(f"{negative} entries of the prior's curvature were < 0 and set to 0")
        if len(curvature.entries):
            names = ", ".join(sites_of(target, curvature.entries))
            notes.append(f"sites outside the layers have a diagonal covariance (the exact GGN's): {names}")
        return self.assemble(target, theta, curvature, prior.clamp(min=0), notes), notes

    def assemble(
        self, target: Target, theta: Tensor, curvature: KroneckerCurvature, prior: Tensor, notes: Notes
    ) -> KroneckerGaussian:
        """Add a prior precision to a curvature and invert.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            curvature: Factors of the likelihood's curvature.
            prior: Prior precisions, none negative, shape (P,).
            notes: What had to be done to the prior is added here.

        Returns:
            The Gaussian.
        """
        blocks = [*self._layers(target, curvature, prior, notes), *self._others(target, curvature, prior)]
        return KroneckerGaussian(theta, tuple(_cast(block, target.dtype) for block in blocks))

    def likelihood_curvature(self, target: Target, theta: Tensor, run: Run) -> KroneckerCurvature:
        """Take the factors of the likelihood's curvature, not tempered.

        Args:
            target: The target.
            theta: Where, shape (P,).
            run: The fit in progress.

        Returns:
            The factors, in float64.
        """
        with run.bar(target.num_data, f"curvature ({self.curvature})") as bar:
            run.count(num_outputs(target, theta, target.x) if self.curvature == "ggn" else 1)
            return kronecker_curvature(
                target,
                theta,
                y=self._labels(target, theta, run),
                labels=self.curvature != "ggn",
                sharing=self.sharing,
                advance=bar.advance,
                slope=run.slope,
            )

    def _check_target(self, target: Target) -> None:
        super()._check_target(target)
        require_structure(target, "KroneckerLaplace")

    def _layers(
        self, target: Target, curvature: KroneckerCurvature, prior: Tensor, notes: Notes
    ) -> list[KroneckerBlock]:
        blocks, inexact = [], {}
        for factors in curvature.layers:
            block, error = layer_block(
                factors,
                prior[factors.positions],
                curvature.num_data,
                likelihood_temperature=target.likelihood_temperature,
                temperature=target.temperature,
                damping=self.damping,
            )
            blocks.append(block)
            if error:
                inexact[factors.name] = error
        if inexact:
            worst = ", ".join(f"{name} (by up to {error:.2g})" for name, error in inexact.items())
            notes.append(
                "a prior precision that is no product of a factor per row and one per column was replaced by the "
                f"nearest that is, in relative terms, in {worst}"
            )
        return blocks

    def _others(self, target: Target, curvature: KroneckerCurvature, prior: Tensor) -> list[KroneckerBlock]:
        blocks, temperature = [], target.temperature
        for entries, matrix in curvature.sites:
            values, vectors = torch.linalg.eigh(matrix / target.likelihood_temperature + prior[entries].diag())
            require_curved(values, site_of(target, int(entries[0])))
            blocks.append(KroneckerBlock(entries[:, None], (temperature / values)[:, None], vectors))
        if len(curvature.entries):
            precision = curvature.diagonal / target.likelihood_temperature + prior[curvature.entries]
            require_curved(precision, site_of(target, int(curvature.entries[precision.argmin()])))
            blocks.append(KroneckerBlock(curvature.entries[:, None], (temperature / precision)[:, None]))
        return blocks


def _cast(block: KroneckerBlock, dtype: torch.dtype) -> KroneckerBlock:
    def to(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    return KroneckerBlock(
        block.positions,
        block.variance.to(dtype),
        to(block.out_vectors),
        to(block.in_vectors),
        to(block.out_scale),
        to(block.in_scale),
    )
