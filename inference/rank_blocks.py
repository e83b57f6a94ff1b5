"""Blocks of scalars for rank-based diagnostics: halves of chains, their order and their normal scores.

Sorting many scalars at once, in blocks that stay in a core's cache, is what makes the figures of
:mod:`inference.diagnostics` fast and their memory bounded. The details follow ArviZ 0.23.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.special import ndtri
from scipy.stats import beta

from inference.arrays import Array, Floats, as_numpy

Progress = Callable[[int, int], object]

# Measured from 32 kB to 16 MB: small enough for the work arrays to stay in a core's cache, large enough for numpy.
_BLOCK_BYTES = 1 << 18
_MINIMUM_DRAWS = 4
_TAIL_PROBABILITIES = (0.05, 0.95)
# One standard deviation of a normal distribution to either side, to ArviZ's digits.
_ONE_SIGMA = (0.1586553, 0.8413447)


class Block:
    """A block of R scalars: the half chains, contiguous, and their order, computed when first asked for."""

    def __init__(self, draws: NDArray, start: int, stop: int) -> None:
        chains, length = draws.shape[:2]
        half = length // 2
        self.split = np.empty((stop - start, 2 * chains, half))  # (R, 2C, S // 2)
        self.split[:, :chains] = np.moveaxis(draws[:, :half, start:stop], -1, 0)
        self.split[:, chains:] = np.moveaxis(draws[:, length - half :, start:stop], -1, 0)
        self.rows = self.split.reshape(stop - start, -1)
        # An odd number of draws leaves the middle one out of the halves, but not out of the moments and quantiles.
        middle = np.moveaxis(draws[:, half : length - half, start:stop], -1, 0).reshape(stop - start, -1)
        self.all = np.concatenate([self.rows, middle], axis=1, dtype=np.float64) if length % 2 else self.rows
        self._bulk: tuple[NDArray[np.intp], Floats, Floats] | None = None

    def _ordered(self) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Order of the draws in the halves, the draws in that order, and their normal scores in the old order."""
        if self._bulk is None:
            order = np.argsort(self.rows, axis=1)
            ranked = _gather(self.rows, order)
            scores = _scatter(_normal_scores(ranked), order)
            self._bulk = order, ranked, scores.reshape(self.split.shape)
        return self._bulk

    @property
    def bulk_scores(self) -> Floats:
        """Normal scores of the ranks, shape (R, 2C, S // 2)."""
        return self._ordered()[2]

    def folded_scores(self) -> Floats:
        """Normal scores of the ranks of the distances to the median, shape (R, 2C, S // 2)."""
        order, ranked, _ = self._ordered()
        middle = ranked.shape[1] // 2
        median = (ranked[:, middle - 1] + ranked[:, middle]) / 2
        folded = np.abs(ranked - median[:, None])
        # The folded values fall, then rise: a merge sort recognises the two runs and only merges them.
        merge = np.argsort(folded, axis=1, kind="stable")
        scores = _scatter(_normal_scores(_gather(folded, merge)), _gather(order, merge))
        scores[~np.isfinite(median)] = np.nan
        return scores.reshape(self.split.shape)

    def rhat(self) -> Floats:
        """R-hat of each scalar, shape (R,)."""
        if self.split.shape[1] < 4:
            return np.full(len(self.split), np.nan)
        bulk, folded = _rhat(self.bulk_scores), _rhat(self.folded_scores())
        return np.where(folded > bulk, folded, bulk)

    def ess_tail(self) -> Floats:
        """Tail effective sample size of each scalar, shape (R,)."""
        ranked = self._ordered()[1] if self._bulk is not None and self.all is self.rows else None
        sizes = [
            effective_size((self.split <= quantile[:, None, None]).astype(np.float64))
            for quantile in _quantiles(self.all, ranked, _TAIL_PROBABILITIES)
        ]
        return np.minimum(*sizes)

    def ess_quantile(self, probability: float) -> tuple[Floats, Floats]:
        """A quantile of each scalar and the effective sample size of the indicator of lying below it, each (R,)."""
        (quantile,) = _quantiles(self.all, None, (probability,))
        return quantile, effective_size((self.split <= quantile[:, None, None]).astype(np.float64))

    def mcse_quantile(self, probability: float) -> Floats:
        """Standard error of a quantile of each scalar, shape (R,)."""
        size = self.ess_quantile(probability)[1]
        n = self.all.shape[1]
        low, high = (
            beta.ppf(tail, size * probability + 1, size * (1 - probability) + 1) * n - 1 for tail in _ONE_SIGMA
        )
        ordered = np.sort(self.all, axis=1)
        first, last = np.floor(np.fmax(low, 0)).astype(int), np.ceil(np.fmin(high, n - 1)).astype(int)
        rows = np.arange(len(ordered))
        return (ordered[rows, last] - ordered[rows, first]) / 2

    def mcse_mean(self) -> Floats:
        """Standard error of the mean of each scalar, shape (R,)."""
        return self.all.std(axis=1, ddof=1) / np.sqrt(effective_size(self.split))

    def mcse_sd(self) -> Floats:
        """Standard error of the standard deviation of each scalar, shape (R,)."""
        mean = self.all.mean(axis=1, keepdims=True)
        squares = np.square(self.all - mean)
        variance = squares.mean(axis=1)
        spread = np.square(squares).mean(axis=1) - variance**2
        return np.sqrt(spread / effective_size(np.square(self.split - mean[:, None])) / variance / 4)


def by_blocks(
    draws: Array,
    figures: Callable[[Block], tuple[Floats, ...]],
    num_figures: int,
    progress: Progress | None,
) -> list[Floats]:
    """Apply ``figures`` to blocks of scalars that fit the cache."""
    array = as_numpy(draws)
    if array.ndim < 2 or not array.shape[0] or array.dtype.kind not in "fiub":
        raise ValueError(
            f"draws must be real numbers of shape (C, S, ...), got {array.dtype} of shape {array.shape}; "
            "put the chains first and the draws second"
        )
    chains, length, *trailing = array.shape
    total = prod(trailing)
    out = np.full((num_figures, total), np.nan)
    flat = array.reshape(chains, length, total)
    size = max(1, _BLOCK_BYTES // (8 * chains * max(1, length)))
    for start in range(0, total if length >= _MINIMUM_DRAWS else 0, size):
        stop = min(total, start + size)
        block = Block(flat, start, stop)
        with np.errstate(all="ignore"):
            out[:, start:stop] = figures(block)
        out[:, start:stop][:, np.isnan(block.all).any(axis=1)] = np.nan
        if progress is not None:
            progress(stop, total)
    return [row.reshape(trailing) for row in out]


def _gather(values: NDArray, order: NDArray[np.intp]) -> NDArray:
    """``values[r, order[r]]`` for each row r; a loop over rows is three times faster than fancy indexing."""
    out = np.empty_like(values)
    for target, source, index in zip(out, values, order, strict=True):
        source.take(index, out=target, mode="clip")
    return out


def _scatter(values: Floats, order: NDArray[np.intp]) -> Floats:
    """The inverse of ``_gather``."""
    out = np.empty_like(values)
    for target, source, index in zip(out, values, order, strict=True):
        target[index] = source
    return out


def _normal_scores(ranked: Floats) -> Floats:
    """Normal scores of rows in ascending order, shape (R, n); tied values share their average rank."""
    num_rows, n = ranked.shape
    table = ndtri((np.arange(2, 2 * n + 1) / 2 - 3 / 8) / (n - 2 * 3 / 8 + 1))  # of ranks 1, 1.5, 2, ..., n
    scores = np.empty((num_rows, n))
    scores[:] = table[::2]
    tied = np.zeros((num_rows, n + 1), dtype=bool)  # with the value before; the edges close the runs
    np.equal(ranked[:, 1:], ranked[:, :-1], out=tied[:, 1:n])
    if not tied.any():
        return scores
    first = np.flatnonzero(tied[:, 1:] & ~tied[:, :-1])
    last = np.flatnonzero(tied[:, :-1] & ~tied[:, 1:])
    lengths = last - first + 1
    before = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(first - before, lengths)
    scores.reshape(-1)[positions] = np.repeat(table[first % n + last % n], lengths)
    return scores


def _rhat(scores: Floats) -> Floats:
    """Potential scale reduction of chains of shape (R, M, n)."""
    n = scores.shape[2]
    between = n * scores.mean(axis=2).var(axis=1, ddof=1)
    within = scores.var(axis=2, ddof=1).mean(axis=1)
    return np.sqrt((between / within + n - 1) / n)


def _quantiles(values: Floats, ranked: Floats | None, probabilities: tuple[float, ...]) -> list[Floats]:
    """Quantiles of each row by R's definition 7, from the rows in order where they are at hand."""
    n = values.shape[1]
    positions = [n * probability + (1 - probability) for probability in probabilities]
    below = [int(np.clip(np.floor(position), 1, n - 1)) for position in positions]
    if ranked is None:
        ranked = np.partition(values, sorted({i for k in below for i in (k - 1, k)}), axis=1)
    weights = [np.clip(position - k, 0, 1) for position, k in zip(positions, below, strict=True)]
    return [(1 - w) * ranked[:, k - 1] + w * ranked[:, k] for w, k in zip(weights, below, strict=True)]


def _autocovariance(chains: Floats) -> Floats:
    """Autocovariance at every lag, averaged over the chains, shape (R, M, n) -> (R, n)."""
    n = chains.shape[2]
    length = next_fast_len(2 * n)
    spectrum = np.fft.rfft(chains - chains.mean(axis=2, keepdims=True), n=length, axis=2)
    spectrum *= np.conjugate(spectrum)
    by_chain = np.fft.irfft(spectrum, n=length, axis=2)[:, :, :n] / n
    # Summed in ArviZ's order: with draws of few distinct values a pair of Geyer's sequence can be exactly zero,
    # and then the rounding decides where the sequence ends.
    return np.ascontiguousarray(np.swapaxes(by_chain, 1, 2)).mean(axis=2)


def effective_size(chains: Floats) -> Floats:
    """Effective sample size of chains of shape (R, M, n), by Geyer's initial monotone sequence of pairs of lags."""
    num_chains, n = chains.shape[1:]
    total = num_chains * n
    covariance = _autocovariance(chains)
    within = covariance[:, :1] * n / (n - 1.0)
    pooled = within * (n - 1.0) / n
    if num_chains > 1:
        pooled = pooled + chains.mean(axis=2).var(axis=1, ddof=1)[:, None]
    correlation = 1.0 - (within - covariance) / pooled
    correlation[:, 0] = 1.0
    limit = max(0, (n - 3) // 2)  # the last pair that may be looked at
    even = correlation[:, : 2 * limit + 1 : 2]
    pairs = even + correlation[:, 1 : 2 * limit + 2 : 2]
    alive = np.logical_and.accumulate(pairs[:, :limit] > 0, axis=1)
    last = alive.sum(axis=1)  # the pairs before this one count whole, and the even half of this one if positive
    odd_end = np.take_along_axis(even, last[:, None], axis=1)[:, 0]
    kept = (odd_end > 0) | ((last > 0) & (np.take_along_axis(pairs, last[:, None], axis=1)[:, 0] >= 0))
    monotone = np.minimum.accumulate(pairs[:, :limit], axis=1)
    tau = -1.0 + 2.0 * np.where(alive, monotone, 0.0).sum(axis=1) + np.where(kept, odd_end, 0.0)
    size = total / np.maximum(tau, 1 / np.log10(total))
    size[np.isnan(correlation[:, 1])] = np.nan
    span = chains.max(axis=(1, 2)) - chains.min(axis=(1, 2))
    size[span < np.finfo(np.float64).resolution] = total
    return size
