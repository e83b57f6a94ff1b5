r"""Warm-up of Hamiltonian samplers: dual averaging of the step size and Stan's windows for the mass matrix.

Dual averaging drives the mean acceptance a towards its target :math:`\delta`,

.. math::
    \bar h_m = \Big(1 - \tfrac{1}{m+t_0}\Big)\bar h_{m-1} + \tfrac{\delta - a_m}{m+t_0}, \qquad
    \log\epsilon_m = \mu - \tfrac{\sqrt m}{\gamma}\bar h_m, \qquad
    \log\bar\epsilon_m = m^{-\kappa}\log\epsilon_m + (1 - m^{-\kappa})\log\bar\epsilon_{m-1}.

Source: hoffman2014nuts, section 3.2 and algorithm 4; windows: Stan's reference manual, "Automatic parameter tuning"
[recalled from the papers, not re-read].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
_FIRST, _LAST, _BASE = 75, 50, 25


class DualAveraging:
    """Step size of one chain during warm-up.

    Args:
        step_size: Where to start.
        target_accept: Mean acceptance to reach, in (0, 1).
    """

    def __init__(self, step_size: float, target_accept: float) -> None:
        self.target_accept = target_accept
        self.restart(step_size)

    def restart(self, step_size: float) -> None:
        """Forget the past and shrink towards ten times ``step_size``."""
        self.mu = math.log(10.0 * step_size)
        self.count = 0
        self.error = 0.0
        self.log_step = math.log(step_size)
        self.log_average = 0.0

    def update(self, acceptance: float) -> float:
        """Take one trajectory into account.

        Args:
            acceptance: Its acceptance statistic, in [0, 1].

        Returns:
            The step size of the next trajectory.
        """
        self.count += 1
        m = self.count
        self.error += (self.target_accept - min(acceptance, 1.0) - self.error) / (m + _T0)
        self.log_step = self.mu - math.sqrt(m) / _GAMMA * self.error
        weight = m**-_KAPPA
        self.log_average = weight * self.log_step + (1.0 - weight) * self.log_average
        return math.exp(self.log_step)

    @property
    def averaged(self) -> float:
        """The step size to keep after warm-up."""
        return math.exp(self.log_average if self.count else self.log_step)


@dataclass(frozen=True)
class Windows:
    """When the mass matrix learns.

    Attributes:
        start: First warm-up iteration whose draw counts (0-based).
        ends: Numbers of iterations after which the mass matrix is updated; draws since the previous end count.
        warmup_steps: Length of the whole warm-up.
    """

    start: int
    ends: tuple[int, ...]
    warmup_steps: int

    @property
    def stop(self) -> int:
        """First warm-up iteration whose draw no longer counts."""
        return self.ends[-1] if self.ends else self.start


def stan_windows(warmup_steps: int) -> Windows:
    """Stan's schedule: 75 iterations, windows of 25 doubling in size, 50 iterations for the step size.

    Shorter warm-ups than 150 give 15 % and 10 % to the two ends and one window to the rest; below 20 the mass matrix
    is left alone.

    Args:
        warmup_steps: Number of warm-up iterations.

    Returns:
        The schedule; for 1000 iterations it starts at 75 and ends windows at 100, 150, 250, 450 and 950.
    """
    if warmup_steps < 20:
        return Windows(warmup_steps, (), warmup_steps)
    first, last, size = _FIRST, _LAST, _BASE
    if first + size + last > warmup_steps:
        first, last = int(0.15 * warmup_steps), int(0.1 * warmup_steps)
        size = warmup_steps - first - last
    stop = warmup_steps - last
    ends = [first + size]
    while ends[-1] < stop:
        size *= 2
        end = ends[-1] + size
        # A window whose successor would not fit takes the rest.
        ends.append(stop if end + 2 * size > stop else end)
    return Windows(first, tuple(ends), warmup_steps)
