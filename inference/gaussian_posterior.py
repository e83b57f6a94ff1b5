"""A Gaussian over theta, predicted with by the network linearised at its mean or by draws of the network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inference.backend import FitInfo
from inference.data import num_data
from inference.distributions import FlatGaussian, gaussian_from_tensors
from inference.jacobians import linearized_joint
from inference.linearised import LinearisedSource
from inference.links import Link, LinkedPrediction, check_link
from inference.mixtures import location
from inference.posterior_base import Posterior, check_count
from inference.prediction import Prediction
from inference.target import Target, check_new_inputs, random_stream


class GaussianPosterior(Posterior):
    """A Gaussian over theta.

    Args:
        target: The compiled model.
        gaussian: The distribution.
        backend: The backend that made it.
        info: Cost and warnings.
        log_evidence: Nats, where there is one.
        linearized: Predict with the network linearised at the mean instead of with draws of the network.

    Attributes:
        curvature: What a Laplace backend took at the mode, for choosing the prior anew; None where it is large, or the
            posterior was loaded.
    """

    kind = "a Gaussian"

    def __init__(
        self,
        target: Target,
        gaussian: FlatGaussian,
        *,
        backend: Any,
        info: FitInfo | None = None,
        log_evidence: float | None = None,
        linearized: bool = False,
    ) -> None:
        super().__init__(target, backend=backend, info=info, log_evidence=log_evidence)
        if gaussian.loc.shape != (target.dim,):
            raise ValueError(f"the Gaussian must have {target.dim} dimensions, got {tuple(gaussian.loc.shape)}")
        self.gaussian = gaussian
        self.linearized = linearized
        self.curvature: Any = None

    @property
    def mean_theta(self) -> Tensor:
        """Mean, (P,)."""
        return self.gaussian.loc

    @property
    def has_log_density(self) -> bool:
        """Whether :meth:`log_density` is available."""
        return self.gaussian.over_theta

    def log_density(self, theta: Tensor) -> Tensor:
        """Normalised log density of the Gaussian.

        Args:
            theta: (..., P).

        Returns:
            (...) nats.
        """
        return self.gaussian.log_prob(theta)

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draw theta.

        Args:
            num_samples: Number of draws S.
            seed: Random seed.

        Returns:
            (S, P).
        """
        check_count(num_samples)
        return self.gaussian.sample(num_samples, random_stream(seed, 0, self.gaussian.loc.device))

    def predict(
        self,
        x: Any,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        link: Link = "monte_carlo",
    ) -> Prediction:
        """Predictive distribution; exact moments of the linearised network where ``linearized``.

        Of a linearised network, moments of y and f carry gradients with respect to x where x requires them.

        Args:
            x: Inputs, every leaf (N, ...).
            num_samples: Number of mixture components S.
            seed: Random seed.
            chunk_size: Draws that advance together.
            link: Class probabilities of a linearised network: "monte_carlo" (an average over draws of the logits),
                "probit", "laplace_bridge" or "laplace_bridge_norm" (closed forms, without draws); see
                :mod:`inference.links`.

        Returns:
            The prediction.

        Raises:
            CapabilityError: If a link other than "monte_carlo" is asked of a posterior that is not linearised, or of
                targets that are not class labels.
            ValueError: If x does not fit the model, or an argument is out of range.

        Example:
            One step up the expected improvement over the best y so far, as in Bayesian optimisation:

            >>> import pyro, pyro.distributions as dist
            >>> from inference import DenseLaplace
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("y", dist.Normal(torch.sin(x[:, 0] * w[0]) * w[1], 0.1), obs=y)
            >>> x = torch.tensor([[-1.0], [0.0], [0.5]]); y = torch.tensor([-0.8, 0.1, 0.5])
            >>> posterior = DenseLaplace().fit(model, x, y)
            >>> def improvement(x):
            ...     found = posterior.predict(x)
            ...     spread = found.f_variance.sqrt()
            ...     z = (found.f_mean - y.max()) / spread
            ...     return spread * (z * torch.special.ndtr(z) + torch.exp(-z**2 / 2) / (2 * torch.pi) ** 0.5)
            >>> start = torch.tensor([[0.6]], requires_grad=True)
            >>> before = improvement(start)
            >>> (slope,) = torch.autograd.grad(before.sum(), start)
            >>> bool(improvement(start.detach() + 0.05 * slope.sign()) > before)
            True
        """
        check_link(link)
        if not self.linearized:
            return super().predict(x, num_samples=num_samples, seed=seed, chunk_size=chunk_size, link=link)
        x = check_new_inputs(self.target, x)
        if num_samples is not None:
            check_count(num_samples)
        if link != "monte_carlo":
            if num_samples is not None:
                raise ValueError(f'`num_samples` is for link="monte_carlo": link="{link}" draws nothing')
            return LinkedPrediction(self.target, self.gaussian, x, link, seed)
        source = LinearisedSource(self.target, self.gaussian, x, num_samples=num_samples or 500, seed=seed)
        return Prediction(source, num_data(x), seed)

    def function_covariance(self, x: Any) -> Tensor:
        r"""Joint covariance :math:`J_X \Sigma J_X^\top` of the linearised latent function at several inputs.

        f is the likelihood's location (loc, log rate, logits as it holds them: a Categorical normalises them), without
        noise. No P x P matrix is formed: layers are contracted with a diagonal or Kronecker covariance, and any other
        structure holds the Jacobian, N K P numbers.
        It carries a gradient with respect to x where x requires one.

        Args:
            x: Inputs, every leaf (N, ...).

        Returns:
            (N, K, N, K) for K entries of f per input: variances, in squared units of f.

        Raises:
            CapabilityError: If the posterior is not linearised.
        """
        if not self.linearized:
            return super().function_covariance(x)
        x = check_new_inputs(self.target, x)
        theta = self.gaussian.loc
        with torch.no_grad():
            params = self.target.parameters(theta, x)
        family = self.target.family(x)
        size = math.prod(location(family, {k: v.unsqueeze(0) for k, v in params.items()}).shape[2:])
        if not {"loc", "logits", "rate"} & set(family.eta_names):  # only the noise depends on theta
            return theta.new_zeros(num_data(x), size, num_data(x), size)
        return linearized_joint(self.target, self.gaussian, theta, x)[1][:, :size, :, :size]

    def _starts(self, num: int, seed: int) -> Tensor:
        return self.gaussian.loc.expand(1, -1) if num == 1 else self.sample(num, seed)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The Gaussian's own tensors."""
        return {"gaussian": type(self.gaussian).__name__, "linearized": self.linearized}, self.gaussian.tensors()

    @classmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""
        gaussian = gaussian_from_tensors(figures["gaussian"], tensors)
        return cls(target, gaussian, linearized=figures["linearized"], **common)
