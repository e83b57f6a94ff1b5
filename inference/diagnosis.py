"""Is a fit to be trusted? One report per posterior: mixing in weights and functions, tails, divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.func import vmap

from inference.data import chunks, index, num_data
from inference.diagnostics import convergence
from inference.mixtures import location
from inference.prediction import DrawSource, draws_per_chunk
from inference.psis import psis_khat
from inference.target import check_new_inputs

if TYPE_CHECKING:
    from inference.posterior import Posterior

_PROBES = 200
_KHAT_DRAWS = 1_000
_LIMIT = 1.1
_MIN_DRAWS = 4


@dataclass
class Diagnosis:
    """Figures that say whether to believe a posterior; NaN where a figure has no meaning for it.

    Attributes:
        backend: Class name of the backend.
        rhat_weights: Rank-normalised split R-hat of every entry of theta, (P,).
        rhat_functions: The same of the latent function at the probe inputs, (N, ...).
        ess_bulk_functions: Bulk effective sample size at the probe inputs.
        ess_tail_functions: Tail effective sample size at the probe inputs.
        divergences: Number of divergent draws.
        depth_saturated: Share of draws at the largest tree depth seen, when that is the limit.
        khat: Pareto tail index of the importance ratios p/q; below 0.7 the approximation can be corrected;
            minus infinity where the ratios have no tail.
        warnings: What to worry about, in words with numbers.
    """

    backend: str
    rhat_weights: np.ndarray
    rhat_functions: np.ndarray
    ess_bulk_functions: np.ndarray
    ess_tail_functions: np.ndarray
    divergences: int | None
    depth_saturated: float | None
    khat: float
    warnings: list[str] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        """Whether nothing was found to worry about."""
        return not self.warnings

    def summary(self) -> dict[str, float | int | str | None]:
        """The figures as scalars, for tables and JSON (None where they have no meaning)."""
        figures: dict[str, float | int | str | None] = {
            "rhat_weights_median": _quantile(self.rhat_weights, 0.5),
            "rhat_weights_above_1.1": _share_above(self.rhat_weights),
            "rhat_functions_median": _quantile(self.rhat_functions, 0.5),
            "rhat_functions_95": _quantile(self.rhat_functions, 0.95),
            "rhat_functions_above_1.1": _share_above(self.rhat_functions),
            "ess_bulk_functions_median": _quantile(self.ess_bulk_functions, 0.5),
            "ess_tail_functions_median": _quantile(self.ess_tail_functions, 0.5),
            "divergences": self.divergences,
            "depth_saturated": self.depth_saturated,
            "khat": "inf" if self.khat == math.inf else self.khat if math.isfinite(self.khat) else None,
        }
        return figures

    def __str__(self) -> str:
        lines = [f"{self.backend}: " + ("nothing to worry about found" if self.trusted else "read the warnings")]
        for name, value in self.summary().items():
            if value is not None:
                lines.append(f"  {name:28s} {value if isinstance(value, str) else format(value, '.4g')}")
        return "\n".join(lines + [f"  ! {w}" for w in self.warnings])


def diagnose(posterior: Posterior, x: Any = None) -> Diagnosis:
    """Examine a posterior.

    Args:
        posterior: The posterior.
        x: Probe inputs for the function space; up to 200 training inputs by default.

    Returns:
        The report.
    """
    from inference.posterior import DrawsPosterior

    empty = np.array([math.nan])
    found = Diagnosis(posterior.backend_name, empty, empty, empty, empty, None, None, math.nan)
    # Divergences and tree depths are counted again below, for chains and for loaded posteriors alike.
    found.warnings += [
        text for name, text in posterior.info.warnings if name != "DivergenceWarning" and "max_tree_depth=" not in text
    ]
    if isinstance(posterior, DrawsPosterior) and "chains" in getattr(posterior.backend, "capabilities", ()):
        _examine_chains(posterior, x, found)
    if posterior.has_log_density:
        found.khat = pareto_khat(posterior)
        if found.khat == math.inf:
            found.warnings.append(
                "k-hat cannot be computed: the model's density is not finite where the approximation has mass"
            )
        elif found.khat > 0.7:
            found.warnings.append(
                f"k-hat is {found.khat:.2f} (limit 0.7): the approximation misses mass of the posterior; with "
                "more than a thousand weights this is so for every Gaussian, so compare predictions with a "
                "NUTS reference instead"
            )
    return found


def function_draws(posterior: Posterior, x: Any) -> np.ndarray:
    """Latent function of every chain and draw at some inputs, (C, S, N, ...)."""
    draws = posterior.draws
    source = DrawSource(posterior.target, draws.reshape(-1, draws.shape[-1]), draws.new_ones(1), x)
    parts = []
    for rows in chunks(num_data(x), source.rows):
        parts.append(location(source.family, source.params(rows)))
    values = torch.cat(parts, 1)
    return values.reshape(draws.shape[:2] + values.shape[1:]).cpu().numpy()


def pareto_khat(posterior: Posterior, num_samples: int = _KHAT_DRAWS, seed: int = 0) -> float:
    """PSIS k-hat of a posterior with a density (Yao et al. 2018).

    Args:
        posterior: Posterior whose ``log_density`` is available.
        num_samples: Number of draws S.
        seed: Random seed.

    Returns:
        Tail index of the ratios p/q; below 0.5 good, above 0.7 not to be corrected.
    """
    thetas = posterior.sample(num_samples, seed)
    target = posterior.target
    size = draws_per_chunk(target.recorded())
    with torch.no_grad():
        joint = torch.cat([vmap(target.log_density)(thetas[part]) for part in chunks(num_samples, size)])
        ratios = (joint.double() - posterior.log_density(thetas).double()).cpu().numpy()
    ratios = ratios[~np.isneginf(ratios)]  # where p is zero the draw has no weight
    return float(psis_khat(ratios)) if ratios.size and np.isfinite(ratios).all() else math.inf


def _examine_chains(posterior: Any, x: Any, found: Diagnosis) -> None:
    draws, target = posterior.draws, posterior.target
    if draws.shape[1] >= _MIN_DRAWS:
        found.rhat_weights = convergence(draws.cpu().numpy()).rhat
    else:
        found.warnings.append(f"{draws.shape[1]} draws per chain are too few for R-hat; it needs {_MIN_DRAWS}")
    local = bool(target.programs.traced.local_sites)  # such a model runs on all of its data or not at all
    probes = (target.x if local else _probes(target.x)) if x is None else check_new_inputs(target, x)
    if draws.shape[1] >= _MIN_DRAWS:
        figures = convergence(function_draws(posterior, probes))
        found.rhat_functions = figures.rhat
        found.ess_bulk_functions, found.ess_tail_functions = figures.ess_bulk, figures.ess_tail
    stats = posterior.sample_stats
    if "diverging" in stats:
        found.divergences = int(stats["diverging"].sum())
        if found.divergences:
            found.warnings.append(
                f"{found.divergences} of {stats['diverging'].numel()} draws diverged: the sampler missed regions of "
                "high curvature; raise `target_accept`, or reparameterise"
            )
    inner = getattr(posterior.backend, "backend", posterior.backend)  # what a Subset wraps
    limit = getattr(inner, "max_tree_depth", None)
    if "tree_depth" in stats and limit:
        found.depth_saturated = float((stats["tree_depth"] >= limit).double().mean())
        if found.depth_saturated > 0.1:
            found.warnings.append(
                f"{found.depth_saturated:.0%} of the draws hit max_tree_depth={limit}: they are more correlated than "
                "they need be; raise it, or reparameterise"
            )
    share = _share_above(found.rhat_functions)
    if share is not None and share > 0.05:
        found.warnings.append(
            f"R-hat of the predictions is above {_LIMIT} at {share:.0%} of the probe inputs: the chains disagree; run "
            "longer, or read their spread as model uncertainty"
        )


def _probes(x: Any) -> Any:
    """Training inputs spread evenly over the data, which may be sorted."""
    total = num_data(x)
    return index(x, torch.linspace(0, total - 1, min(total, _PROBES), dtype=torch.float64).round().long())


def _quantile(values: np.ndarray, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if finite.size else None


def _share_above(values: np.ndarray) -> float | None:
    finite = values[~np.isnan(values)]
    return float((finite > _LIMIT).mean()) if finite.size else None
