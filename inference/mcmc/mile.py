r"""MILE, microcanonical Langevin ensembles: the members of a deep ensemble as starts of many short MCLMC chains.

Optimisation does what sampling is slow at, finding K good modes; from each of them one chain of
:mod:`inference.mcmc.mclmc` explores its surroundings. The goal v of the energy errors falls linearly during warm-up,
from a coarse value that leaves the optimum quickly to the one that the draws are made at. Without sampling steps the
result is the deep ensemble itself.

Wrong by design: chains stay in the modes that training found, each with the same weight, and the large energy errors
bias the spread within them. Cost: a deep ensemble, and 2 gradients of all data a step and chain. Memory: 6 P a chain
and the draws. Minibatches are for the training alone: without a correction they would heat the chains.

Reference: sommer2025mile. As published: K = 12 members trained on the likelihood alone by AdamW (step size and weight
decay 1e-3, batches of 32, at most 500 epochs) until the loss of a validation part, one eighth of what is not test data,
has not fallen for 10 epochs, each keeping its best weights; then 50,000 warm-up steps in parts of 80, 10 and 10 %, and
10,000 steps thinned by 10. Ours: everything latent is trained and decays, a noise scale too, which the authors set to 1
for the training where the network has no output for it; and chains see all the data, where the authors leave the
validation part out of them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.backend import Backend, Run, check_positive
from inference.mcmc.mclmc import MCLMC
from inference.mcmc.microcanonical import Tuning
from inference.posterior import DrawsPosterior, Posterior
from inference.target import Target
from inference.warning_signs import MIN_DRAWS

# Of the published training.
_STEP_SIZE, _WEIGHT_DECAY, _BATCH, _EPOCHS, _PATIENCE, _VALIDATION = 1e-3, 1e-3, 32, 500, 10, 0.125


@dataclass(frozen=True, kw_only=True)
class MILE(MCLMC):
    r"""Microcanonical Langevin ensemble.

    Attributes:
        num_samples: Steps per chain after warm-up, of which every ``thinning``-th is kept; 0 leaves it at the ensemble.
        warmup_steps: Discarded steps per chain: 80 % for the step size, 10 % for the variances, 10 % for the length.
        num_chains: Members K, and chains C.
        initial_energy_variance: Where the goal ``energy_variance`` starts.
        initial_step_size: Where the tuning of the step size starts.
        start: What trains the members, from ``init`` where there is one: any backend; one that has ``num_members`` is
            given K. None takes ``init`` for the members, or without it a deep ensemble trained as published (above;
            fewer than 8 data, or data with parameters of their own, have no validation part: 500 epochs then).
    """

    num_samples: int = 10_000
    warmup_steps: int = 50_000
    num_chains: int = 12
    thinning: int = 10
    energy_variance: float = 0.1
    initial_energy_variance: float = 0.5
    initial_step_size: float = 1e-3
    window: float = 100.0
    start: Backend | None = None

    bias: ClassVar[str] = "chains stay in the modes that training found; no accept step, and a coarse energy error"
    reference: ClassVar[str] = "Sommer et al. 2025"

    def __post_init__(self) -> None:
        if self.num_samples == 0 and not isinstance(self.num_samples, bool):
            replace(self, num_samples=MIN_DRAWS * self.thinning)  # everything else must be in order
            return
        super().__post_init__()
        check_positive(self, "initial_energy_variance", "initial_step_size")

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Train the members and run a chain from each.

        Args:
            target: Tempered target.
            run: This fit.

        Returns:
            Draws (C, S, P), with sample statistics; the members themselves, (C, 1, P), without sampling steps.
        """
        members = self._members(target, run)
        if self.num_samples == 0:
            return DrawsPosterior(target, members[:, None], backend=self, info=run.info)
        return self.sample_from(target, run, members)

    def tuning(self, dim: int) -> Tuning:
        """What warm-up does for P parameters."""
        usual = super().tuning(dim)
        return replace(
            usual,
            step_size=self.step_size or self.initial_step_size,
            length=self.decoherence_length or max(math.sqrt(dim), 15.0),
            first_goal=self.initial_energy_variance,
        )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Parts of the warm-up."""
        return (0.8, 0.05, 0.05, 0.1) if self.precondition else (0.8, 0.1, 0.0, 0.1)

    def _members(self, target: Target, run: Run) -> Tensor:
        start = self.start
        if start is None and run.init is not None:
            return target.initial(self.num_chains, run.seed, run.init)
        start = start or _deep_ensemble(target, self)
        if "num_members" in start.field_names():
            members: dict[str, Any] = {"num_members": self.num_chains}
            start = replace(start, **members)
        # The streams of this fit itself, so that its members are those of the deep ensemble with the same seed.
        posterior = start.fit_target(target, run.sub(start, run.init, offset=0))
        if isinstance(posterior, DrawsPosterior):
            points = posterior.draws.flatten(0, 1)
        else:
            points = posterior.sample(self.num_chains, run.seed)
        if points.shape[0] < self.num_chains:
            raise ValueError(
                f"`start` gives {points.shape[0]} points, but `num_chains` is {self.num_chains}: lower it, or pass a "
                "backend with more draws"
            )
        return points[torch.arange(self.num_chains) * points.shape[0] // self.num_chains].contiguous()


def _deep_ensemble(target: Target, backend: MILE) -> Backend:
    # Families do not import each other; the registry, which knows all of them, imports this one.
    from inference.registry import find_backend

    batch_size = target.batch_size or _BATCH
    divisible = target.num_data * _VALIDATION >= 1 and not target.programs.traced.local_sites
    num_trained = target.num_data - (round(target.num_data * _VALIDATION) if divisible else 0)
    settings: dict[str, Any] = {
        "num_steps": _EPOCHS * math.ceil(num_trained / batch_size),
        "step_size": _STEP_SIZE,
        "batch_size": batch_size,
        "schedule": "constant",
        "prior": False,
        "weight_decay": _WEIGHT_DECAY,
        "validation_fraction": _VALIDATION if divisible else None,
        "patience": _PATIENCE,
        "compile": backend.compile,
        "progress": backend.progress,
    }
    return find_backend("deep_ensemble").cls(**settings)
