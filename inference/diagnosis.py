"""Is a fit to be trusted? One report per posterior: mixing in weights and functions, tails, energies, divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.func import vmap

from inference.arrays import Array, Floats
from inference.data import chunks, index, num_data
from inference.diagnostics import StandardErrors, bfmi, convergence, nested_rhat, standard_errors
from inference.mixtures import location
from inference.prediction import DrawSource, draws_per_chunk
from inference.psis import psis_khat
from inference.target import check_new_inputs
from inference.warning_signs import (
    MANY_CHAINS,
    MIN_DRAWS,
    RHAT_LIMIT,
    acceptance_signs,
    divergence_signs,
    energy_signs,
    khat_signs,
    mixing_signs,
    per_chain,
    saturation_signs,
    single_chain_signs,
    size_signs,
    step_size_signs,
)

if TYPE_CHECKING:
    from inference.posterior import Posterior

_PROBES = 200
_KHAT_DRAWS = 1_000
_SHORT_CHAINS = 50
# Standard errors of more weights than these tell nothing new, and their quantiles cost a sort each.
_MAX_WEIGHTS = 2_000


def _nothing() -> Floats:
    return np.array([math.nan])


@dataclass
class Mixing:
    """Figures of every scalar of one space, NaN where they have no meaning.

    Attributes:
        rhat: Rank-normalised split R-hat.
        ess_bulk: Bulk effective sample size, in draws.
        ess_tail: Tail effective sample size, in draws.
        errors: Monte-Carlo standard errors of mean, standard deviation and 5 % / 95 % quantiles, in posterior standard
            deviations; of at most 2,000 weights.
        nested: Nested R-hat, where there are many chains.
    """

    rhat: Floats = field(default_factory=_nothing)
    ess_bulk: Floats = field(default_factory=_nothing)
    ess_tail: Floats = field(default_factory=_nothing)
    errors: StandardErrors = field(default_factory=lambda: StandardErrors(_nothing(), _nothing(), _nothing()))
    nested: Floats = field(default_factory=_nothing)


@dataclass
class Diagnosis:
    """Figures that say whether to believe a posterior; NaN or None where a figure has no meaning for it.

    Attributes:
        backend: Class name of the backend.
        weights: Mixing of every entry of theta, (P,).
        functions: Mixing of the latent function at the probe inputs, (N, ...).
        rhat_weights_aligned: R-hat of the weights after hidden units were matched, (P,), where that was asked for.
        bfmi: Bayesian fraction of missing information per chain, (C,).
        acceptance: Mean acceptance statistic per chain, (C,).
        step_size: Mean step size per chain, (C,).
        chain_divergences: Divergent draws per chain, (C,).
        depth_saturated: Share of draws at the largest tree depth seen, when that is the limit.
        khat: Pareto tail index of the importance ratios p/q; below 0.7 the approximation can be corrected;
            minus infinity where the ratios have no tail.
        warnings: What to worry about, in words with numbers.
        notes: What to know and not to worry about.
    """

    backend: str
    weights: Mixing = field(default_factory=Mixing)
    functions: Mixing = field(default_factory=Mixing)
    rhat_weights_aligned: Floats = field(default_factory=_nothing)
    bfmi: Floats | None = None
    acceptance: Floats | None = None
    step_size: Floats | None = None
    chain_divergences: Floats | None = None
    depth_saturated: float | None = None
    khat: float = math.nan
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        """Whether nothing was found to worry about."""
        return not self.warnings

    @property
    def rhat_weights(self) -> Floats:
        """Rank-normalised split R-hat of every entry of theta, (P,)."""
        return self.weights.rhat

    @property
    def rhat_functions(self) -> Floats:
        """R-hat of the latent function at the probe inputs, (N, ...)."""
        return self.functions.rhat

    @property
    def ess_bulk_functions(self) -> Floats:
        """Bulk effective sample size at the probe inputs."""
        return self.functions.ess_bulk

    @property
    def ess_tail_functions(self) -> Floats:
        """Tail effective sample size at the probe inputs."""
        return self.functions.ess_tail

    @property
    def divergences(self) -> int | None:
        """Number of divergent draws."""
        return None if self.chain_divergences is None else int(self.chain_divergences.sum())

    def summary(self) -> dict[str, float | int | str | None]:
        """The figures as scalars, for tables and JSON (None where they have no meaning)."""
        figures: dict[str, float | int | str | None] = {}
        for name, space in (("weights", self.weights), ("functions", self.functions)):
            figures |= {
                f"rhat_{name}_median": _quantile(space.rhat, 0.5),
                f"rhat_{name}_95": _quantile(space.rhat, 0.95),
                f"rhat_{name}_above_1.1": _share_above(space.rhat),
                f"nested_rhat_{name}_95": _quantile(space.nested, 0.95),
                f"ess_bulk_{name}_median": _quantile(space.ess_bulk, 0.5),
                f"ess_bulk_{name}_5": _quantile(space.ess_bulk, 0.05),
                f"ess_tail_{name}_median": _quantile(space.ess_tail, 0.5),
                f"ess_tail_{name}_5": _quantile(space.ess_tail, 0.05),
                f"mcse_mean_{name}_95": _quantile(space.errors.mean, 0.95),
                f"mcse_sd_{name}_95": _quantile(space.errors.sd, 0.95),
                f"mcse_quantile_{name}_95": _quantile(space.errors.quantile, 0.95),
            }
        figures |= {
            "rhat_weights_aligned_median": _quantile(self.rhat_weights_aligned, 0.5),
            "rhat_weights_aligned_above_1.1": _share_above(self.rhat_weights_aligned),
            "bfmi_min": _least(self.bfmi),
            "acceptance_mean": None if self.acceptance is None else float(self.acceptance.mean()),
            "step_size_min": _least(self.step_size),
            "divergences": self.divergences,
            "depth_saturated": self.depth_saturated,
            "khat": "inf" if self.khat == math.inf else self.khat if math.isfinite(self.khat) else None,
        }
        return figures

    def __str__(self) -> str:
        from inference.diagnosis_text import written

        return written(self)


def diagnose(
    posterior: Posterior, x: Any = None, *, align: bool = False, superchains: int | Array | None = None
) -> Diagnosis:
    """Examine a posterior.

    Args:
        posterior: The posterior.
        x: Probe inputs for the function space; up to 200 training inputs by default.
        align: Also compare the weights after hidden units were matched (:func:`inference.symmetry.align`).
        superchains: Number or numbers of the superchains for nested R-hat, see
            :func:`inference.diagnostics.nested_rhat`; None groups 16 chains and more.

    Returns:
        The report.
    """
    from inference.posterior import DrawsPosterior

    found = Diagnosis(posterior.backend_name)
    # Divergences and tree depths are counted again below, for chains and for loaded posteriors alike.
    found.warnings += [
        text for name, text in posterior.info.warnings if name != "DivergenceWarning" and "max_tree_depth=" not in text
    ]
    if isinstance(posterior, DrawsPosterior) and "chains" in getattr(posterior.backend, "capabilities", ()):
        _examine_chains(posterior, x, found, align, superchains)
    if posterior.has_log_density:
        found.khat = pareto_khat(posterior)
        found.warnings += khat_signs(found.khat)
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


def _examine_chains(posterior: Any, x: Any, found: Diagnosis, align: bool, superchains: int | Array | None) -> None:
    draws, target = posterior.draws, posterior.target
    chains, length = draws.shape[:2]
    groups = _default_superchains(chains) if superchains is None else superchains
    found.warnings += [sign for sign in single_chain_signs(chains) if sign not in found.warnings]
    found.weights = _mixing(draws.cpu().numpy(), groups)
    values = _function_values(posterior, x)
    if values is not None:
        found.functions = _mixing(values, groups)
    else:
        found.warnings.append(
            "the chains cannot be judged by their predictions: only some sites were kept; fit with `probe_inputs`"
        )
    _examine_statistics(posterior, found)
    if length < MIN_DRAWS and groups is None:
        found.warnings.append(f"{length} draws per chain are too few for R-hat; it needs {MIN_DRAWS}")
    short = groups is not None and length < _SHORT_CHAINS
    functions = found.functions
    signs = mixing_signs("predictions", functions.nested if short else functions.rhat, nested=short)
    found.warnings += signs
    if not short:
        found.warnings += size_signs("predictions", functions.ess_bulk, functions.ess_tail, chains, length)
    if align:
        from inference.symmetry import align as aligned

        found.rhat_weights_aligned = convergence(aligned(posterior).draws.cpu().numpy()).rhat
    _judge_weights(found, hidden=len(target.layers) > 1, agree=not signs, aligned=align)


def _function_values(posterior: Any, x: Any) -> np.ndarray | None:
    """Latent function at the probe inputs, or what the sampler recorded of it where theta is not known as a whole."""
    target = posterior.target
    if not posterior.complete:
        recorded = getattr(posterior, "probe_values", None)
        return None if recorded is None else recorded.cpu().numpy()
    local = bool(target.programs.traced.local_sites)  # such a model runs on all of its data or not at all
    probes = (target.x if local else _probes(target.x)) if x is None else check_new_inputs(target, x)
    return function_draws(posterior, probes)


def _judge_weights(found: Diagnosis, *, hidden: bool, agree: bool, aligned: bool) -> None:
    """R-hat of weights is a warning where no hidden units can be swapped, and a note elsewhere."""
    share = _share_above(found.weights.rhat)
    if share is None or share <= 0.05:
        return
    if not hidden:  # nothing can be swapped
        found.warnings += mixing_signs("weights", found.weights.rhat)
    elif agree and not aligned:
        found.notes.append(
            f"R-hat of the weights is above {RHAT_LIMIT} for {share:.0%} of them although the predictions agree: "
            "chains number their hidden units differently; `diagnose(align=True)` compares weights of matched units"
        )


def _examine_statistics(posterior: Any, found: Diagnosis) -> None:
    """What the sampler recorded of itself."""
    stats = posterior.sample_stats
    inner = getattr(posterior.backend, "backend", posterior.backend)  # what a Subset wraps
    adapted = getattr(inner, "adapt_step_size", True) and getattr(inner, "warmup_steps", None) != 0
    if "diverging" in stats:
        found.chain_divergences = np.asarray(stats["diverging"].sum(1).cpu())
        found.warnings += divergence_signs(int(found.chain_divergences.sum()), stats["diverging"].numel())
    found.acceptance = per_chain(stats, "acceptance_rate")
    if found.acceptance is not None:
        found.warnings += acceptance_signs(found.acceptance, getattr(inner, "target_accept", None) if adapted else None)
    found.step_size = per_chain(stats, "step_size")
    if found.step_size is not None:
        found.warnings += step_size_signs(found.step_size)
    if "energy" in stats and stats["energy"].shape[1] >= MIN_DRAWS:
        found.bfmi = bfmi(stats["energy"])
        found.warnings += energy_signs(found.bfmi)
    limit = getattr(inner, "max_tree_depth", None)
    if "tree_depth" in stats and limit:
        found.depth_saturated = float((stats["tree_depth"] >= limit).double().mean())
        found.warnings += saturation_signs(found.depth_saturated, limit)


def _mixing(draws: np.ndarray, superchains: int | Array | None) -> Mixing:
    found = Mixing()
    if superchains is not None:
        found.nested = nested_rhat(draws, superchains)
    if draws.shape[1] < MIN_DRAWS:
        return found
    figures = convergence(draws)
    found.rhat, found.ess_bulk, found.ess_tail = figures.rhat, figures.ess_bulk, figures.ess_tail
    if draws.ndim == 3:
        draws = draws[:, :, np.unique(np.linspace(0, draws.shape[2] - 1, _MAX_WEIGHTS).round().astype(int))]
    spread = draws.std(axis=(0, 1), ddof=1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = standard_errors(draws)
        found.errors = StandardErrors(errors.mean / spread, errors.sd / spread, errors.quantile / spread)
    return found


def _default_superchains(chains: int) -> int | None:
    """Number of superchains where there are many chains: the divisor nearest to the root from below."""
    divisors = [k for k in range(2, int(chains**0.5) + 1) if chains % k == 0]
    return divisors[-1] if chains >= MANY_CHAINS and divisors else None


def _probes(x: Any) -> Any:
    """Training inputs spread evenly over the data, which may be sorted."""
    total = num_data(x)
    return index(x, torch.linspace(0, total - 1, min(total, _PROBES), dtype=torch.float64).round().long())


def _quantile(values: np.ndarray, q: float) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, q)) if finite.size else None


def _share_above(values: np.ndarray) -> float | None:
    finite = values[~np.isnan(values)]
    return float((finite > RHAT_LIMIT).mean()) if finite.size else None


def _least(values: Floats | None) -> float | None:
    return None if values is None else _quantile(values, 0.0)
