r"""What all Laplace approximations share: :math:`q(\theta) = N(\theta^*, \Lambda^{-1})` at a mode, and its evidence.

.. math::
    \Lambda = \left(H / T_l + A\right) / T, \qquad
    \log p(D) \approx \log p(D, \theta^*) + \tfrac{P}{2} \log 2\pi - \tfrac12 \log\det \Lambda

with H a curvature of the negative log likelihood summed over the data and A the prior's, both in unconstrained space
(MacKay 1992; Daxberger et al. 2021, "Laplace Redux"). Structures differ in how much of :math:`\Lambda` they keep.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from inference.backend import Backend, Run, check_integer
from inference.curvature import sampled_labels
from inference.distributions import FlatGaussian
from inference.errors import ApproximationWarning
from inference.laplace.mode import Energy, collected, energy_of, find_mode, newton, report_mode
from inference.point import MAP
from inference.posterior import GaussianPosterior
from inference.taps import Slope, few
from inference.target import Target

Notes = list[str]
"""What an approximation had to do to a curvature, in words for a warning."""

_MAX_HESSIAN_DIM = 5_000
_MAX_SAMPLED_LOSS = 0.5
_RECORDED_DATA = 256
_KEPT_BYTES = 256 * 2**20
_CHECK_DRAWS = 16


@dataclass(frozen=True, kw_only=True)
class Laplace(Backend):
    """Base of the Laplace backends.

    Attributes:
        curvature: H: "ggn" (generalised Gauss-Newton), "hessian" (exact, its negative eigenvalues set to 0; for
            P <= 5,000), "fisher" (empirical: vanishes where the data are interpolated) or "monte_carlo" (the Fisher
            with one label per datum drawn from the model: an unbiased estimate of the GGN for one gradient).
        predictive: "linearized" (the network's outputs are linear in theta around the mode) or "sampled" (the network
            itself at draws of theta, which underfits with a GGN).
        start: How the mode is reached from the starting point; None takes `init` itself as the mode.
        polish_steps: Full-data L-BFGS steps after `start`, so that the mode is one; 0 for none.
    """

    curvature: Literal["ggn", "hessian", "fisher", "monte_carlo"] = "ggn"
    predictive: Literal["linearized", "sampled"] = "linearized"
    start: MAP | None = field(default_factory=MAP)
    polish_steps: int = 200

    family: ClassVar[str] = "laplace"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_density", "log_evidence", "temperature"})
    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "hessian", "fisher", "monte_carlo")

    def __post_init__(self) -> None:
        """Check the choices and counts.

        Raises:
            ValueError: If a field is out of its range.
        """
        super().__post_init__()
        check_integer(self, "polish_steps", minimum=0)
        if self.curvature not in self.curvatures:
            names = ", ".join(f'"{name}"' for name in self.curvatures)
            raise ValueError(f"`curvature` must be one of {names}, got {self.curvature!r}")
        if self.predictive not in ("linearized", "sampled"):
            raise ValueError(f'`predictive` must be "linearized" or "sampled", got {self.predictive!r}')
        if self.start is not None and not isinstance(self.start, MAP):
            raise ValueError(f"`start` must be a MAP backend or None, got {self.start!r}")

    def fit_target(self, target: Target, run: Run) -> GaussianPosterior:
        """Find the mode, take the curvature there, check both.

        Args:
            target: The tempered target.
            run: The fit in progress.

        Returns:
            The Gaussian posterior, with a log evidence unless a temperature differs from 1 (a tempered joint density
            does not integrate to the evidence).
        """
        self._check_target(target)
        mode = find_mode(target, run, self.start, self.polish_steps)
        energy = energy_of(target, run, compared=self.start is not None)
        if self.start is None:  # the mode is not moved, and the pass of the curvature can check it
            run.slope = Slope(mode)
        gaussian, notes = self.refine(target, mode, energy, run)
        for note in notes:
            run.warn(ApproximationWarning, note)
        log_density = self.check_mode(target, gaussian, energy, run)
        untempered = target.temperature == 1 and target.likelihood_temperature == 1 and self.has_evidence
        evidence = log_density - float(gaussian.log_prob(gaussian.loc)) if untempered else None
        if self.predictive == "sampled":
            _check_sampled_predictive(target, gaussian, run)
        posterior = GaussianPosterior(
            target,
            gaussian,
            backend=self,
            info=run.info,
            log_evidence=evidence,
            linearized=self.predictive == "linearized",
        )
        posterior.curvature = run.curvature
        return posterior

    def likelihood_curvature(self, target: Target, theta: Tensor, run: Run) -> Any:
        """Take the curvature of the likelihood alone, not tempered, in the form of the backend.

        Args:
            target: The target.
            theta: Where, shape (P,).
            run: The fit in progress.

        Raises:
            NotImplementedError: Where a backend has no such form.
        """
        raise NotImplementedError

    def kept_curvature(self, target: Target, theta: Tensor, run: Run) -> Any:
        """As `likelihood_curvature`, kept for the posterior, whose prior may be chosen anew, unless it is large.

        Args:
            target: The target.
            theta: Where, shape (P,).
            run: The fit in progress.

        Returns:
            The curvature.
        """
        found = self.likelihood_curvature(target, theta, run)
        run.curvature = found if _size(found) <= _KEPT_BYTES else None
        return found

    @property
    def batch_size(self) -> int | None:
        """Data that the model is recorded for: those of a step of ``start``; without one, no pass takes all data."""
        return _RECORDED_DATA if self.start is None else self.start.batch_size

    @property
    def has_evidence(self) -> bool:
        """Whether the curvature is one whose volume approximates the evidence."""
        return True

    @abstractmethod
    def approximate(self, target: Target, theta: Tensor, run: Run) -> tuple[FlatGaussian, Notes]:
        """Take the curvature at a point.

        Args:
            target: The tempered target.
            theta: The mode, shape (P,).
            run: The fit in progress.

        Returns:
            The Gaussian, and what had to be done to the curvature to get it.
        """

    def refine(self, target: Target, theta: Tensor, energy: Energy, run: Run) -> tuple[FlatGaussian, Notes]:
        """Take the curvature at the mode, moving the mode where the curvature can tell how.

        Args:
            target: The tempered target.
            theta: The mode as found so far, shape (P,).
            energy: Log density and gradient.
            run: The fit in progress.

        Returns:
            As `approximate`; here, exactly that.
        """
        return self.approximate(target, theta, run)

    def _labels(self, target: Target, theta: Tensor, run: Run) -> Tensor:
        # Targets that a Fisher takes its gradients at: those seen, or one draw of the model for each datum.
        if self.curvature != "monte_carlo":
            return target.y
        return sampled_labels(target, theta, int(torch.randint(2**62, (), generator=run.target.stream(run.seed, 2))))

    def _check_target(self, target: Target) -> None:
        if self.curvature == "hessian" and target.dim > _MAX_HESSIAN_DIM:
            raise ValueError(
                f'curvature="hessian" costs P products with the full data and is for P <= {_MAX_HESSIAN_DIM:,}, '
                f'got P = {target.dim:,}: use curvature="ggn", or Subset(..., sites=...) for a part of the network'
            )
        if self.curvature == "ggn" or self.predictive == "linearized":
            # A likelihood without a closed form is refused before the work, not after.
            _ = target.family(few(target, target.x)).eta_names

    def check_mode(self, target: Target, gaussian: FlatGaussian, energy: Energy, run: Run) -> float:
        """Say how far from a mode the Gaussian's mean is.

        Args:
            target: The tempered target.
            gaussian: The Gaussian.
            energy: Log density and gradient.
            run: Keeps the figures, and a warning where they matter.

        Returns:
            The log density there, nats.
        """
        value, gradient = collected(target, run) or energy(gaussian.loc)
        decrement = float(gradient @ gaussian.covariance_times(gradient))
        report_mode(run, float(value), gradient, decrement, "covariance and evidence assume a mode")
        return float(value)


@dataclass(frozen=True, kw_only=True)
class NewtonLaplace(Laplace):
    """Base of the Laplace backends whose curvature is good enough to find the mode with.

    Attributes:
        newton_steps: Most Newton steps after `polish_steps`; each takes the curvature once more. They end early where
            they do not converge quadratically, as far from a mode.
    """

    newton_steps: int = 20

    def __post_init__(self) -> None:
        """Check the number of Newton steps."""
        super().__post_init__()
        check_integer(self, "newton_steps", minimum=0)

    def refine(self, target: Target, theta: Tensor, energy: Energy, run: Run) -> tuple[FlatGaussian, Notes]:
        """Newton steps from the mode found so far; the curvature returned is the one at the mode returned.

        Args:
            target: The tempered target.
            theta: The mode as found so far, shape (P,).
            energy: Log density and gradient.
            run: The fit in progress.

        Returns:
            As `approximate`.
        """
        steps = self.newton_steps if self.start is not None else 0
        return newton(theta, lambda t: self.approximate(target, t, run), energy, steps)


def _check_sampled_predictive(target: Target, gaussian: FlatGaussian, run: Run) -> None:
    # Draws from a Gaussian no longer fit where the network is far from linear within it: measured, not assumed.
    draws = gaussian.sample(_CHECK_DRAWS, run.stream(1))
    at_draws = torch.stack([target.log_likelihood(draw) for draw in draws])  # (S, N)
    mixture = (at_draws.logsumexp(0) - torch.tensor(float(_CHECK_DRAWS)).log()).mean()
    loss = float(target.log_likelihood(gaussian.loc).mean() - mixture)
    run.info.extra["sampled_loss_per_datum"] = loss
    if not loss <= _MAX_SAMPLED_LOSS:
        run.warn(
            ApproximationWarning,
            f"draws from this Gaussian fit the training data worse than the mode by {loss:.3g} nats per datum; "
            'predictive="linearized" does not have this problem',
        )


def _size(curvature: Any) -> int:
    """Bytes of the tensors in a curvature."""
    if isinstance(curvature, Tensor):
        return curvature.numel() * curvature.element_size()
    if is_dataclass(curvature):
        return sum(_size(getattr(curvature, f.name)) for f in fields(curvature))
    return sum(_size(part) for part in curvature) if isinstance(curvature, (list, tuple)) else 0


def sites_of(target: Target, entries: Tensor) -> list[str]:
    """Names of the sites that some entries of theta belong to.

    Args:
        target: The target.
        entries: Positions in theta.

    Returns:
        The names, in the order of the model.
    """
    return [s.name for s in target.sites if bool(((entries >= s.start) & (entries < s.stop)).any())]


def site_of(target: Target, index: int) -> str:
    """Name of the site an entry of theta belongs to.

    Args:
        target: The target.
        index: Position in theta.

    Returns:
        The site's name.
    """
    return next(site.name for site in target.sites if site.start <= index < site.stop)
