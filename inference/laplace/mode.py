r"""Finding the mode that a Laplace approximation is made at: a stochastic start, then L-BFGS on the full data.

The mode is that of the density of the *unconstrained* theta, with the Jacobians of constrained sites: it is the density
whose curvature is taken and whose integral the evidence approximates.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from inference import data
from inference.backend import Run
from inference.distributions import FlatGaussian
from inference.double import in_double
from inference.errors import ApproximationWarning
from inference.hessians import prior_alone
from inference.jacobians import CHUNK_BYTES
from inference.optimisation import polish
from inference.point import MAP
from inference.prediction import even
from inference.taps import floats_per_datum
from inference.target import Target

Energy = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From theta (P,) to its log density () and gradient (P,)."""
Approximation = TypeVar("Approximation", bound=FlatGaussian)
# Newton decrement in nats.
_ROUNDING = 1e-9
# Of the Newton decrement per parameter: a root mean square distance to the mode of 0.3 posterior standard deviations.
_MAX_DECREMENT = 0.1
# Fewer data than these a call are dominated by its overhead.
_FEWEST_ROWS = 64


def find_mode(target: Target, run: Run, start: MAP | None, polish_steps: int) -> Tensor:
    """Maximise the log density, or take the starting point as the mode.

    Args:
        target: The (tempered) target.
        run: The fit in progress; supplies the starting point.
        start: Optimiser for the way to the mode; None takes `run.init` as it is.
        polish_steps: Full-data L-BFGS steps after it.

    Returns:
        The mode, shape (P,).

    Raises:
        ValueError: If there is neither an optimiser nor a starting point.
    """
    if start is None:
        if run.init is None and not target.initial_sites:
            raise ValueError(
                "`start=None` takes the mode from `init`, but none was given; pass a MAP posterior or a theta"
            )
        return target.initial(1, run.seed, run.init)[0]
    start = replace(start, jacobian=True, polish=False)
    theta = start.fit_target(target, run.sub(start, run.init)).mean_theta
    if polish_steps == 0:
        return theta
    return polish(target, run, theta, max_steps=polish_steps)


def energy_of(target: Target, run: Run, *, compared: bool = True) -> Energy:
    """Log density and gradient at one theta, each call counted as one full gradient.

    Data whose activations do not fit one chunk are taken in several, without recording a graph of them all.

    Args:
        target: The (tempered) target.
        run: Counts the calls.
        compared: Whether values will be compared with each other: then they are computed in float64.

    Returns:
        Function from (P,) to a log density in nats, (), and its gradient, (P,).
    """
    precise = in_double(target) if compared else target
    size = max(1, CHUNK_BYTES // (3 * floats_per_datum(target, 0) * precise.dtype.itemsize))
    if size < target.num_data and not target.programs.traced.local_sites:
        recorded = target.recorded_rows
        reused = _FEWEST_ROWS <= recorded <= size
        return _chunked_energy(precise, run, recorded if reused else even(target.num_data, size))
    program = cache(lambda: precise.log_density_and_grad(1))  # recorded if it is called

    def energy(theta: Tensor) -> tuple[Tensor, Tensor]:
        run.count(1)
        value, gradient = program()(theta[None].to(precise.dtype))
        return value[0], gradient[0].to(theta.dtype)

    return energy


def collected(target: Target, run: Run) -> tuple[Tensor, Tensor] | None:
    """Log density and gradient where a curvature collected those of the likelihood, counted as one full gradient.

    Args:
        target: The (tempered) target.
        run: Holds the slope.

    Returns:
        A log density in nats, (), and its gradient, (P,); None where no pass could tell.
    """
    slope = run.slope
    if slope is None or slope.gradient is None:
        return None
    run.count(1)
    prior, gradient = _with_gradient(prior_alone(target), slope.theta)
    value = prior.double() + slope.value / target.likelihood_temperature
    gradient = gradient + slope.gradient / target.likelihood_temperature
    return value / target.temperature, gradient.to(slope.theta.dtype) / target.temperature


def _with_gradient(function: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    point = theta.detach().requires_grad_()
    with torch.enable_grad():
        value = function(point)
        (gradient,) = torch.autograd.grad(value, point)
    return value.detach(), gradient


def _chunked_energy(target: Target, run: Run, size: int) -> Energy:
    log_prior = cache(lambda: prior_alone(target))

    def energy(theta: Tensor) -> tuple[Tensor, Tensor]:
        run.count(1)
        point = theta.detach().to(target.dtype).requires_grad_()
        prior, gradient = _with_gradient(log_prior(), point)
        total = prior.double()
        with torch.enable_grad():
            for rows, skip in data.full_chunks(target.num_data, size):
                each = target.log_likelihood(point, data.index(target.x, rows), target.y[rows])[skip:]
                part = each.double().sum() / target.likelihood_temperature
                gradient = gradient + torch.autograd.grad(part, point)[0]
                total = total + part.detach()
        return total / target.temperature, gradient.to(theta.dtype) / target.temperature

    return energy


def report_mode(run: Run, value: float, gradient: Tensor, decrement: float, consequence: str) -> None:
    r"""Record how far from a mode a point is, and warn where it matters.

    Args:
        run: The fit in progress.
        value: Log density there, nats.
        gradient: Its gradient, (P,).
        decrement: Newton decrement :math:`g^\top (H + A)^{-1} g`, nats.
        consequence: What a mode is needed for, for the warning.
    """
    dim, norm = len(gradient), float(gradient.norm())
    run.info.extra |= {"log_density_at_mode": value, "gradient_norm": norm, "newton_decrement": decrement}
    if not decrement <= _MAX_DECREMENT * dim:
        run.warn(
            ApproximationWarning,
            f"not at a mode: the Newton decrement g^T (H + A)^-1 g is {decrement:.3g} instead of 0 (weights are "
            f"off by {(decrement / dim) ** 0.5:.2g} posterior standard deviations, root mean square) and "
            f"the gradient norm {norm:.3g}; {consequence}: raise `start`'s num_steps or `polish_steps`, or give "
            "another `init`",
        )


def newton(
    theta: Tensor, approximate: Callable[[Tensor], tuple[Approximation, list[str]]], energy: Energy, max_steps: int
) -> tuple[Approximation, list[str]]:
    """Newton steps with the curvature of an approximation, taken anew at every point.

    They end where the Newton decrement is at rounding error, where it does not fall quadratically (as far from a
    mode), or where no step goes up.

    Args:
        theta: Start, shape (P,).
        approximate: From a point to the Gaussian there and what had to be done to its curvature.
        energy: Log density and gradient.
        max_steps: Most steps.

    Returns:
        The Gaussian at the last point, and its notes.
    """
    gaussian, notes = approximate(theta)
    previous = float("inf")
    for _ in range(max_steps):
        value, gradient = energy(gaussian.loc)
        step = gaussian.covariance_times(gradient)
        decrement = float(gradient @ step)
        if decrement <= torch.finfo(theta.dtype).eps or decrement > 0.5 * previous:
            break
        previous = decrement
        # Below this gain a log density cannot be told from its rounding error, but the step can still be taken.
        higher = gaussian.loc + step if decrement < _ROUNDING else climb(gaussian.loc, value, step, energy)
        if higher is None:
            break
        gaussian, notes = approximate(higher)
    return gaussian, notes


def climb(theta: Tensor, value: Tensor, step: Tensor, energy: Energy, max_halvings: int = 10) -> Tensor | None:
    """Backtracking along a Newton step: the longest of 1, 1/2, 1/4, ... times the step that raises the log density.

    Args:
        theta: Start, shape (P,).
        value: Log density there, ().
        step: Full step, shape (P,).
        energy: Log density and gradient.
        max_halvings: Number of shorter steps to try.

    Returns:
        The new point, or None when none of them is higher.
    """
    for halving in range(max_halvings + 1):
        candidate = theta + step * 0.5**halving
        if bool(energy(candidate)[0] > value):
            return candidate
    return None
