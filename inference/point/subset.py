r"""Part of the network: any backend on some sites, the rest fixed at a point estimate.

The target is restricted, :math:`p(\theta_A \mid \theta_B = \hat\theta_B, D)`, and nothing else changes. What is fixed
adds no uncertainty, so variances are those of the conditional, not of the marginal (Daxberger et al. 2021b; Kristiadi
et al. 2020 for the last layer). A log evidence is conditional on the fixed values and includes their prior density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from inference.backend import Backend, Run
from inference.point.largest_variance import LargestVariance
from inference.point.map import MAP
from inference.posterior import Posterior
from inference.restriction import matching, restrict_to_entries
from inference.target import Target


@dataclass(frozen=True)
class Subset(Backend):
    """A backend restricted to the sites that match a pattern, or to single entries of theta.

    Attributes:
        backend: The backend to run on the chosen sites.
        sites: Site name pattern(s), as in ``fnmatch``: "layers.2.*"; or ``LargestVariance(k, by=...)`` for the k
            entries of theta of largest marginal variance, wherever they are.
        rest: Point estimate that supplies the other sites; None takes ``init`` as it is.
    """

    backend: Backend
    sites: str | Sequence[str] | LargestVariance = field(kw_only=True)
    rest: Backend | None = field(kw_only=True, default_factory=MAP)

    family: ClassVar[str] = "point"
    bias: ClassVar[str] = "that of the inner backend; sites outside the subset have no uncertainty"
    reference: ClassVar[str] = "Daxberger et al. 2021b"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.backend, Backend):
            raise TypeError(f"`backend` must be a backend such as NUTS(), got {self.backend!r}")
        if self.rest is not None and not isinstance(self.rest, Backend):
            raise TypeError(f"`rest` must be a backend such as MAP(), or None, got {self.rest!r}")
        if isinstance(self.sites, LargestVariance):
            return
        patterns = [self.sites] if isinstance(self.sites, str) else list(self.sites)
        if not patterns or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"`sites` must be one or more site name patterns, got {self.sites!r}")

    @property
    def batch_size(self) -> int | None:
        """Data that the model is recorded for: those of a step of ``rest``, or of the backend where there is none."""
        return getattr(self.backend if self.rest is None else self.rest, "batch_size", None)

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Find the point, restrict the target, run the inner backend there.

        Args:
            target: Target over all sites.
            run: The run.

        Returns:
            Posterior over the chosen sites; its ``sample_sites`` and ``predict`` fill in the rest.

        Raises:
            ValueError: If neither ``rest`` nor ``init`` gives a point.
        """
        if isinstance(self.sites, LargestVariance):
            self.sites.check(target)
        else:
            matching(target.all_sites, self.sites)  # an unknown pattern fails before any work
        if self.rest is None:
            if run.init is None and not target.initial_sites:
                raise ValueError("Subset(rest=None) takes the fixed sites from `init`, but none was given")
            at = target.initial(1, run.seed, run.init)[0]
        else:
            rest = target.tempered(self.rest.temperature, self.rest.likelihood_temperature)
            at = self.rest.fit_target(rest, run.sub(self.rest, run.init, target=rest)).mean_theta
        if isinstance(self.sites, LargestVariance):
            restricted = restrict_to_entries(target, self.sites.choose(target, at, run), at)
        else:
            restricted = target.restrict(self.sites, at)
        restricted = restricted.tempered(self.backend.temperature, self.backend.likelihood_temperature)
        # Members that all start at the point would stay together.
        init = None if self.backend.family in ("ensembles", "particles") else restricted.reduce(at)
        inner = run.sub(self.backend, init, target=restricted, offset=0)
        posterior = self.backend.fit_target(restricted, inner)
        posterior.backend = self
        return posterior
