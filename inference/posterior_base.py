"""What every posterior can do, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from inference.backend import FitInfo
from inference.data import num_data
from inference.errors import CapabilityError
from inference.guide import run_as_guide
from inference.links import Link, refuse_link
from inference.prediction import DrawSource, Prediction
from inference.target import Target, check_new_inputs

if TYPE_CHECKING:
    import arviz as az

    from inference.diagnosis import Diagnosis

_LAPLACE = "DenseLaplace, DiagonalLaplace, KroneckerLaplace, LowRankLaplace"
_WITH_DENSITY = f"MeanFieldVI, Pathfinder, {_LAPLACE}, FunctionalLaplace and SWAG"
_WITH_EVIDENCE = f"{_LAPLACE} and FunctionalLaplace (and MeanFieldVI, Pathfinder and PyroGuideVI as a lower bound)"


class Posterior(ABC):
    """A distribution over theta, tied to the model and data it came from.

    Attributes:
        target: The compiled model with its training data.
        backend: The backend that made it (its ``repr`` re-creates it).
        info: Cost and warnings of the fit.
        log_evidence_or_none: Log evidence in nats where the method has one.
    """

    kind: ClassVar[str]
    complete: ClassVar[bool] = True
    """Whether thetas are known as a whole, not only some of their sites."""

    def __init__(
        self, target: Target, *, backend: Any, info: FitInfo | None = None, log_evidence: float | None = None
    ) -> None:
        self.target = target
        self.backend = backend
        self.info = info or FitInfo()
        self.log_evidence_or_none = log_evidence

    def __repr__(self) -> str:
        return f"{type(self).__name__}(backend={self.backend!r}, P={self.target.dim}, N={self.target.num_data})"

    @property
    def backend_name(self) -> str:
        """Class name of the backend, also after loading."""
        return getattr(self.backend, "name", type(self.backend).__name__)

    # -- draws -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draw theta.

        Args:
            num_samples: Number of draws S.
            seed: Random seed.

        Returns:
            (S, P), unconstrained.
        """

    @property
    @abstractmethod
    def mean_theta(self) -> Tensor:
        """Posterior mean of theta, (P,)."""

    @property
    def draws(self) -> Tensor:
        """Draws with their chains, (C, S, P).

        Raises:
            CapabilityError: If this posterior is not made of draws.
        """
        raise CapabilityError(
            f"{self.backend_name} gives {self.kind}, which has no chains; call `.sample(num_samples)`, or fit with "
            "NUTS, HMC, DeepEnsemble or SVGD"
        )

    def sample_sites(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw the latent sites.

        Args:
            num_samples: Number of draws S.
            seed: Random seed.

        Returns:
            Constrained values by site name, each (S, *site shape).
        """
        return self.target.unravel(self.sample(num_samples, seed))

    # -- densities ---------------------------------------------------------------------------------------------------

    @property
    def has_log_density(self) -> bool:
        """Whether :meth:`log_density` is available."""
        return False

    def log_density(self, theta: Tensor) -> Tensor:
        """Normalised log density of this approximation in nats, (..., P) to (...).

        Args:
            theta: (..., P).

        Raises:
            CapabilityError: If the approximation has no density.
        """
        raise CapabilityError(f"{self.backend_name} gives {self.kind}, which have no density; {_WITH_DENSITY} have one")

    @property
    def log_evidence(self) -> float:
        """Log evidence (marginal likelihood) of the data, or its bound, in nats.

        Raises:
            CapabilityError: If the method gives none.
        """
        if self.log_evidence_or_none is None:
            raise CapabilityError(f"{self.backend_name} gives no log evidence; {_WITH_EVIDENCE} do")
        return self.log_evidence_or_none

    # -- predictions and reports ---------------------------------------------------------------------------------------

    def predict(
        self,
        x: Any,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        link: Link = "monte_carlo",
    ) -> Prediction:
        """Predictive distribution at new inputs, noise included.

        Args:
            x: Inputs like those the posterior was fitted to, every leaf (N, ...).
            num_samples: Number of mixture components S; None: all draws there are, or 200 for a continuous posterior.
            seed: Random seed.
            chunk_size: Draws that advance together; None: sized for the cache.
            link: How class probabilities are averaged; anything but "monte_carlo" is for linearised posteriors.

        Returns:
            The prediction.

        Raises:
            CapabilityError: If the posterior has no such link.
            ValueError: If x does not fit the model, or an argument is out of range.
        """
        refuse_link(link, self.backend_name, self.kind)
        x = check_new_inputs(self.target, x)
        if num_samples is not None:
            check_count(num_samples)
        thetas, weights = self.components(num_samples, seed)
        return Prediction(DrawSource(self.target, thetas, weights, x, chunk_size), num_data(x), seed)

    def function_covariance(self, x: Any) -> Tensor:
        """Joint covariance of the latent function at several inputs, (N, K, N, K), of a linearised posterior.

        Args:
            x: Inputs, every leaf (N, ...).

        Raises:
            CapabilityError: Here: posteriors of draws have none in closed form.
        """
        raise CapabilityError(
            f"{self.backend_name} gives {self.kind}, which has no covariance of the function in closed form; "
            "`predict(x).component_functions()` gives draws of it, and "
            f'{_LAPLACE} and FunctionalLaplace with predictive="linearized" have one'
        )

    def components(self, num_samples: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws and weights for a mixture.

        Args:
            num_samples: Number of components; None for the posterior's own choice.
            seed: Random seed.

        Returns:
            Thetas (S, P) and weights (S,) that sum to one.
        """
        thetas = self.sample(num_samples or 200, seed)
        return thetas, thetas.new_full((thetas.shape[0],), 1 / thetas.shape[0])

    def diagnose(self, x: Any = None, *, align: bool = False, superchains: Any = None) -> Diagnosis:
        """Is the fit to be trusted? R-hat, ESS, MCSE of weights and functions, energies, divergences, k-hat.

        Args:
            x: Probe inputs for the function space; up to 200 training inputs by default.
            align: Also compare the weights after hidden units were matched between draws.
            superchains: Number K of superchains, or the superchain of each chain, for nested R-hat; None groups 16
                chains and more.

        Returns:
            Figures and warnings; printable.
        """
        from inference.diagnosis import diagnose

        return diagnose(self, x, align=align, superchains=superchains)

    def to_arviz(self, *, weights: bool = True, num_samples: int | None = None, seed: int = 0) -> az.InferenceData:
        """Convert to ArviZ.

        Args:
            weights: Include the latent sites (leave out for large networks).
            num_samples: Draws of a continuous posterior (default 1000); chains keep all of theirs.
            seed: Random seed.

        Returns:
            Groups posterior, posterior_predictive, prior, log_likelihood, observed_data and sample_stats.
        """
        from inference.arviz_export import to_inference_data

        return to_inference_data(self, weights=weights, num_samples=num_samples, seed=seed)

    def save(self, path: str | Path, *, overwrite: bool = False, data: bool = True) -> None:
        """Save to a directory, without pickles; a save that is interrupted leaves an older one readable.

        Args:
            path: Directory.
            overwrite: Allow replacing a posterior that is there already.
            data: Also store the training data, so that ``inference.load(path, model)`` needs nothing else.
        """
        from inference.storage import save

        save(self, Path(path), overwrite=overwrite, data=data)

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-serialisable figures and tensors that re-create this posterior, for :mod:`inference.storage`."""

    @classmethod
    @abstractmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""

    # -- starting point of another fit -------------------------------------------------------------------------------

    def starting_points(self, num: int, seed: int, expected: list[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Full thetas from which another backend may start.

        Args:
            num: Number of points C.
            seed: Random seed.
            expected: Name and shape of every site of the other model.

        Returns:
            (C, full P): distinct draws where there are any, the same point otherwise.

        Raises:
            ValueError: If this posterior belongs to another model.
        """
        own = [(s.name, s.shape) for s in self.target.all_sites]
        for mine, other in zip(own, expected, strict=False):
            if mine != other:
                raise ValueError(
                    f"`init` belongs to another model: its site {mine[0]!r} has shape {mine[1]}, where this model has "
                    f"{other[0]!r} with shape {other[1]}"
                )
        if len(own) != len(expected):
            raise ValueError(f"`init` belongs to another model: it has {len(own)} sites, this model {len(expected)}")
        return self.target.expand(self._starts(num, seed))

    def _starts(self, num: int, seed: int) -> Tensor:
        return self.sample(num, seed)

    # -- Pyro guide --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Act as a Pyro guide: sample one flat auxiliary site and unpack it into the model's latent sites."""
        return run_as_guide(self)


def check_count(num_samples: Any) -> None:
    """Raise unless a number of draws is an integer >= 1."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}")
