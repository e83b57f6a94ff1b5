r"""A prior for the first layer that knows the inputs: small where they do not vary.

Under independent weights a direction in which the training inputs never vary keeps its prior, so that a test input
which does vary there meets random weights. With :math:`C = \sum_n x_n x_n^\top / (N - 1)`, each row of the first
layer's weight matrix follows

.. math:: w \sim N(0, a C + e I),

so that in such a direction the weights have only the standard deviation :math:`\sqrt{e}`. With ``center=True`` the mean
of the inputs is taken off first: a constant input is then as dead as a zero one. The public code of the paper
multiplies this density by an independent Gaussian as well, which counts the prior twice; here it is one normalised
Gaussian.

Source: Izmailov et al. 2021b, "Dangers of Bayesian model averaging under covariate shift" [recalled from the paper, not
re-read]; the choice of a below is [our reconstruction].
"""

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from bnn_models.checks import check_scale
from bnn_models.priors.base import Prior, Slot


@dataclass(frozen=True, eq=False)
class EmpCov(Prior):
    r"""Rows of the first layer's weights follow the inputs, :math:`w \sim N(0, a C + e I)`.

    Meant for one site: ``prior={"layers.0.weight": EmpCov(x_train), "*": Normal(scale="fan_in")}``.

    Attributes:
        inputs: Training inputs, shape (N, D), N >= 2, as the model will see them; only C is kept.
        scale: The factor a > 0, in units of weight variance over input variance; or ``"fan_in"``, which chooses a such
            that a hidden unit's input (its bias apart) has, averaged over the training inputs, the prior variance that
            ``Normal("fan_in", gain)`` gives it.
        floor: The variance e > 0 that every direction keeps; with ``"fan_in"`` below gain^2 / D.
        gain: With ``"fan_in"``: as for `Normal`.
        center: Whether to take the mean off the inputs before computing C; off, as in the paper.
        scale_tril: Cholesky factor of a C + e I, shape (D, D), float64; computed, not given.

    Example:
        >>> prior = EmpCov(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), scale=1.0, floor=0.01)
        >>> variances = prior.scale_tril.square().sum(-1)
        >>> [round(v, 6) for v in variances.tolist()]  # 2 + 0.01, and 0.01 for the input that never varies
        [2.01, 0.01]
    """

    inputs: InitVar[Tensor]
    scale: float | Literal["fan_in"] = "fan_in"
    floor: float = 1e-4
    gain: float = 1.0
    center: bool = False
    scale_tril: Tensor = field(init=False, repr=False)

    def __post_init__(self, inputs: Tensor) -> None:
        """Check the fields and factorise the covariance.

        Args:
            inputs: Training inputs, shape (N, D).

        Raises:
            ValueError: If the inputs or a field are out of range.
        """
        if not isinstance(inputs, Tensor) or inputs.dim() != 2 or len(inputs) < 2 or not torch.isfinite(inputs).all():
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"`inputs` must be a finite tensor of shape (N, D) with N >= 2, got {got}")
        check_scale("floor", self.floor)
        check_scale("gain", self.gain)
        x = inputs.detach().double()
        dim = x.shape[1]
        second_moment = x.T @ x / (len(x) - 1)
        varying = x - x.mean(0) if self.center else x
        covariance = varying.T @ varying / (len(x) - 1)
        if self.scale == "fan_in":
            if self.floor >= self.gain**2 / dim:
                raise ValueError(f"`floor` must be below gain^2 / D = {self.gain**2 / dim:.3g}, got {self.floor!r}")
            if not covariance.any():
                raise ValueError("`inputs` do not vary, so there is no covariance to scale")
            # E[x' (a C + e I) x] = gain^2 E[x' x] / D, with E[x' M x] = tr(M S), S the second moment.
            share = second_moment.trace() / (covariance * second_moment).sum()
            factor = float((self.gain**2 / dim - self.floor) * share)
        else:
            check_scale("scale", self.scale, "a positive number or 'fan_in'")
            if self.gain != 1.0:
                raise ValueError(f"`gain` only applies to scale='fan_in', got gain={self.gain!r}, scale={self.scale!r}")
            factor = self.scale
        identity = torch.eye(dim, dtype=x.dtype, device=x.device)
        object.__setattr__(self, "scale_tril", torch.linalg.cholesky(factor * covariance + self.floor * identity))

    def distribution(self, slot: Slot) -> Any:
        """Return the prior of the first layer's weight matrix.

        Args:
            slot: The tensor asked about, of shape (H, D).

        Returns:
            Distribution with event shape (H, D); its rows are independent.

        Raises:
            ValueError: If the tensor is not a weight matrix with D inputs.
        """
        dim = self.scale_tril.shape[0]
        if slot.is_bias or len(slot.shape) != 2 or slot.shape[1] != dim:
            raise ValueError(
                f"EmpCov was made from {dim} inputs, but site '{slot.name}' has shape {slot.shape}: give it to the "
                "first layer only, as in {'layers.0.weight': EmpCov(x_train), '*': Normal(scale='fan_in')}"
            )
        scale_tril = self.scale_tril.to(slot.device, slot.dtype)
        row: Any = dist.MultivariateNormal(scale_tril.new_zeros(dim), scale_tril=scale_tril)
        return row.expand(slot.shape[:1]).to_event(1)
