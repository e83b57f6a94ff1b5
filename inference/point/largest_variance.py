r"""Which weights to keep uncertain: those whose marginal variance is largest.

A subnetwork should change the predictive distribution as little as possible. With independent weights the sum of
squared Wasserstein distances is smallest for the k weights of largest variance (Daxberger et al. 2021b), which a
diagonal Laplace approximation or SWAG's diagonal estimates for the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inference.backend import Backend, Run, check_integer
from inference.point.map import MAP
from inference.posterior import GaussianPosterior
from inference.restriction import is_entrywise, matching
from inference.target import Target


@dataclass(frozen=True)
class LargestVariance:
    """The entries of theta with the largest marginal variance, for the ``sites`` of a :class:`Subset`.

    Variances are those of the unconstrained theta. Entries of different sites compete, whatever their scale; sites
    whose entries mean nothing alone (a simplex, a Cholesky factor) must be left out by ``among``.

    Attributes:
        num: Number k of entries.
        by: Backend with a Gaussian posterior over the whole theta, such as ``DiagonalLaplace()`` or
            ``SWAG(variant="diagonal")``; a Laplace approximation is made at the point that the rest stays at.
        among: Site name pattern(s) of the candidates, as in ``fnmatch``.

    Example:
        >>> from inference import DenseLaplace, DiagonalLaplace, Subset
        >>> backend = Subset(DenseLaplace(), sites=LargestVariance(100, by=DiagonalLaplace()))
        >>> backend.sites.num
        100
    """

    num: int
    by: Backend = field(kw_only=True)
    among: str | Sequence[str] = field(kw_only=True, default="*")

    def __post_init__(self) -> None:
        """Check the number and the backend.

        Raises:
            TypeError: If ``by`` is no backend.
        """
        check_integer(self, "num")
        if not isinstance(self.by, Backend):
            raise TypeError(f"`by` must be a backend such as DiagonalLaplace(), got {self.by!r}")

    def check(self, target: Target) -> None:
        """Refuse before any work what cannot be chosen.

        Args:
            target: Target over all sites.

        Raises:
            ValueError: If a pattern matches nothing, a candidate site cannot be split, or there are too few entries.
        """
        sites = matching(target.all_sites, self.among)
        whole = [site.name for site in sites if not is_entrywise(site)]
        if whole:
            raise ValueError(
                f"entries of site {whole[0]!r} mean nothing alone, so it cannot be split; leave it out with `among`"
            )
        total = sum(site.size for site in sites)
        if self.num > total:
            raise ValueError(f"`num` must be at most the number of candidates, {total}, got {self.num}")

    def choose(self, target: Target, at: Tensor, run: Run) -> Tensor:
        """Fit ``by`` and take the entries of largest variance.

        Args:
            target: Target over all sites, untempered.
            at: The point estimate, (full P,).
            run: The fit in progress, which counts the cost.

        Returns:
            Positions in theta, ascending, (k,).

        Raises:
            TypeError: If ``by`` does not give a Gaussian.
        """
        changes: dict[str, Any] = {"start": None} if isinstance(getattr(self.by, "start", None), MAP) else {}
        by = replace(self.by, **changes)
        tempered = target.tempered(by.temperature, by.likelihood_temperature)
        posterior = by.fit_target(tempered, run.sub(by, at, target=tempered, offset=2))
        if not isinstance(posterior, GaussianPosterior):
            raise TypeError(
                f"`by` must give a Gaussian, whose variances are compared; {type(by).__name__} gives {posterior.kind}: "
                "use DiagonalLaplace() or SWAG()"
            )
        candidates = torch.cat([torch.arange(s.start, s.stop) for s in matching(target.all_sites, self.among)])
        candidates = candidates.to(at.device)
        variances = posterior.gaussian.variance[candidates]
        # Stable, so that equal variances (weights without data, say) are taken in the order of the model.
        order = variances.argsort(descending=True, stable=True)[: self.num]
        return candidates[order].sort().values
