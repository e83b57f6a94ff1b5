"""Tolerances from Monte Carlo error, with one false-alarm rate for the whole suite, and the seeds tests draw with.

Each comparison of an estimate to a truth is a z-score against its own standard error. Bonferroni over the suite: with
at most ``COMPARISONS`` of them, one of a correct library's runs in ``1 / FALSE_ALARM`` fails.
"""

from __future__ import annotations

import os
import secrets

import numpy as np
import torch
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-3
COMPARISONS = 10_000
FRESH = os.environ.get("BNN_ZOO_FRESH_SEED", "") not in ("", "0")


def seed(default: int = 0) -> int:
    """The fixed seed, or a new one on every run with BNN_ZOO_FRESH_SEED=1 (printed, to repeat a failure)."""
    if not FRESH:
        return default
    fresh = secrets.randbelow(2**31)
    print(f"fresh seed {fresh} (in place of {default})")
    return fresh


def z_limit(num: int = 1) -> float:
    """Largest |z| of ``num`` comparisons (two-sided) that the suite-wide false-alarm rate allows one test."""
    return float(stats.norm.isf(FALSE_ALARM / (2 * COMPARISONS * max(num, 1))))


def effective_size(draws: Tensor) -> Tensor:
    """Effective sample size per column by batch means of sqrt(S) draws, (C, S, ...) to (...)."""
    chains, length = draws.shape[:2]
    size = max(int(length**0.5), 1)
    used = draws[:, : length // size * size].reshape(chains, -1, size, *draws.shape[2:])
    means = used.mean(2).flatten(0, 1)
    ratio = draws.flatten(0, 1).var(0) / (size * means.var(0)).clamp_min(1e-300)
    return (chains * length * ratio).clamp(1.0, float(chains * length))


def mean_z(draws: Tensor, truth: Tensor | float) -> Tensor:
    """z-scores of the mean of autocorrelated draws (C, S, ...) against the true mean (...)."""
    flat = draws.flatten(0, 1)
    return (flat.mean(0) - truth) / (flat.var(0) / effective_size(draws)).sqrt()


def variance_z(draws: Tensor, truth: Tensor | float, mean: Tensor | float) -> Tensor:
    """z-scores of the variance of draws (C, S, ...) against the true variance, given the true mean."""
    return mean_z((draws - mean).square(), truth)


def assert_mean(draws: Tensor, truth: Tensor | float) -> None:
    """Fail if a mean of draws (C, S, ...) is further from the truth than Monte Carlo error explains."""
    _assert(mean_z(draws, truth), "mean")


def assert_variance(draws: Tensor, truth: Tensor | float, mean: Tensor | float) -> None:
    """Fail if a variance of draws (C, S, ...) is further from the truth than Monte Carlo error explains."""
    _assert(variance_z(draws, truth, mean), "variance")


def assert_independent_mean(draws: Tensor, truth: Tensor | float) -> None:
    """As :func:`assert_mean` for independent draws (S, ...)."""
    error = (draws.var(0) / draws.shape[0]).sqrt()
    _assert((draws.mean(0) - truth) / error, "mean")


def _assert(z: Tensor, what: str) -> None:
    worst, limit = float(torch.as_tensor(z).abs().max()), z_limit(int(np.prod(z.shape)))
    assert worst <= limit, f"{what} is {worst:.1f} standard errors from the truth; {limit:.1f} are allowed"
