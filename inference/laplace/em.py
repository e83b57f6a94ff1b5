r"""Prior precisions and noise by expectation-maximisation on a linearised network, from a few posterior draws.

The E-step draws :math:`z_j \sim N(0, (H + A)^{-1})` and finds the mode :math:`\bar w` of the linear model; the M-step
is MacKay's, with the effective number of parameters estimated from the draws,

.. math:: \hat\gamma_g = \frac1k \sum_j \epsilon_{j,g}^\top (\epsilon_j - A^{1/2} z_j)_g, \qquad
          a_g \leftarrow \hat\gamma_g \Big/ \sum_{i \in g} b_i (\bar w_i - m_i)^2, \qquad
          \sigma^2 \leftarrow \frac{SSE(\bar w)}{N C - \hat\gamma}

for groups g of weights with precisions :math:`A_i = a_g b_i`, where :math:`\epsilon_j` is the standard normal noise
that the prior's part of a draw was made of. Its fixed points are stationary points of the evidence of the linear model.
The published estimate, the average of :math:`z_g^\top (H z)_g`, has the same mean. For all weights together it is as
good, but for one group it may be off by many parameters where the data determine what two groups do together; the
standard error of this one is at most :math:`\sqrt{3 \gamma_g / k}` [our reconstruction]. Draws are warm-started from
those of the round before. Reference: Antoran et al. (2023) [recalled from the paper, not re-read]; MacKay (1992).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inference.laplace.prior_groups import PriorGroups
from inference.laplace.sample_then_optimise import Mean, SampleThenOptimise
from inference.linear_model import LinearModel

# Of a log precision: in one round, and in all. Weights that the data do without have no finite precision to end at.
_LARGEST_STEP, _LARGEST_CHANGE = 5.0, 25.0


@dataclass(frozen=True)
class Learnt:
    """Where the rounds ended.

    Attributes:
        precision: Prior precision of every entry, (P,).
        noise_factor: Factor of the declared noise variance.
        z: Draws at these values, (k, P).
        mean: Mode of the linear model at the values of the last round's E-step.
        effective: Effective number of parameters by group, as last estimated.
        history: Precisions by group and the noise factor after every round.
    """

    precision: Tensor
    noise_factor: float
    z: Tensor
    mean: Mean
    effective: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)


def learn(
    sampler: SampleThenOptimise,
    groups: PriorGroups,
    *,
    rounds: int,
    learn_noise: bool,
    tolerance: float,
) -> Learnt:
    """Alternate E- and M-steps.

    Args:
        sampler: Draws and modes of the linear model.
        groups: Which entries share a precision.
        rounds: Most rounds, >= 1.
        learn_noise: Also learn one factor of the known noise variances of a Normal likelihood.
        tolerance: Largest change of a log precision that ends the rounds.

    Returns:
        Precisions, noise, and draws that belong to them.
    """
    model = sampler.model
    prior_mean = groups.prior.mean.to(model.center)
    logs, noise_factor = groups.start.clone(), 1.0
    near: tuple[Tensor, Tensor] | None = None
    mean = Mean(torch.zeros_like(model.center), model.eta)
    effective: Tensor = torch.zeros_like(logs)
    history: list[dict[str, Any]] = []
    for _ in range(rounds):
        precision = groups.precision(logs).to(model.center)
        mean = sampler.mean(precision, prior_mean, noise_factor, _moved(model, mean, prior_mean, near, precision))
        z = sampler.draws(precision, noise_factor, near)
        near = z, precision
        determined = sampler.effective_numbers(z, precision)
        effective = groups.total(determined)
        squares = groups.total(groups.base * (model.center + mean.offset - prior_mean).double().square())
        change = (effective / squares.clamp_min(torch.finfo(squares.dtype).tiny)).log() - logs
        # A group that the draws find no parameter determined in stays as it is.
        change = torch.where(effective > 0, change, 0.0).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        previous = logs
        logs = (logs + change).clamp(groups.start - _LARGEST_CHANGE, groups.start + _LARGEST_CHANGE)
        largest = float((logs - previous).abs().max())
        if learn_noise:
            before = noise_factor
            noise_factor = noise_of(model, mean.eta, float(determined.sum()))
            largest = max(largest, abs(noise_factor / before - 1))
        history.append({"precision": _by_name(groups, logs.exp()), "noise_factor": noise_factor})
        if largest <= tolerance:
            break
    precision = groups.precision(logs).to(model.center)
    z = sampler.draws(precision, noise_factor, near)
    return Learnt(precision, noise_factor, z, mean, _by_name(groups, effective), history)


def _moved(
    model: LinearModel, mean: Mean, prior_mean: Tensor, near: tuple[Tensor, Tensor] | None, precision: Tensor
) -> Tensor:
    """A first guess of the mode for another precision: it is the prior mean plus A^-1 J^T u for some u."""
    if near is None:
        return mean.offset
    return prior_mean + (model.center + mean.offset - prior_mean) * near[1] / precision - model.center


def noise_of(model: LinearModel, eta: Tensor, effective: float) -> float:
    r"""Factor of the declared noise variances, :math:`SSE / (N C - \gamma)` with residuals in declared deviations.

    Args:
        model: The linear model, with a Normal likelihood of known scale.
        eta: Function values, (N, E).
        effective: Effective number of parameters, gamma.

    Returns:
        The factor.
    """
    params = model.params_at(eta)
    residuals = (model.target.y - params["loc"]) / params["scale"]
    freedom = max(residuals.numel() - effective, 1.0)  # an interpolated data set leaves none
    return float(residuals.double().square().sum()) / freedom


def _by_name(groups: PriorGroups, values: Tensor) -> dict[str, float]:
    return dict(zip(groups.names, values.tolist(), strict=True))
