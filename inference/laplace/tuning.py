r"""Prior precisions and noise of a fitted Laplace posterior, chosen by its evidence or by held-out data.

Mode and curvature stay as they are, so no training is repeated. Three ways to choose the precisions :math:`a_g`:

- "gradient": L-BFGS on the log evidence over :math:`\log a` (and :math:`\log s`);
- "mackay": the fixed point :math:`a_g \leftarrow \gamma_g / \sum_{i \in g} b_i (\theta^*_i - m_i)^2`,
  :math:`s^2 \leftarrow s_0^2 W / (M - \gamma)` with W the squared residuals over the declared variances, M of them;
- "validation": the best of a grid by the negative log likelihood of held-out data.

The first two have the same stationary points. What they get wrong: the mode belongs to the declared prior, so where the
chosen one is far from it, fit again with ``tuned.model``, and tune again, or use `OnlineLaplace` or
`tune_at_linear_mode`. References: MacKay (1992); Daxberger et al. (2021); Immer et al. (2021b) [recalled from the
papers, not re-read].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from inference.errors import ApproximationWarning, ConvergenceWarning
from inference.laplace.log_evidence import LaplaceEvidence, laplace_evidence
from inference.laplace.noise import require_noise
from inference.laplace.prior_groups import Groups, Scaling
from inference.laplace.tuned import TunedPrior, tuned_prior
from inference.posterior import GaussianPosterior

Method = Literal["gradient", "mackay", "validation"]

_METHODS = ("gradient", "mackay", "validation")
# The log evidence may rise for ever as a precision goes to 0 or to infinity: this far from the start it ends.
_RANGE, _NOISE_RANGE = math.log(1e10), math.log(1e4)
_MOVED = 1e-10
# Slopes in nats per logarithm that are good enough, the step of finite differences, and most groups they are taken for.
_SLOPE, _DIFFERENCE, _MAX_SHARPENED = 1e-9, 1e-4, 32
_GRID = (1e-4, 1e4, 100)


def tune_prior(
    posterior: GaussianPosterior,
    *,
    groups: Groups = "site",
    method: Method = "gradient",
    scaling: Scaling = "declared",
    noise: bool = False,
    sites: str | Sequence[str] | None = None,
    validation: tuple[Any, Tensor] | None = None,
    max_steps: int = 500,
    seed: int = 0,
) -> TunedPrior:
    """Choose the prior precisions of a fitted Laplace posterior; the declared prior is where the search starts.

    Only Gaussian priors with known means and precisions can be chosen, and only the noise of a Normal likelihood whose
    scale is a known number; a latent noise scale is part of theta and learnt with the mode.

    Args:
        posterior: Fitted by `DenseLaplace`, `DiagonalLaplace`, `KroneckerLaplace` or `LowRankLaplace`, also within
            `Subset`.
        groups: Weights that share a precision: "all", "site" (those of one Pyro site) or "weight" (none).
        method: "gradient", "mackay" or "validation".
        scaling: Precisions within a group are proportional to the declared ones, or ("g_prior") to the diagonal of the
            curvature.
        noise: Choose the noise scale as well.
        sites: Name pattern(s) of the sites to tune; the others keep their priors. None for all.
        validation: Held-out inputs and targets, for ``method="validation"``.
        max_steps: Most steps of "gradient" and "mackay".
        seed: Of what is drawn: labels of ``curvature="monte_carlo"``, predictions on the held-out data.

    Returns:
        Precisions, noise, evidence before and after, and the posterior and the model that have them.

    Raises:
        ValueError: If an option does not fit the posterior.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from inference import DenseLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> y = torch.tensor([0.9, 0.1, 1.1, 2.0])
        >>> tuned = tune_prior(DenseLaplace().fit(model, x, y))
        >>> tuned.log_evidence > tuned.log_evidence_before, tuned.scales["w"] < 2
        (True, True)
        >>> refitted = DenseLaplace().fit(tuned.model, x, y)  # or declare dist.Normal(0, tuned.scales["w"]) yourself
    """
    _check(groups, method, noise, validation, max_steps)
    evidence = laplace_evidence(posterior, groups=groups, scaling=scaling, sites=sites, seed=seed)
    if noise:
        require_noise(evidence.noise, evidence.target)
    log_noise: Tensor | None = None
    if method == "validation":
        log_precision, history = _by_validation(posterior, evidence, validation, seed)
        converged = None
    else:
        choose = maximise if method == "gradient" else mackay
        log_precision, log_noise, history, converged = choose(evidence, noise=noise, max_steps=max_steps)
    if converged is False:
        warnings.warn(
            f"the prior precisions still move after {max_steps} steps of {method!r}; raise `max_steps`",
            ConvergenceWarning,
            stacklevel=2,
        )
    warn_of_ends(evidence, log_precision)
    return tuned_prior(
        posterior,
        evidence,
        log_precision,
        log_noise,
        method=method,
        before=posterior.log_evidence,
        history=history,
        converged=converged,
    )


def maximise(
    evidence: LaplaceEvidence,
    start: Tensor | None = None,
    log_noise: Tensor | None = None,
    *,
    noise: bool,
    max_steps: int,
) -> tuple[Tensor, Tensor | None, list[float], bool]:
    """Maximise the log evidence by L-BFGS over the logarithms of precisions and noise scale, within bounds.

    Args:
        evidence: The log evidence.
        start: Logarithms of the precisions to start from, (G,); the declared ones when None.
        log_noise: Logarithm of the noise scale to start from, (); the declared one when None.
        noise: Whether to move the noise.
        max_steps: Most steps.

    Returns:
        Logarithms of the precisions, (G,), and of the noise scale (None for the declared one), the log evidence after
        each step, and whether it converged.
    """
    start, log_noise = _first(evidence, start, log_noise, noise)
    size = len(start)
    declared = evidence.groups.start
    history: list[float] = []

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        moved = torch.as_tensor(point, dtype=start.dtype).to(start.device).requires_grad_()
        with torch.enable_grad():
            value = -evidence(moved[:size], moved[size] if noise else log_noise)
            (gradient,) = torch.autograd.grad(value, moved)
        return float(value.detach()) / unit, gradient.cpu().numpy().astype(np.float64) / unit

    def record(intermediate_result: OptimizeResult) -> None:
        history.append(-float(intermediate_result.fun) * unit)

    first = start if log_noise is None or not noise else torch.cat([start, log_noise[None]])
    bounds = [(c - _RANGE, c + _RANGE) for c in declared.tolist()]
    if noise:
        centre = require_noise(evidence.noise, evidence.target).log_scale
        bounds.append((centre - _NOISE_RANGE, centre + _NOISE_RANGE))
    unit = 1.0  # in the end the slope at the start, so that the first step has length one and stays where floats do
    unit = max(1.0, float(np.linalg.norm(loss(first.detach().cpu().numpy())[1])))
    found = minimize(
        loss,
        first.detach().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=record,
        options={"maxiter": max_steps, "maxfun": 20 * max_steps, "ftol": 0.0, "gtol": 1e-9 / unit, "maxcor": 20},
    )
    point = _sharpened(lambda at: unit * loss(at)[1], found.x, np.array(bounds).T)
    best = torch.as_tensor(point, dtype=start.dtype).to(start.device)
    converged = found.nit < max_steps
    return best[:size], best[size] if noise else log_noise, history, converged


def _sharpened(slope: Callable[[np.ndarray], np.ndarray], point: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """A few Newton steps where line searches drown in rounding; the slope must shrink, and the point hardly move."""
    inside = (point > bounds[0]) & (point < bounds[1])
    before = slope(point)
    if not _SLOPE < np.abs(before[inside]).max(initial=0.0) < 1 or inside.sum() > _MAX_SHARPENED:
        return point
    moves = np.eye(len(point))[inside] * _DIFFERENCE
    hessian = np.array([(slope(point + move) - before)[inside] / _DIFFERENCE for move in moves])
    for _ in range(3):
        step = np.zeros_like(point)
        step[inside] = np.linalg.lstsq(hessian, before[inside], rcond=1e-10)[0]
        after = slope(point - step)
        if not np.abs(step).max() < _DIFFERENCE or not np.abs(after[inside]).max() < np.abs(before[inside]).max():
            break
        point, before = point - step, after
    return point


def mackay(
    evidence: LaplaceEvidence,
    start: Tensor | None = None,
    log_noise: Tensor | None = None,
    *,
    noise: bool,
    max_steps: int,
) -> tuple[Tensor, Tensor | None, list[float], bool]:
    """Iterate MacKay's fixed point.

    Args:
        evidence: The log evidence.
        start: As for `maximise`.
        log_noise: As for `maximise`.
        noise: Whether to move the noise.
        max_steps: Most steps.

    Returns:
        As `maximise`.
    """
    a, log_noise = _first(evidence, start, log_noise, noise)
    groups, history = evidence.groups, []
    weighted = groups.total(groups.base * evidence.distances)
    low, high = groups.start - _RANGE, groups.start + _RANGE
    for _ in range(max_steps):
        by_group, total = evidence.effective_parameters(a, log_noise)
        moved = (by_group.clamp(min=0) / weighted).log().nan_to_num(nan=math.inf).clamp(low, high)
        change = float((moved - a).abs().max())
        if noise and log_noise is not None:
            held = require_noise(evidence.noise, evidence.target)
            left = max(held.count - total, 1e-12 * held.count)
            quieter = 0.5 * torch.log(log_noise.new_tensor(held.squares / left)) + held.log_scale
            change = max(change, float((quieter - log_noise).abs()))
            log_noise = quieter
        a = moved
        history.append(float(evidence(a, log_noise)))
        if change < _MOVED:
            return a, log_noise, history, True
    return a, log_noise, history, False


def warn_of_ends(evidence: LaplaceEvidence, log_precision: Tensor) -> None:
    """Warn of groups whose precision ended where the search ends.

    Args:
        evidence: The log evidence.
        log_precision: What was chosen, (G,).
    """
    moved = log_precision - evidence.groups.start
    for end, what in ((-1, "flat"), (1, "narrow")):
        at_end = (end * moved > 0.999 * _RANGE).nonzero()[:, 0].tolist()
        names = list(dict.fromkeys(evidence.groups.names[i] for i in at_end))
        if names:
            warnings.warn(
                f"the evidence asks for an ever more {what} prior in {len(at_end)} of {len(moved)} groups (in "
                f"{', '.join(names[:5])}): their precision was left at 1e{10 * end:+d} times the declared one",
                ApproximationWarning,
                stacklevel=3,
            )


def _by_validation(
    posterior: GaussianPosterior, evidence: LaplaceEvidence, held_out: tuple[Any, Tensor] | None, seed: int
) -> tuple[Tensor, list[float]]:
    """The best precision of a grid, and the negative log likelihood per datum at each."""
    assert held_out is not None
    x, y = held_out
    low, high, number = _GRID
    grid = torch.logspace(math.log10(low), math.log10(high), number, dtype=torch.float64)
    losses = []
    for precision in grid:
        candidate = GaussianPosterior(
            posterior.target,
            evidence.gaussian(precision.log()[None]),
            backend=posterior.backend,
            linearized=posterior.linearized,
        )
        losses.append(-float(candidate.predict(x, seed=seed).log_prob(y).mean()))
    return grid[int(np.argmin(losses))].log()[None].to(evidence.groups.start), losses


def _first(
    evidence: LaplaceEvidence, start: Tensor | None, log_noise: Tensor | None, noise: bool
) -> tuple[Tensor, Tensor | None]:
    start = evidence.groups.start if start is None else start
    if noise and log_noise is None:
        log_noise = start.new_tensor(require_noise(evidence.noise, evidence.target).log_scale)
    return start, log_noise


def _check(groups: Any, method: Any, noise: Any, validation: Any, max_steps: Any) -> None:
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"`max_steps` must be an integer >= 1, got {max_steps!r}")
    if (method == "validation") != (validation is not None):
        raise ValueError(
            'held-out data and method="validation" belong together: pass `validation=(x, y)` with that method only'
        )
    if method == "validation" and (groups != "all" or noise):
        raise ValueError('method="validation" searches one number: pass groups="all" and noise=False')
