r"""Solving :math:`(K + \sigma^2 I)\,\alpha = t` for many t by stochastic descent, a block of the kernel at a time.

*Dual*: the gradient of :math:`\tfrac12 \alpha^\top (K + \sigma^2 I) \alpha - \alpha^\top t` on random coordinates I,

.. math:: g_I = \tfrac{N}{|I|} \left[K_{I \cdot} \alpha + \sigma^2 \alpha_I - t_I\right].

*Primal*: that of :math:`\tfrac12 \|t - K \alpha\|^2 + \tfrac{\sigma^2}{2} \|\alpha - \delta\|_K^2`, with the first term
from a minibatch and the second through random features; a draw's noise is :math:`\sigma^2 \delta`, in the regulariser.
Both use Nesterov's momentum and average their iterates geometrically. References: Lin et al. (2023), Lin et al. (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inference.data import chunks
from inference.errors import NonFiniteError
from inference.gaussian_process.kernels import Kernel

Method = Literal["dual", "primal"]

_POWER_STEPS, _PROBED = 20, 1_000
# Floats of a kernel block.
_BLOCK = 4_000_000
# Nesterov's method with full gradients bears 1.33 over the largest eigenvalue; estimates need room.
_SHARE = {"dual": 0.8, "primal": 0.4}


@dataclass(frozen=True)
class System:
    r"""Right-hand sides and what they are made of.

    Attributes:
        kernel: The covariance function.
        x: Training inputs, (N, D).
        noise: Standard deviation of the observations' noise.
        targets: t without noise draws, (N, k).
        shifts: Noise draws over the noise variance, :math:`\delta`, (N, k).
    """

    kernel: Kernel
    x: Tensor
    noise: float
    targets: Tensor
    shifts: Tensor

    @property
    def rhs(self) -> Tensor:
        """Right-hand sides with their noise, (N, k)."""
        return self.targets + self.noise**2 * self.shifts

    def rows_times(self, rows: Tensor, alpha: Tensor) -> Tensor:
        """Rows of K times alpha, (b,) and (N, k) to (b, k), block by block."""
        return kernel_times(self.kernel, self.x[rows], self.x, alpha)

    def columns_times(self, rows: Tensor, values: Tensor) -> Tensor:
        """Columns of K times values, (b,) and (b, k) to (N, k), block by block."""
        return kernel_times(self.kernel, self.x, self.x[rows], values)


@dataclass(frozen=True)
class Descent:
    """How to descend.

    Attributes:
        method: "dual" or "primal".
        num_steps: Number of steps T.
        batch_size: Coordinates or data per step.
        step_size: Learning rate, on gradients divided by N; None for one from the largest eigenvalue.
        momentum: Nesterov's.
        averaging: Share of the last iterates that the average remembers, times T: r = averaging / T.
        num_features: Random features per step of the primal regulariser.
    """

    method: Method
    num_steps: int
    batch_size: int
    step_size: float | None
    momentum: float
    averaging: float
    num_features: int


def kernel_times(kernel: Kernel, x: Tensor, other: Tensor, values: Tensor) -> Tensor:
    """Kernel matrix times values, never held as a whole.

    Args:
        kernel: The covariance function.
        x: Inputs of the rows, (n, D).
        other: Inputs of the columns, (m, D).
        values: (m, k).

    Returns:
        (n, k).
    """
    width = max(1, min(len(other), _BLOCK // min(len(x), 2_000)))
    height = max(1, _BLOCK // width)
    out = values.new_zeros(len(x), values.shape[1])
    for rows in chunks(len(x), height):
        for columns in chunks(len(other), width):
            out[rows].addmm_(kernel(x[rows], other[columns]), values[columns])
    return out


def descend(
    system: System, options: Descent, generator: torch.Generator, advance: Callable[[], object] = lambda: None
) -> Tensor:
    """Solve for all right-hand sides together.

    Args:
        system: The systems.
        options: How to descend.
        generator: Source of minibatches and features.
        advance: Called after every step.

    Returns:
        alpha, (N, k): the average of the iterates.

    Raises:
        NonFiniteError: If the iterates grow without bound.
    """
    num = len(system.x)
    size = min(options.batch_size, num)
    rhs = system.rhs
    rate = default_rate(system, options) if options.step_size is None else options.step_size / num
    alpha, velocity, mean = torch.zeros_like(rhs), torch.zeros_like(rhs), torch.zeros_like(rhs)
    share = min(1.0, options.averaging / options.num_steps)
    for step in range(options.num_steps):
        rows = torch.randperm(num, generator=generator, device=rhs.device)[:size]
        ahead = alpha + options.momentum * velocity
        velocity *= options.momentum
        if options.method == "dual":
            gradient = system.rows_times(rows, ahead) + system.noise**2 * ahead[rows] - rhs[rows]
            velocity[rows] -= rate * num / size * gradient
        else:
            velocity -= rate * _primal_gradient(system, rows, ahead, options, generator)
        alpha += velocity
        mean = mean.lerp_(alpha, share) if step else alpha.clone()
        if step % 100 == 0 and not bool(torch.isfinite(alpha).all()):
            break
        advance()
    if not bool(torch.isfinite(mean).all()):
        raise NonFiniteError(
            f"stochastic descent diverged within {step + 1} steps at a step size of {rate * num:.3g}: pass a smaller "
            "`step_size`, or None to have it chosen"
        )
    return mean


def default_rate(system: System, options: Descent) -> float:
    """Learning rate, on gradients as they are, from the largest eigenvalue of K seen on a subset of the data.

    Args:
        system: The systems.
        options: Method, batch size and features.

    Returns:
        The rate.
    """
    num = len(system.x)
    size = min(options.batch_size, num)
    chosen = torch.linspace(0, num - 1, min(num, _PROBED), device=system.x.device).round().long()
    block = system.kernel(system.x[chosen], system.x[chosen])
    vector = torch.ones(len(chosen), dtype=block.dtype, device=block.device)
    for _ in range(_POWER_STEPS):
        vector = block @ (vector / vector.norm())
    largest = float(vector.norm()) * num / len(chosen)
    own = float(system.kernel.variance(system.x[chosen]).max())
    left_out = 1 - size / num
    variance = system.noise**2
    if options.method == "dual":
        bound = largest + variance + num / size * left_out * (own + variance)
    else:
        estimated = largest + own * num / options.num_features
        bound = largest * (largest + num / size * left_out * own) + variance * estimated
    return _SHARE[options.method] / bound


def _primal_gradient(
    system: System, rows: Tensor, alpha: Tensor, options: Descent, generator: torch.Generator
) -> Tensor:
    residual = system.rows_times(rows, alpha) - system.targets[rows]
    gradient = system.columns_times(rows, residual * (len(system.x) / len(rows)))
    features = system.kernel.features(options.num_features, system.x, generator)(system.x)  # (N, F)
    return gradient + system.noise**2 * (features @ (features.T @ (alpha - system.shifts)))
