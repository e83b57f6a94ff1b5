r"""Pathfinder: Gaussians along the path of a quasi-Newton optimiser, of which the one with the best ELBO is kept.

L-BFGS goes from a starting point to a mode. After each of its steps l the last J changes of position s and of gradient
y give an estimate of the inverse Hessian,

.. math::
    \Sigma_l = \mathrm{diag}(\alpha_l) + \beta\gamma\beta^\top, \qquad
    \mu_l = \theta_l + \Sigma_l \nabla\log p(\theta_l), \qquad \beta = [\mathrm{diag}(\alpha_l) Y,\; S],

with :math:`\gamma` from the compact form of the BFGS update, and :math:`\alpha` from the diagonal update of Gilbert and
Lemarechal. The ELBO of each :math:`N(\mu_l, \Sigma_l)` is estimated from K draws. A mode of a network may have no mass
around it; the path passes through the mass on its way there. Several paths are put together by importance sampling
against their mixture, with Pareto-smoothed weights. Covariances see at most 2 J directions; several paths see several
modes. Cost: some 100 gradients and K values of the density per step; memory 2 J P per step of the path.

Source: zhang2022pathfinder, algorithms 1 to 4 [recalled from the paper, not re-read]; weighing draws by the mixture of
all paths instead of by their own is our choice, for its lower variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.func import vmap

from inference.backend import Backend, Run, check_integer, check_positive
from inference.data import chunks
from inference.double import in_double
from inference.errors import ApproximationWarning, NonFiniteError
from inference.graph import capture
from inference.posterior import DrawsPosterior, GaussianPosterior, Posterior
from inference.psis import psis_khat, psis_weights
from inference.spectral_gaussian import SpectralGaussian
from inference.target import Target
from inference.variational.mean_field import estimate_elbo

# A value of the density costs about a third of a gradient.
_VALUE_COST = 1 / 3
# Curvature pairs below this are rounding; Stan's threshold.
_CURVATURE = 1e-12
_KHAT_LIMIT = 0.7
_STREAM = 20_000


@dataclass(frozen=True, kw_only=True)
class Pathfinder(Backend):
    """Pathfinder, with one path or several.

    Attributes:
        max_steps: Largest number of L-BFGS iterations of a path.
        history_size: Pairs J that an inverse Hessian is made of.
        num_elbo_draws: Draws K that the ELBO of each step is estimated from.
        tolerance: A path ends when the log density gains less than this share of itself.
        num_paths: Paths, from as many starting points; 1 gives a Gaussian, more give weighted draws.
        num_draws: Draws S of all paths together, where there are several; at least 25.
    """

    max_steps: int = 1000
    history_size: int = 6
    num_elbo_draws: int = 10
    tolerance: float = 1e-12
    num_paths: int = 1
    num_draws: int = 1000

    family: ClassVar[str] = "variational"
    bias: ClassVar[str] = "a Gaussian near one mode that sees few directions; too narrow in many dimensions"
    reference: ClassVar[str] = "Zhang et al. 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "full batch"})
    capabilities: ClassVar[frozenset[str]] = frozenset({"log_density", "log_evidence", "temperature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "max_steps", "history_size", "num_elbo_draws", "num_paths", minimum=1)
        check_integer(self, "num_draws", minimum=25)  # the fewest whose tail can be smoothed
        check_positive(self, "tolerance")

    def fit_target(self, target: Target, run: Run) -> Posterior:
        """Follow the paths.

        Args:
            target: Tempered target.
            run: Seed, starting point and counters.

        Returns:
            A Gaussian whose log evidence is its ELBO, or with several paths weighted draws (1, S, P) whose log evidence
            is the importance-sampling estimate; nats.

        Raises:
            NonFiniteError: If the log density is not finite at a starting point or around all of a path.
        """
        precise = in_double(target)
        starts = target.initial(self.num_paths, run.seed, run.init).to(precise.dtype)
        log_density = density_of(precise, self.num_elbo_draws)
        found, steps = [], []
        with run.bar(self.num_paths, "Pathfinder") as bar:
            for number, start in enumerate(starts):
                points, gradients = follow(precise, run, start, self.max_steps, self.history_size, self.tolerance)
                candidates = estimates(points, gradients, self.history_size)
                best, elbo = None, -math.inf
                for candidate in candidates:
                    # The same noise for every step: what differs is the Gaussian.
                    value = elbo_of(candidate, log_density, self.num_elbo_draws, run.stream(_STREAM + number))
                    if best is None or value > elbo:
                        best, elbo = candidate, value
                run.count(_VALUE_COST * self.num_elbo_draws * len(points))
                if best is None or elbo == -math.inf:
                    raise NonFiniteError(
                        f"path {number}: the log density is not finite around any of its {len(points)} points; pass "
                        "another `init`, or check the model's support"
                    )
                found.append(best)
                steps.append(len(points) - 1)
                bar.advance(elbo=elbo)
        run.info.extra["steps"] = steps
        narrow = [_cast(gaussian, target.dtype) for gaussian in found]
        if self.num_paths == 1:
            elbo, error = estimate_elbo(target, narrow[0], run.stream(_STREAM - 1))
            run.info.extra.update(elbo=elbo, elbo_standard_error=error)
            return GaussianPosterior(target, narrow[0], backend=self, info=run.info, log_evidence=elbo)
        return self._together(target, run, narrow)

    def _together(self, target: Target, run: Run, paths: list[SpectralGaussian]) -> DrawsPosterior:
        """Draws of the mixture of all paths, weighted towards the posterior."""
        sizes = [self.num_draws // len(paths) + (i < self.num_draws % len(paths)) for i in range(len(paths))]
        pieces = [
            p.sample(n, run.stream(_STREAM - 2 - i)) for i, (p, n) in enumerate(zip(paths, sizes, strict=True)) if n
        ]
        thetas = torch.cat(pieces)
        log_shares = torch.tensor(sizes, dtype=torch.float64).log() - math.log(self.num_draws)
        log_q = torch.stack([p.log_prob(thetas).double().cpu() for p in paths]) + log_shares[:, None]
        proposal = log_q.logsumexp(0)
        with torch.no_grad():
            ratios = _values(target, thetas) - proposal
            plain = ratios if target == target.tempered() else _values(target.tempered(), thetas) - proposal
        run.count(_VALUE_COST * self.num_draws)
        usable = torch.where(ratios.isnan() | (ratios == math.inf), -math.inf, ratios)
        if not bool((usable > -math.inf).any()):
            raise NonFiniteError("no draw of any path has a finite log density; pass another `init`")
        khat = float(psis_khat(usable.numpy()))
        run.info.extra["khat"] = khat
        if khat > _KHAT_LIMIT:
            run.warn(
                ApproximationWarning,
                f"k-hat of the importance weights is {khat:.2f} (limit {_KHAT_LIMIT}): a few draws carry most of the "
                "weight; use them as starting points of NUTS rather than as the posterior",
            )
        weights = torch.as_tensor(np.array(psis_weights(usable.numpy())))
        evidence = float(plain.nan_to_num(nan=-math.inf).logsumexp(0)) - math.log(self.num_draws)
        return DrawsPosterior(
            target, thetas[None], backend=self, info=run.info, weights=weights[None], log_evidence=evidence
        )


def follow(
    target: Target, run: Run, start: Tensor, max_steps: int, history_size: int, tolerance: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Climb to a mode by L-BFGS.

    Args:
        target: In float64.
        run: Counts the gradients.
        start: (P,).
        max_steps: Largest number of iterations.
        history_size: Pairs that L-BFGS itself uses.
        tolerance: Relative gain below which it ends.

    Returns:
        The points of the path and the gradients of the log density there, (P,) each.

    Raises:
        NonFiniteError: If log density or gradient are not finite at the start.
    """
    program = target.log_density_and_grad(1, compile=run.backend.compile, num_calls=1.2 * max_steps)
    seen: dict[bytes, Tensor] = {}
    evaluations = 0

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        value, gradient = program(torch.as_tensor(theta, device=start.device)[None])
        seen[theta.tobytes()] = gradient[0]
        finite = bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())
        # A line search shortens its step where the loss is huge, and gives up where it is not a number.
        return (-float(value), -gradient[0].cpu().numpy()) if finite else (1e300, np.zeros_like(theta))

    points, gradients = [start], [start]

    def remember(theta: np.ndarray) -> None:
        points.append(torch.as_tensor(theta.copy(), device=start.device))
        gradients.append(seen[theta.tobytes()])
        seen.clear()

    first = start.cpu().numpy()
    if loss(first)[0] >= 1e300:
        raise NonFiniteError(
            "the log density or its gradient is not finite at the starting point; pass `init`, for example a MAP "
            "posterior"
        )
    gradients[0] = seen[first.tobytes()]
    options = {"maxiter": max_steps, "maxcor": history_size, "ftol": tolerance, "gtol": 1e-9, "maxls": 50}
    scipy.optimize.minimize(loss, first, jac=True, method="L-BFGS-B", callback=remember, options=options)
    run.count(evaluations)
    return points, gradients


def estimates(points: list[Tensor], gradients: list[Tensor], history_size: int) -> list[SpectralGaussian]:
    """The Gaussian of every step of a path.

    Args:
        points: (P,) each.
        gradients: Of the log density, (P,) each.
        history_size: Pairs J.

    Returns:
        One Gaussian per point but those whose estimate is not positive definite.
    """
    diagonal = torch.ones_like(points[0])
    pairs: list[tuple[Tensor, Tensor]] = []
    found = []
    for step, (point, gradient) in enumerate(zip(points, gradients, strict=True)):
        if step:
            s, y = point - points[step - 1], gradients[step - 1] - gradient
            if float(s @ y) > _CURVATURE * float(y @ y):
                diagonal = _next_diagonal(diagonal, s, y)
                pairs = [*pairs, (s, y)][-history_size:]
        gaussian = inverse_hessian(point, gradient, diagonal, pairs)
        if gaussian is not None:
            found.append(gaussian)
    return found


def inverse_hessian(
    point: Tensor, gradient: Tensor, diagonal: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> SpectralGaussian | None:
    """The Gaussian whose covariance is the compact BFGS estimate of the inverse Hessian.

    Args:
        point: Where the path is, (P,).
        gradient: Of the log density there, (P,).
        diagonal: What BFGS starts from, (P,).
        pairs: Changes of position and of minus the gradient, oldest first.

    Returns:
        The Gaussian, or None if rounding has left it without a positive definite covariance.
    """
    scale = diagonal.sqrt()
    if pairs:
        s, y = (torch.stack(columns, 1) for columns in zip(*pairs, strict=True))  # (P, J)
        products = s.mT @ y
        inverse = torch.linalg.inv(products.triu())
        corner = inverse.mT @ (torch.diag(products.diagonal()) + y.mT @ (diagonal[:, None] * y)) @ inverse
        zero = torch.zeros_like(corner)
        gamma = torch.cat([torch.cat([zero, -inverse], 1), torch.cat([-inverse.mT, corner], 1)])
        whitened = torch.cat([scale[:, None] * y, s / scale[:, None]], 1)
        basis, upper = torch.linalg.qr(whitened)
        inner = upper @ gamma @ upper.mT
        values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
        eigenvalues, basis = 1 + values, (basis @ vectors).contiguous()
    else:
        eigenvalues, basis = diagonal.new_zeros(0), diagonal.new_zeros(diagonal.shape[0], 0)
    if not bool((eigenvalues > 0).all() and torch.isfinite(eigenvalues).all() and torch.isfinite(basis).all()):
        return None
    try:
        shape = SpectralGaussian(point, scale, basis, eigenvalues)
        return SpectralGaussian(point + shape.covariance_times(gradient), scale, basis, eigenvalues)
    except ValueError:  # columns that rounding has made dependent, or an infinite mean
        return None


def _next_diagonal(diagonal: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Gilbert and Lemarechal's update of the diagonal inverse Hessian."""
    a, b, c = y @ (diagonal * y), s @ y, s @ (s / diagonal)
    inverse = a / (b * diagonal) + y.square() / b - a * s.square() / (b * c * diagonal.square())
    updated = 1 / inverse
    return updated if bool((updated > 0).all() and torch.isfinite(updated).all()) else diagonal


def density_of(target: Target, num: int) -> Callable[[Tensor], Tensor]:
    """The log density of ``num`` thetas in one recorded call, (num, P) to (num,) nats."""
    example = torch.zeros(num, target.dim, dtype=target.dtype, device=target.device)
    target.log_density(example[0])  # recorded outside the vmap
    program = capture(vmap(target.log_density), example)
    return lambda thetas: program(thetas.contiguous())


def elbo_of(
    gaussian: SpectralGaussian, log_density: Callable[[Tensor], Tensor], num_draws: int, stream: torch.Generator
) -> float:
    """Estimate of the ELBO, nats; minus infinity where the density is not finite.

    Args:
        gaussian: q.
        log_density: Of ``num_draws`` thetas.
        num_draws: K.
        stream: Random stream.

    Returns:
        Mean of log p - log q.
    """
    thetas = gaussian.sample(num_draws, stream)
    with torch.no_grad():
        value = float((log_density(thetas) - gaussian.log_prob(thetas)).mean())
    return value if math.isfinite(value) else -math.inf


def _values(target: Target, thetas: Tensor) -> Tensor:
    """Log densities, (S,) in float64 on the CPU."""
    return torch.cat([vmap(target.log_density)(thetas[part]) for part in chunks(len(thetas), 20)]).double().cpu()


def _cast(gaussian: SpectralGaussian, dtype: torch.dtype) -> SpectralGaussian:
    return SpectralGaussian(**{name: value.to(dtype) for name, value in gaussian.tensors().items()})
