r"""Laplace as a Gaussian process: the curvature of M active data, in the space of their function values.

The linearised network is a Gaussian process with kernel :math:`k(x, x') = J(x) A^{-1} J(x')^\top`. Given M data with
output curvature :math:`\Lambda = L L^\top` (the declared likelihood's Fisher information, all of it),

.. math:: \mathrm{Cov}(f_*) = K_{**} - K_{*M} L\,(I + L^\top K_{MM} L)^{-1} L^\top K_{M*}
          = J_* \Sigma_M J_*^\top, \qquad \Sigma_M = (A + J_M^\top \Lambda J_M)^{-1}.

In this form nothing is divided by :math:`\Lambda`, so a datum whose class is certain (:math:`\Lambda_{cc} \to 0`)
just adds nothing; written with :math:`\Lambda^{-1}`, as usual, it has to be clipped. The second form says which
Gaussian over theta has these function values: its draws are Matheron's, a prior draw corrected in the R = M K
directions that the active data see. The mean stays the network at the mode.

With `independent_outputs` each output is a process of its own: covariances between outputs, prior and softmax, are left
out. That is E times cheaper, but no Gaussian over theta has these function values, so there are only predictions.

With all data this is the dense Laplace approximation, at a cost of P R^2 instead of P^3 and a memory of P R. With fewer
the variances are those of a posterior that saw the active data only: larger, never smaller.
Source: Immer et al. (2021a); the evidence is the marginal likelihood of the Gaussian process (Rasmussen & Williams
2006, eq. 2.30) [our reconstruction for likelihoods other than Normal].
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inference import data, hessians
from inference.backend import Run, check_integer
from inference.distributions import FlatGaussian, OutputGaussians, SpectralGaussian
from inference.jacobians import CHUNK_BYTES, assembled, chunk_size
from inference.kronecker import require_curved
from inference.laplace.base import Laplace, Notes, site_of
from inference.laplace.memory import require_memory
from inference.posterior import GaussianPosterior
from inference.taps import floats_per_datum, num_outputs, passes
from inference.target import Target

# The Jacobian, its singular vectors and the decomposition's workspace.
_MATRICES = 4


@dataclass(frozen=True, kw_only=True)
class FunctionalLaplace(Laplace):
    """Gaussian process of the network linearised at the mode, given M active data.

    Attributes:
        num_points: Number M of active data, drawn at random (a larger M with the same seed holds those of a smaller
            one); all of them from N on.
        independent_outputs: One process per output. Without draws of theta, density and evidence.
    """

    num_points: int = 300
    independent_outputs: bool = False

    curvatures: ClassVar[tuple[str, ...]] = ("ggn",)
    bias: ClassVar[str] = "exact on linear-Gaussian models with all data active; with M < N too wide, at most the prior"
    reference: ClassVar[str] = "Immer et al. 2021"

    def __post_init__(self) -> None:
        """Check the number of active data and the kind of process.

        Raises:
            ValueError: If a field is out of its range, or independent outputs are to be sampled from.
        """
        super().__post_init__()
        check_integer(self, "num_points")
        if not isinstance(self.independent_outputs, bool):
            raise ValueError(f"`independent_outputs` must be True or False, got {self.independent_outputs!r}")
        if self.independent_outputs and self.predictive == "sampled":
            raise ValueError(
                'predictive="sampled" needs draws of theta, which independent outputs do not have; use "linearized"'
            )

    @property
    def has_evidence(self) -> bool:
        """Whether there is one Gaussian over theta, whose volume gives the evidence."""
        return not self.independent_outputs

    def fit_target(self, target: Target, run: Run) -> GaussianPosterior:
        r"""Find the mode, condition on the active data, and take the evidence where all data are active.

        The evidence is :math:`\log p(D, \theta^*) - \log q(\theta^*) + \frac12 g^\top \Sigma g` with g the
        gradient at the mode: the process's marginal likelihood of the targets :math:`y - f^* + J(\theta^* - m_0)`,
        which a small distance from the mode does not change.

        Args:
            target: The tempered target.
            run: The fit in progress.

        Returns:
            The Gaussian posterior. With M < N its log evidence is that of M data, so it is left out.
        """
        posterior = super().fit_target(target, run)
        if posterior.log_evidence_or_none is not None:
            whole = self._active(target) == target.num_data
            evidence = posterior.log_evidence_or_none + 0.5 * run.info.extra["newton_decrement"]
            posterior.log_evidence_or_none = evidence if whole else None
        return posterior

    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[FlatGaussian, Notes]:
        """Condition the Gaussian process at a point on the active data.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian over theta, and what had to be left out.
        """
        prior, exact = hessians.prior_diagonal(target, theta)
        notes = [] if exact else ["the prior couples entries of theta: its curvature between them is left out"]
        require_curved(prior, site_of(target, int(prior.argmin())))
        rows = self._rows(target, theta, run) * prior.rsqrt()  # L^T J A^(-1/2), (R, P) or (E, M, P)
        _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
        run.info.extra["active_points"] = self._active(target)
        kind = OutputGaussians if self.independent_outputs else SpectralGaussian
        return kind(
            theta,
            (target.temperature / prior).sqrt().to(target.dtype),
            directions.mT.to(target.dtype).contiguous(),
            (1 / (1 + singular.square())).to(target.dtype),
        ), notes

    def _check_target(self, target: Target) -> None:
        super()._check_target(target)
        active = self._active(target)
        outputs = num_outputs(target, target.y.new_zeros(target.dim, dtype=target.dtype), target.x)
        require_memory(
            8 * _MATRICES * active * outputs * target.dim,
            f"FunctionalLaplace with {active:,} active data of {outputs} outputs and P = {target.dim:,}",
            "lower `num_points`, or use LowRankLaplace() or KroneckerLaplace()",
            target.device,
        )

    def _active(self, target: Target) -> int:
        # Models with latents per datum run on all of their data or not at all.
        return target.num_data if target.programs.traced.local_sites else min(self.num_points, target.num_data)

    def _rows(self, target: Target, theta: Tensor, run: Run) -> Tensor:
        """Rows L^T J of the active data, tempered, in float64, (R, P), or those of each output, (E, M, P)."""
        active = self._active(target)
        x = target.x
        if active < target.num_data:
            generator = torch.Generator().manual_seed(run.seed)
            chosen = torch.randperm(target.num_data, generator=generator)[:active].to(target.device)
            x = data.index(target.x, chosen)
        outputs = num_outputs(target, theta, x)
        run.count(outputs * active / target.num_data)
        floats = 4 * outputs * target.dim + floats_per_datum(target, outputs)
        found = []
        with run.bar(active, "curvature (active data)") as bar:
            for rows, taps, done in passes(target, theta, x, chunk_size(floats, theta, CHUNK_BYTES)):
                part = data.index(x, rows)
                family, jacobian = taps.family, assembled(target, theta, part, taps, done).double()
                if self.independent_outputs:
                    fisher = family.fisher(done.params).double()
                    found.append((fisher.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1) * jacobian).transpose(0, 1))
                else:
                    found.append((family.fisher_root(done.params).double().mT @ jacobian).flatten(0, 1))
                bar.advance(len(jacobian))
        return torch.cat(found, -2) / target.likelihood_temperature**0.5
