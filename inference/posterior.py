"""What every backend returns: weighted draws, a flat Gaussian, or a mixture of those; each is also a Pyro guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inference.backend import FitInfo
from inference.gaussian_posterior import GaussianPosterior
from inference.posterior_base import Posterior, check_count
from inference.target import Target, random_stream

__all__ = ["POSTERIORS", "DrawsPosterior", "GaussianPosterior", "MixturePosterior", "Posterior"]


class DrawsPosterior(Posterior):
    """Weighted draws, with their chains.

    Args:
        target: The compiled model.
        draws: (C, S, P), unconstrained.
        backend: The backend that made it.
        info: Cost and warnings.
        weights: (C, S), normalised here; None: equal.
        sample_stats: Per-draw statistics under ArviZ's names, each (C, S).
        probe_values: The latent function of each draw at inputs chosen before the fit, (C, S, N, ...).
        log_evidence: Nats, where there is one.

    Raises:
        ValueError: If shapes disagree, or weights are negative or sum to nothing.
    """

    kind = "draws"

    def __init__(
        self,
        target: Target,
        draws: Tensor,
        *,
        backend: Any,
        info: FitInfo | None = None,
        weights: Tensor | None = None,
        sample_stats: dict[str, Tensor] | None = None,
        probe_values: Tensor | None = None,
        log_evidence: float | None = None,
    ) -> None:
        super().__init__(target, backend=backend, info=info, log_evidence=log_evidence)
        if draws.dim() != 3 or draws.shape[-1] != self._row_size():
            raise ValueError(f"draws must have shape (chains, draws, {self._row_size()}), got {tuple(draws.shape)}")
        if draws.shape[0] * draws.shape[1] == 0:
            raise ValueError(f"a posterior needs at least one draw, got shape {tuple(draws.shape)}")
        self._draws = draws.detach()
        if weights is None:
            weights = torch.ones(draws.shape[:2], dtype=torch.float64, device=draws.device)
        elif weights.numel() != draws.shape[0] * draws.shape[1]:
            raise ValueError(f"weights must have shape {tuple(draws.shape[:2])}, got {tuple(weights.shape)}")
        self.weights = _normalised(weights).reshape(draws.shape[:2]).to(draws.dtype)
        self.sample_stats = sample_stats or {}
        self.probe_values = probe_values

    def _row_size(self) -> int:
        return self.target.dim

    @property
    def draws(self) -> Tensor:
        """Draws with their chains, (C, S, P)."""
        return self._draws

    @property
    def equally_weighted(self) -> bool:
        """Whether all draws count the same."""
        return bool((self.weights == self.weights[0, 0]).all())

    @property
    def flat_draws(self) -> Tensor:
        """Draws of all chains, (C * S, P)."""
        return self._draws.reshape(-1, self._draws.shape[-1])

    @property
    def mean_theta(self) -> Tensor:
        """Weighted mean of the draws, (P,)."""
        return torch.tensordot(self.weights.reshape(-1), self.flat_draws, dims=1)

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Resample draws with their weights.

        Args:
            num_samples: Number of draws S; without replacement where weights are equal and there are enough.
            seed: Random seed.

        Returns:
            (S, P).
        """
        check_count(num_samples)
        weights = self.weights.reshape(-1)
        generator = random_stream(seed, 0, weights.device)
        if self.equally_weighted and num_samples <= len(weights):
            chosen = torch.randperm(len(weights), generator=generator, device=weights.device)[:num_samples]
        else:
            chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        return self._rows(chosen)

    def components(self, num_samples: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """All draws with their weights, or ``num_samples`` spread evenly along the chains.

        A subset is taken by systematic resampling, so that each draw appears in proportion to its weight.

        Args:
            num_samples: Number of components; None for all.
            seed: Not used: nothing is random here.

        Returns:
            Thetas (S, P) and weights (S,).
        """
        weights = self.weights.reshape(-1)
        total, device = len(weights), self.target.device
        if num_samples is None or num_samples == total:
            return self.flat_draws.to(device), weights.to(device)
        check_count(num_samples)
        places = torch.arange(num_samples, device=weights.device)
        if self.equally_weighted:
            chosen = (2 * places + 1) * total // (2 * num_samples)
        else:
            ends = weights.double().cumsum(0)
            chosen = torch.searchsorted(ends, (places + 0.5) / num_samples * ends[-1])
        thetas = self._rows(chosen)
        return thetas, thetas.new_full((num_samples,), 1 / num_samples)

    def _rows(self, chosen: Tensor) -> Tensor:
        """Draws by their number among all chains: only these are read where draws are on disk, (n, P)."""
        length = self._draws.shape[1]
        return self._draws[chosen // length, chosen % length].to(self.target.device)

    def _starts(self, num: int, seed: int) -> Tensor:
        total = self.weights.numel()
        if self.equally_weighted and total <= num:  # each once before any is taken again
            return self._rows(torch.arange(num, device=self.weights.device) % total)
        return self.sample(num, seed)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Draws, weights and sample statistics."""
        stats = {f"stat.{k}": torch.as_tensor(v) for k, v in self.sample_stats.items()}
        probes = {} if self.probe_values is None else {"probes": self.probe_values}
        return {}, {"draws": self._draws, "weights": self.weights, **stats, **probes}

    @classmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""
        stats = {k.removeprefix("stat."): v for k, v in tensors.items() if k.startswith("stat.")}
        made = cls(target, tensors["draws"], sample_stats=stats, probe_values=tensors.get("probes"), **common)
        made.weights = tensors["weights"]  # as they were, not normalised a second time
        return made


class MixturePosterior(Posterior):
    """A mixture of Gaussians or draws, such as several SWAG runs.

    Args:
        target: The compiled model.
        components: The parts.
        backend: The backend that made it.
        info: Cost and warnings.
        weights: One per part, normalised here; None: equal.
        log_evidence: Nats, where there is one.

    Raises:
        ValueError: If there is no part, or parts or weights do not fit.
    """

    kind = "a mixture"

    def __init__(
        self,
        target: Target,
        components: Sequence[Posterior],
        *,
        backend: Any,
        info: FitInfo | None = None,
        weights: Tensor | None = None,
        log_evidence: float | None = None,
    ) -> None:
        super().__init__(target, backend=backend, info=info, log_evidence=log_evidence)
        if not components:
            raise ValueError("a mixture needs at least one component")
        self.parts = tuple(components)
        if any(part.target.dim != target.dim for part in self.parts):
            raise ValueError(f"all parts must have {target.dim} dimensions, got {[p.target.dim for p in self.parts]}")
        flat = torch.ones(len(self.parts), device=target.device) if weights is None else weights
        if flat.shape != (len(self.parts),):
            raise ValueError(f"weights must have shape ({len(self.parts)},), got {tuple(flat.shape)}")
        self.weights = _normalised(flat).to(target.dtype)

    @property
    def mean_theta(self) -> Tensor:
        """Mean of the mixture, (P,)."""
        return torch.tensordot(self.weights, torch.stack([p.mean_theta for p in self.parts]), dims=1)

    @property
    def has_log_density(self) -> bool:
        """Whether every part has a density."""
        return all(p.has_log_density for p in self.parts)

    def log_density(self, theta: Tensor) -> Tensor:
        """Normalised log density of the mixture.

        Args:
            theta: (..., P).

        Returns:
            (...) nats.
        """
        parts = torch.stack([p.log_density(theta) for p in self.parts])
        return torch.logsumexp(parts + self.weights.log().reshape((-1,) + (1,) * (parts.dim() - 1)), 0)

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draw theta: the parts take turns in proportion to their weights.

        Args:
            num_samples: Number of draws S.
            seed: Random seed.

        Returns:
            (S, P).
        """
        check_count(num_samples)
        generator = random_stream(seed, 0)
        chosen = torch.multinomial(self.weights.cpu(), num_samples, replacement=True, generator=generator)
        counts = torch.bincount(chosen, minlength=len(self.parts)).tolist()
        seeds = torch.randint(2**31, (len(self.parts),), generator=generator).tolist()
        pieces = [p.sample(c, s) for p, c, s in zip(self.parts, counts, seeds, strict=True) if c]
        thetas = torch.cat(pieces)
        return thetas[torch.randperm(num_samples, generator=generator).to(thetas.device)]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """States of all parts."""
        figures: dict[str, Any] = {"parts": []}
        tensors: dict[str, Tensor] = {"weights": self.weights}
        for i, part in enumerate(self.parts):
            own, held = part.state()
            figures["parts"].append({
                "class": type(part).__name__,
                "figures": own,
                "log_evidence": part.log_evidence_or_none,
            })
            tensors.update({f"part{i}.{k}": v for k, v in held.items()})
        return figures, tensors

    @classmethod
    def from_state(
        cls, target: Target, figures: dict[str, Any], tensors: dict[str, Tensor], **common: Any
    ) -> Posterior:
        """Undo :meth:`state`."""
        parts = []
        for i, part in enumerate(figures["parts"]):
            prefix = f"part{i}."
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            kind = POSTERIORS[part["class"]]
            parts.append(
                kind.from_state(
                    target, part["figures"], held, backend=common["backend"], log_evidence=part["log_evidence"]
                )
            )
        made = cls(target, parts, **common)
        made.weights = tensors["weights"]  # as they were, not normalised a second time
        return made


POSTERIORS: dict[str, type[Posterior]] = {c.__name__: c for c in (DrawsPosterior, GaussianPosterior, MixturePosterior)}


def _normalised(weights: Tensor) -> Tensor:
    """Weights divided by their sum, in float64."""
    weights = weights.detach().double()
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError("weights must be finite, none negative, and not all zero")
    return weights / weights.sum()
