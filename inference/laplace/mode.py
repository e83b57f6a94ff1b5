r"""Finding the mode that a Laplace approximation is made at: a stochastic start, then L-BFGS on the full data.

The mode is that of the density of the *unconstrained* theta, with the Jacobians of constrained sites: it is the density
whose curvature is taken and whose integral the evidence approximates.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from inference.backend import Run
from inference.optimisation import energy_per_datum, polish
from inference.point import MAP
from inference.target import Target

Energy = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From theta (P,) to its log density () and gradient (P,)."""


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
    return polish(target, run, theta, energy_per_datum(target), max_steps=polish_steps)


def energy_of(target: Target, run: Run) -> Energy:
    """Log density and gradient at one theta, each call counted as one full gradient.

    Args:
        target: The (tempered) target.
        run: Counts the calls.

    Returns:
        Function from (P,) to a log density in nats, (), and its gradient, (P,).
    """
    program = target.log_density_and_grad(1)

    def energy(theta: Tensor) -> tuple[Tensor, Tensor]:
        run.count(1)
        value, gradient = program(theta[None])
        return value[0], gradient[0]

    return energy


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
