r"""Draws of a network that is linear in its weights: predictions :math:`f(x, \theta^*) \pm J(x) z_j`.

Draws come in pairs that mirror each other at :math:`\theta^*`, so that the mean prediction is that of the network
there and a variance is the mean of :math:`(J z_j)^2`. Predictions are made by forward-mode products; neither a Jacobian
nor a covariance is formed. A variance from k pairs has the relative error :math:`\sqrt{2/k}`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference.backend import FitInfo
from inference.chunking import rows_per_chunk
from inference.data import Tree, index, num_data
from inference.linear_model import MAX_PREDICTED, LinearModel
from inference.links import Link, refuse_link
from inference.mixtures import Moments, Params, mixture_moments
from inference.posterior import DrawsPosterior
from inference.posterior_base import Posterior, check_count
from inference.prediction import Prediction
from inference.target import Target, check_new_inputs


class LinearisedDrawsPosterior(DrawsPosterior):
    """A linearisation point and draws around it.

    Args:
        target: The compiled model.
        center: Linearisation point, (P,).
        deviations: Draws z around it, (k, P); each is used with both signs.
        backend: The backend that made it.
        info: Cost and warnings.
        prior_precision: Prior precision of every entry that the draws belong to, (P,).
        noise_factor: Factor of the declared noise variance of a Normal likelihood.
        learnt: Names of the sites whose prior precision is not the declared one.

    Raises:
        ValueError: If shapes disagree.
    """

    kind = "draws"

    def __init__(
        self,
        target: Target,
        center: Tensor,
        deviations: Tensor,
        *,
        backend: Any,
        info: FitInfo | None = None,
        prior_precision: Tensor,
        noise_factor: float = 1.0,
        learnt: tuple[str, ...] = (),
        log_evidence: float | None = None,
    ) -> None:
        if deviations.dim() != 2 or deviations.shape[1:] != center.shape:
            raise ValueError(
                f"deviations must have shape (draws, {len(center)}), like the center, got {tuple(deviations.shape)}"
            )
        pairs = torch.stack([center + deviations, center - deviations], 1)  # (k, 2, P)
        super().__init__(target, pairs.flatten(0, 1)[None], backend=backend, info=info, log_evidence=log_evidence)
        self.center, self.deviations = center.detach(), deviations.detach()
        self.prior_precision, self.noise_factor, self.learnt = prior_precision, noise_factor, learnt

    @property
    def mean_theta(self) -> Tensor:
        """The linearisation point, (P,)."""
        return self.center

    def determined_parameters(self) -> tuple[float, float]:
        r"""Number of parameters that the draws say the data determine, :math:`P - \tfrac1k \sum_j z_j^\top A z_j`.

        Zero for draws of the prior, and never less but for Monte-Carlo error where the draws solve their systems.

        Returns:
            The number, and its standard error where the data determine little, :math:`\sqrt{2 P / k}`.
        """
        num, dim = self.deviations.shape
        squares = (self.deviations.double().square() * self.prior_precision.double()).sum(-1)
        return dim - float(squares.mean()) / self.target.temperature, (2 * dim / num) ** 0.5

    def prior_scales(self) -> dict[str, Tensor]:
        """Standard deviations of the Gaussian priors that were learnt, from which a model can be declared anew.

        With ``bnn_models``: ``priors.Normal(scale={name: float(scale.mean()), ..., "*": 1.0})``; in a model written by
        hand: ``dist.Normal(0.0, scale)``, of the shape of the site.

        Returns:
            By site, (*site shape).
        """
        scales = self.prior_precision.rsqrt()
        return {s.name: scales[s.start : s.stop].reshape(s.shape) for s in self.target.sites if s.name in self.learnt}

    def components(self, num_samples: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws with equal weights, pairs together.

        Args:
            num_samples: The first so many; None for all.
            seed: Not used: nothing is random here.

        Returns:
            Thetas (S, P) and weights (S,).
        """
        if num_samples is not None:
            check_count(num_samples)
        total = self.flat_draws.shape[0]
        places = torch.arange(num_samples or total, device=self.target.device) % total
        thetas = self.flat_draws.to(self.target.device)[places]
        return thetas, thetas.new_full((len(thetas),), 1 / len(thetas))

    def predict(
        self,
        x: Any,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        link: Link = "monte_carlo",
    ) -> Prediction:
        """Predictive distribution of the linearised network at new inputs, noise included.

        Args:
            x: Inputs, every leaf (N, ...).
            num_samples: Number of mixture components S; None for all 2 k.
            seed: Random seed of what is drawn from the prediction.
            chunk_size: Not used: draws advance together.
            link: "monte_carlo"; there is no other for draws.

        Returns:
            The prediction.
        """
        refuse_link(link, self.backend_name, self.kind)
        x = check_new_inputs(self.target, x)
        return Prediction(self.source(x, num_samples), num_data(x), seed)

    def source(self, x: Tree, num_samples: int | None = None, thetas: Tensor | None = None) -> LinearisedProducts:
        """Mixture components of the linearised network.

        Args:
            x: Inputs, every leaf (N, ...).
            num_samples: Number of components S; None for all, in the order of `draws`.
            thetas: Weights to take instead, (S, P).

        Returns:
            The components.
        """
        if num_samples is None and thetas is None:
            return LinearisedProducts(self.target, self.center, self.deviations, x, self.noise_factor, mirrored=True)
        thetas = self.components(num_samples)[0] if thetas is None else thetas
        return LinearisedProducts(self.target, self.center, thetas - self.center, x, self.noise_factor)

    def _starts(self, num: int, seed: int) -> Tensor:
        return self.center.expand(1, -1) if num == 1 else self.sample(num, seed)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Linearisation point, draws around it, and the prior that they belong to."""
        figures = {"noise_factor": self.noise_factor, "learnt": list(self.learnt)}
        held = {"center": self.center, "deviations": self.deviations, "prior_precision": self.prior_precision}
        return figures, held

    @classmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""
        return cls(
            target,
            tensors["center"],
            tensors["deviations"],
            prior_precision=tensors["prior_precision"],
            noise_factor=figures["noise_factor"],
            learnt=tuple(figures["learnt"]),
            **common,
        )


class LinearisedProducts:
    """Mixture components of a linearised network at draws of its weights, by forward-mode products.

    Args:
        target: The model.
        center: Linearisation point, (P,).
        deviations: Draws around it, (k, P).
        x: Inputs, every leaf (N, ...).
        noise_factor: Factor of the noise variance of a Normal likelihood.
        mirrored: Use every draw with both signs: 2 k components, pairs together.
    """

    def __init__(
        self,
        target: Target,
        center: Tensor,
        deviations: Tensor,
        x: Tree,
        noise_factor: float = 1.0,
        *,
        mirrored: bool = False,
    ) -> None:
        self._deviations, self._mirrored = deviations.contiguous(), mirrored
        self._noise = noise_factor**0.5
        self._model = LinearModel(target, center, len(deviations), x=x)
        self.family = self._model.family
        size = len(deviations) * (2 if mirrored else 1)
        self.weights = center.new_full((size,), 1 / size)
        first = index(self._model.params, slice(0, 1))
        self.rows = rows_per_chunk(min(num_data(x), MAX_PREDICTED, self._model.rows), size, first)

    def params(self, rows: slice) -> Params:
        """Parameters of every component at some inputs, each (S, n, ...)."""
        moved = self._model.push(self._deviations, rows)  # (k, n, E)
        if self._mirrored:
            moved = torch.stack([moved, -moved], 1).flatten(0, 1)
        base = index(self._model.params, rows)
        found = self.family.from_eta(self._model.eta[rows] + moved, base)
        if self._noise != 1:
            found["scale"] = found["scale"] * self._noise
        return found

    def moments(self, rows: slice, params: Params) -> Moments:
        """Moments by the law of total variance over the draws."""
        return mixture_moments(self.family, params, self.weights)
