r"""Prior precisions and noise learnt by the evidence while the network trains.

Every F epochs after a burn-in of B the curvature is taken at the present weights, and a few steps of Adam raise the log
evidence over the logarithms of the prior precisions (and of the noise scale), which the training then goes on with. The
weights kept are those of the highest evidence seen, so that no held-out data and no early stopping are needed.

What it gets wrong: until training ends the weights are at no mode, so the evidence on the way is a guide and not a
bound; the precisions are a point estimate (empirical Bayes), whose own uncertainty is left out. Cost: one curvature
every F epochs. Reference: Immer et al. (2021b), Algorithm 1, with the defaults of the authors' library [recalled from
the paper, not re-read].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from inference.adam import Adam
from inference.backend import Batches, Run, check_integer, check_positive
from inference.data import Tree, map_tree
from inference.errors import NonFiniteError
from inference.graph import hot
from inference.laplace.base import Laplace
from inference.laplace.kronecker import KroneckerLaplace
from inference.laplace.log_evidence import LaplaceEvidence, evidence_at, fixed_curvature
from inference.laplace.mode import Energy, energy_of
from inference.laplace.noise import normal_noise, require_noise
from inference.laplace.prior_groups import Groups, PriorGroups, declared_prior, group_weights
from inference.laplace.tuned import TunedPrior, redeclared, tuned_prior
from inference.optimisation import SHUFFLING_STREAM, polish
from inference.posterior import GaussianPosterior
from inference.target import Target, compile_target


@dataclass(frozen=True, kw_only=True)
class OnlineLaplace:
    """Train a network and its prior together.

    Attributes:
        structure: Laplace backend whose curvature is taken; its `start` and `polish_steps` are not used.
        groups: Weights that share a precision: "all", "site" or "weight".
        noise: Learn the scale of a Normal likelihood of known scale as well; its declared value is the start.
        sites: Name pattern(s) of the sites whose prior is learnt; None for all.
        num_epochs: Passes over the data.
        every: Epochs F between two looks at the evidence.
        burn_in: Epochs B before the first.
        hyper_steps: Steps of Adam on the log evidence at each look.
        hyper_step_size: Their learning rate, in logarithms of precisions.
        step_size: Learning rate of Adam on the weights at the start (mean loss); it falls to 0 by a cosine.
        batch_size: Data per step; None for the loader's, or else all.
        polish_steps: Full-data L-BFGS steps in the end, with the prior chosen, so that the mode is one; 0 keeps the
            best weights of the training as they are.
    """

    structure: Laplace = field(default_factory=KroneckerLaplace)
    groups: Groups = "site"
    noise: bool = False
    sites: str | Sequence[str] | None = None
    num_epochs: int = 300
    every: int = 1
    burn_in: int = 0
    hyper_steps: int = 10
    hyper_step_size: float = 0.1
    step_size: float = 1e-2
    batch_size: int | None = None
    polish_steps: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: If one is out of its range.
        """
        check_integer(self, "num_epochs", "every", "hyper_steps", "batch_size")
        check_integer(self, "burn_in", "polish_steps", minimum=0)
        check_positive(self, "step_size")
        check_positive(self, "hyper_step_size")
        if not isinstance(self.structure, Laplace):
            raise ValueError(
                f"`structure` must be a Laplace backend such as KroneckerLaplace(), got {self.structure!r}"
            )
        if self.burn_in >= self.num_epochs:
            raise ValueError(f"`burn_in` must be below num_epochs = {self.num_epochs}, got {self.burn_in}")

    def fit(self, model: Any, x: Any, y: Any = None, *, seed: int = 0, init: Any = None) -> TunedPrior:
        """Train.

        Args:
            model: Any Pyro callable ``model(x, y=None)``; its Gaussian priors are where the search starts.
            x: Inputs, first dimension N, or a DataLoader of (x, y).
            y: Targets, (N, ...).
            seed: Seed of all randomness.
            init: Starting weights: a posterior, a dict of site values, a tensor, or None.

        Returns:
            The prior, and the Laplace posterior with it; ``history`` is the log evidence at every look.

        Raises:
            ValueError: If the model's priors or noise are not of the kind that can be chosen.
            NonFiniteError: If the training diverges.
        """
        target = compile_target(model, x, y, batch_size=self.batch_size)
        run = Run(self.structure, target, seed, init)
        with run.measured():
            tuned = self._train(target, run)
        tuned.posterior.info.seconds, tuned.posterior.info.peak_bytes = run.info.seconds, run.info.peak_bytes
        return tuned

    def _train(self, target: Target, run: Run) -> TunedPrior:
        theta = target.initial(1, run.seed, run.init)[0].clone()
        groups = group_weights(target, declared_prior(target, theta, self.sites), self.groups, "declared")
        search = _Search(self, target, run, groups, energy_of(target, run, compared=False))
        batches = Batches(target, self.batch_size, [run.stream(SHUFFLING_STREAM)])
        per_epoch = math.ceil(target.num_data / batches.size)
        program = _gradient(target, run, groups, batches, self.num_epochs * per_epoch)
        optimiser, total = Adam(theta), self.num_epochs * per_epoch
        with run.bar(self.num_epochs, "training with evidence") as bar:
            for epoch in range(1, self.num_epochs + 1):
                precision, tau = search.precision()
                for step in range(per_epoch):
                    done = (epoch - 1) * per_epoch + step
                    x, y = batches.next()
                    if not batches.full:
                        x, y = map_tree(lambda leaf: leaf[0], x), y[0]
                    gradient, loss = program(theta, x, y, precision, tau)
                    if not math.isfinite(float(loss)):
                        raise NonFiniteError(f"step {done + 1}: the loss is {float(loss)}; try a smaller `step_size`")
                    optimiser.step(gradient, self.step_size * 0.5 * (1 + math.cos(math.pi * done / total)))
                run.count(per_epoch * batches.cost)
                if epoch > self.burn_in and (epoch - self.burn_in - 1) % self.every == 0:
                    search.look(theta)
                bar.advance(1, evidence=search.history[-1] if search.history else math.nan)
        return search.result(self.polish_steps)


class _Search:
    """Precisions and noise as they are learnt, and the best seen.

    Args:
        settings: What to do.
        target: The model with its declared prior.
        run: The fit in progress.
        groups: Which weights share a precision.
        energy: Log density under the declared prior.
    """

    def __init__(self, settings: OnlineLaplace, target: Target, run: Run, groups: PriorGroups, energy: Energy) -> None:
        self.settings, self.target, self.run, self.groups, self.energy = settings, target, run, groups, energy
        self.noise = None
        start = groups.start
        if settings.noise:
            theta = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
            self.noise = require_noise(normal_noise(target, theta), target)
            start = torch.cat([start, start.new_tensor([self.noise.log_scale])])
        self.point = start.clone()
        self.optimiser = Adam(self.point)
        self.history: list[float] = []
        self.best: tuple[float, Tensor, Tensor] | None = None

    def precision(self) -> tuple[Tensor, Tensor]:
        """Prior precisions (P,) and the factor of the log likelihood (), for training."""
        a, log_noise = self._split(self.point)
        tau = 0.0 if log_noise is None or self.noise is None else 2 * (self.noise.log_scale - float(log_noise))
        precision = self.groups.precision(a).to(self.target.dtype)
        return precision, precision.new_tensor(math.exp(tau))

    def look(self, theta: Tensor) -> None:
        """Take the curvature, move precisions and noise, remember the best."""
        evidence = self._evidence(theta)
        for _ in range(self.settings.hyper_steps):
            point = self.point.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(-evidence(*self._split(point)), point)
            self.optimiser.step(gradient, self.settings.hyper_step_size)
        value = float(evidence(*self._split(self.point)))
        self.history.append(value)
        if math.isfinite(value) and (self.best is None or value > self.best[0]):
            self.best = value, theta.clone(), self.point.clone()

    def result(self, polish_steps: int) -> TunedPrior:
        """The posterior at the best weights with the precisions found there."""
        if self.best is None:
            raise NonFiniteError("the log evidence was never finite; try a smaller `hyper_step_size` or `step_size`")
        _, theta, point = self.best
        a, log_noise = self._split(point)
        evidence = self._evidence(theta)
        if polish_steps:
            moved = compile_target(redeclared(evidence, a, log_noise), self.target.x, self.target.y)
            theta = polish(moved, self.run, theta, max_steps=polish_steps)
            evidence = self._evidence(theta)
        structure, gaussian = self.settings.structure, evidence.gaussian(a, log_noise)
        linearized = structure.predictive == "linearized"
        posterior = GaussianPosterior(
            self.target, gaussian, backend=structure, info=self.run.info, linearized=linearized
        )
        tuned = tuned_prior(
            posterior,
            evidence,
            a,
            log_noise,
            method="online",
            before=float(evidence()),
            history=self.history,
            converged=None,
        )
        made = tuned.posterior
        structure.check_mode(made.target, made.gaussian, energy_of(made.target, self.run, compared=False), self.run)
        made.info.extra |= self.run.info.extra
        return tuned

    def _evidence(self, theta: Tensor) -> LaplaceEvidence:
        curvature = fixed_curvature(self.settings.structure, self.target, theta, self.run)
        return evidence_at(self.target, theta, curvature, self.groups, float(self.energy(theta)[0]))

    def _split(self, point: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.groups.num_groups
        return point[:size], point[size] if self.noise is not None else None


def _gradient(
    target: Target, run: Run, groups: PriorGroups, batches: Batches, num_calls: int
) -> Callable[[Tensor, Tree, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradient and value of the energy per datum, with precisions and noise as arguments."""
    mean, declared = (value.to(target.dtype) for value in (groups.prior.mean, groups.prior.precision))
    free = groups.index < groups.num_groups

    def loss(theta: Tensor, x: Tree, y: Tensor, precision: Tensor, tau: Tensor) -> Tensor:
        prior, likelihood = target.programs.joint(target.expand(theta), x, y)
        centred = torch.where(free, theta - mean, 0.0)
        prior = prior - 0.5 * ((precision - declared) * centred.square()).sum()
        return -(prior / target.num_data + tau * likelihood.mean())

    x, y = batches.example()
    if not batches.full:
        x, y = map_tree(lambda leaf: leaf[0], x), y[0]
    zero = torch.zeros(target.dim, dtype=target.dtype, device=target.device)
    example = (zero, x, y, declared, zero.new_ones(()))
    return hot(grad_and_value(loss), *example, compile=run.backend.compile, num_calls=num_calls)
