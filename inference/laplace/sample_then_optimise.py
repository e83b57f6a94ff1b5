r"""Draws from :math:`N(0, (H + A)^{-1})` as minimisers of random quadratics, k of them together.

.. math:: z_j = \arg\min_z \tfrac12 \|J z\|_\Lambda^2 + \tfrac12 \|z - \theta_j\|_A^2, \qquad
          \theta_j = \theta_j^0 + A^{-1} J^\top \Lambda E_j, \quad \theta_j^0 \sim N(0, A^{-1}), \;
          E_{jn} \sim N(0, \Lambda_n^{-1})

The noise enters once, not in every minibatch: the objective :math:`\tfrac12 \|J z - E_j\|_\Lambda^2 + \tfrac12 \|z -
\theta_j^0\|_A^2` has the same minimiser and noisier gradients. Only :math:`\Lambda E` is ever needed, so a singular
:math:`\Lambda` (softmax) is no exception. Reference: Antoran et al. (2023) [recalled from the paper, not re-read].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.backend import Batches, Run
from inference.laplace.solvers import Solution, averaged_descent, conjugate_gradients, size_of
from inference.linear_model import LinearModel
from inference.mixtures import Params

# Streams of one fit: the mode's own come first.
_DATA_NOISE, _PRIOR_NOISE, _SHUFFLING = 101, 102, 103
_MAX_NEWTON, _MAX_HALVINGS = 20, 20


@dataclass(frozen=True)
class SolverOptions:
    """How systems are solved.

    Attributes:
        num_steps: Most steps of conjugate gradients, or all steps of stochastic descent.
        tolerance: Relative residual that ends conjugate gradients.
        step_size: Of stochastic descent, in units of the inverse of the largest eigenvalue.
        momentum: Of stochastic descent.
        batch_size: Data per step; None for all, by conjugate gradients.
    """

    num_steps: int
    tolerance: float
    step_size: float
    momentum: float
    batch_size: int | None


@dataclass(frozen=True)
class Mean:
    """Mode of the linear model.

    Attributes:
        offset: Its distance from the linearisation point, (P,).
        eta: Its function values at the training data, (N, E).
    """

    offset: Tensor
    eta: Tensor


class SampleThenOptimise:
    """Posterior draws and modes of one linear model, for any prior precision and noise factor.

    Args:
        model: The linear model.
        num: Number of draws k.
        options: How systems are solved.
        run: The fit in progress.
    """

    def __init__(self, model: LinearModel, num: int, options: SolverOptions, run: Run) -> None:
        self.model, self.num, self.run = model, num, run
        self._options = options
        batches = Batches(model.target, options.batch_size, [run.stream(_SHUFFLING)])
        self.full = batches.full
        self._batch = batches.size
        self._queue = torch.empty(0, dtype=torch.long, device=model.center.device)
        self._shuffling = run.stream(_SHUFFLING)
        self._noise = model.pull_noise(num, run.stream(_DATA_NOISE))
        run.count(num)
        self.worst_residual = 0.0
        self.num_steps = 0

    def draws(self, precision: Tensor, noise_factor: float = 1.0, near: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Minimise the k random quadratics.

        The random numbers are the same at every call, so that draws move continuously with the precisions.

        Args:
            precision: A, (P,).
            noise_factor: Factor of the noise variances, which divides H.
            near: Draws for another precision, (k, P), and that precision, (P,), to start from; None for the prior's.

        Returns:
            Draws z, (k, P).
        """
        noise = self._prior_noise()
        start = noise * precision.rsqrt()
        if near is not None:
            # What the data moved a draw by is A^-1 J^T u for some u; the prior's part of it is known.
            z, before = near
            start += (z - noise * before.rsqrt()).mul_(before / precision)
        noise *= precision.sqrt()
        rhs = noise.add_(self._noise, alpha=noise_factor**-0.5)
        # The prior's part of the right-hand side is solved from the start: only the data's part counts.
        scale = size_of(self._noise, precision) * noise_factor**-0.5
        return self.solve(rhs, start, precision, noise_factor, "samples", scale=scale)

    def effective_numbers(self, z: Tensor, precision: Tensor) -> Tensor:
        r"""Monte-Carlo estimate of the diagonal of :math:`(H + A)^{-1} H`, whose sum is :math:`\gamma`.

        By :math:`\epsilon (\epsilon - A^{1/2} z)`, with the noise that the prior's part of the draws was made of: where
        the data determine nothing the two are equal, and so are draws that were not moved yet.

        Args:
            z: Draws, as `draws` gave them, (k, P).
            precision: A, for which it gave them, (P,).

        Returns:
            (P,), float64; entries are noisy and may be negative, and only sums mean something.
        """
        noise = self._prior_noise()
        return (noise * (noise - precision.sqrt() * z)).double().mean(0)

    def _prior_noise(self) -> Tensor:
        """Standard normal noise of the draws, the same at every call, (k, P): made anew rather than kept."""
        stream = self.run.stream(_PRIOR_NOISE)
        return torch.randn(self._noise.shape, generator=stream, dtype=self._noise.dtype, device=self._noise.device)

    def solve(
        self,
        rhs: Tensor,
        start: Tensor,
        precision: Tensor,
        noise_factor: float = 1.0,
        description: str = "mode",
        params: Params | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Solve :math:`(H + A) Z = B`.

        Args:
            rhs: B, (k, P).
            start: First guess, (k, P).
            precision: A, (P,).
            noise_factor: Factor of the noise variances, which divides H.
            description: What the progress bar says.
            params: Where the likelihood's curvature is taken; at the linearisation point by default.
            scale: What residuals are relative to, (k,); the right-hand sides by default.

        Returns:
            Z, (k, P).
        """

        def product(vectors: Tensor, rows: Tensor | None = None) -> Tensor:
            self.run.count(2 * len(vectors) * (1 if rows is None else len(rows) / self.model.num_data))
            return self.model.gram(vectors, params, rows).div_(noise_factor).addcmul_(vectors, precision)

        options = self._options
        with self.run.bar(options.num_steps, description) as bar:

            def advance() -> None:
                bar.advance(1)

            if not self.full:
                found = averaged_descent(
                    product,
                    self._next_batch,
                    rhs,
                    start,
                    precision,
                    num_steps=options.num_steps,
                    step_size=options.step_size,
                    momentum=options.momentum,
                    advance=advance,
                )
                return found
            solution = conjugate_gradients(
                product,
                rhs,
                lambda vectors: vectors / precision,
                start=start,
                max_steps=options.num_steps,
                tolerance=options.tolerance,
                scale=scale,
                advance=advance,
            )
        self._record(solution)
        return solution.z

    def mean(self, precision: Tensor, prior_mean: Tensor, noise_factor: float, offset: Tensor) -> Mean:
        r"""Mode of the linear model, :math:`\arg\max_w \log p(D \mid \eta_{lin}(w)) - \frac12 \|w - m\|_A^2`.

        Newton steps with backtracking: along a step the function values are linear, so trials cost no pass.

        Args:
            precision: A, (P,).
            prior_mean: m, (P,).
            noise_factor: Factor of the noise variances.
            offset: First guess, as a distance from the linearisation point, (P,).

        Returns:
            The mode.
        """
        model, center = self.model, self.model.center
        eta = model.eta + model.push(offset[None])[0]
        quadratic = model.family.kind == "normal" and "scale" not in model.family.eta_names

        def height(w: Tensor, values: Tensor) -> float:
            prior = 0.5 * float(((w + center - prior_mean).double().square() * precision.double()).sum())
            return model.log_likelihood(values) / noise_factor - prior

        for _ in range(1 if quadratic or not self.full else _MAX_NEWTON):
            gradient = model.score(eta) / noise_factor - precision * (center + offset - prior_mean)
            params = None if quadratic else model.params_at(eta)
            # Errors count against the prior standard deviations of few parameters, not against a gradient of many.
            unit, zero = gradient.new_ones(1), torch.zeros_like(offset)[None]
            step = self.solve(gradient[None], zero, precision, noise_factor, params=params, scale=unit)[0]
            decrement = float(gradient @ step)
            moved = model.push(step[None])[0]
            self.run.count(2)
            scale, here = 1.0, height(offset, eta)
            for _ in range(0 if quadratic else _MAX_HALVINGS):
                if height(offset + scale * step, eta + scale * moved) >= here:
                    break
                scale *= 0.5
            offset, eta = offset + scale * step, eta + scale * moved
            if not decrement > self._options.tolerance**2:
                break
        return Mean(offset, eta)

    def _record(self, solution: Solution) -> None:
        self.worst_residual = max(self.worst_residual, solution.residual)
        self.num_steps += solution.num_steps

    def _next_batch(self) -> Tensor:
        """Numbers of the next minibatch's data; epochs follow one another without a gap."""
        total = self.model.num_data
        while len(self._queue) < self._batch:
            fresh = torch.randperm(total, generator=self._shuffling, device=self._queue.device)
            self._queue = torch.cat([self._queue, fresh])
        batch, self._queue = self._queue[: self._batch], self._queue[self._batch :]
        return batch
