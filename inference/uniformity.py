r"""Are ranks uniform, and if not, how do they deviate?

Two tests: chi-square on a histogram, and the simultaneous envelope of the empirical distribution function. Under
uniformity R times its value at z is binomial(R, z); the envelope takes each point's central interval of the one level
:math:`\gamma` at which all points together hold with probability :math:`1 - \alpha`, found by simulation. Source:
sailynoja2022graphical [recalled from the paper, not re-read; they also give a faster recursion].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from inference.arrays import Array, Floats, as_floats

_SIMULATIONS = 10_000
_MAX_POINTS = 100
_MAX_Z = 3.0


@dataclass(frozen=True)
class Uniformity:
    """Verdict on the ranks of one scalar.

    Attributes:
        name: The scalar.
        chi_square: p-value of the histogram.
        envelope: p-value of the largest departure of the empirical distribution function.
        shift: z-score of the mean rank; positive where truths lie above the draws.
        spread: z-score of the mean squared distance from the middle; positive where ranks pile up at both ends.
        ratio: That mean square over its value 1/12 under uniformity.
    """

    name: str
    chi_square: float
    envelope: float
    shift: float
    spread: float
    ratio: float

    @property
    def pvalue(self) -> float:
        """Twice the smaller of the two p-values, at most 1."""
        return min(1.0, 2 * min(self.chi_square, self.envelope))

    @property
    def shape(self) -> str:
        """The deviation in words: posteriors too narrow, too wide, or shifted."""
        if max(abs(self.shift), abs(self.spread)) <= _MAX_Z:
            return "no clear shape"
        if abs(self.spread) >= abs(self.shift):
            return f"too {'narrow' if self.spread > 0 else 'wide'}"
        return f"shifted {'down' if self.shift > 0 else 'up'}"


def uniformity(name: str, pit: Array) -> Uniformity:
    """Test ranks for uniformity.

    Args:
        name: What was ranked.
        pit: Ranks as numbers in (0, 1), (R,).

    Returns:
        p-values and the shape of the deviation.

    Raises:
        ValueError: If there are fewer than 20 ranks, or one is outside [0, 1].
    """
    values = as_floats("pit", pit)
    if values.ndim != 1 or len(values) < 20 or values.min() < 0 or values.max() > 1:
        raise ValueError(f"pit must be at least 20 numbers in [0, 1], got shape {values.shape}; run more replicates")
    counts = histogram(values)
    num = len(values)
    moved, squares = values - 0.5, np.square(values - 0.5)
    points, null = _null(num)
    worst = _pointwise(np.searchsorted(np.sort(values), points, side="right")[None], num)[0]
    return Uniformity(
        name,
        chi_square=float(stats.chisquare(counts).pvalue),
        envelope=float((1 + np.count_nonzero(null <= worst * (1 + 1e-9))) / (1 + len(null))),
        shift=float(moved.mean() * np.sqrt(12 * num)),
        spread=float((squares.mean() - 1 / 12) * np.sqrt(180 * num)),
        ratio=float(12 * squares.mean()),
    )


def histogram(pit: Floats) -> np.ndarray:
    """Counts of ranks in equal bins: about fifteen expected in each, at most twenty bins."""
    bins = int(np.clip(len(pit) // 15, 4, 20))
    return np.histogram(pit, bins=bins, range=(0.0, 1.0))[0]


def envelope(num: int, level: float = 0.99) -> tuple[Floats, Floats, Floats]:
    """Simultaneous band of the empirical distribution function of uniform numbers.

    Args:
        num: Number of ranks R.
        level: Probability that the whole function stays inside.

    Returns:
        Points z, and lower and upper limits of the distribution function there.

    Raises:
        ValueError: If ``level`` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")
    points, null = _null(num)
    gamma = float(np.quantile(null, 1 - level))
    lower, upper = (stats.binom.ppf(tail, num, points) / num for tail in (gamma / 2, 1 - gamma / 2))
    return points, lower, upper


@cache
def _null(num: int) -> tuple[Floats, Floats]:
    """Grid, and the smallest pointwise p-value of simulated uniform samples of this size."""
    cells = min(num, _MAX_POINTS)
    points = np.arange(1, cells) / cells
    counts = np.random.default_rng(0).multinomial(num, np.full(cells, 1 / cells), size=_SIMULATIONS)
    return points, _pointwise(np.cumsum(counts, axis=1)[:, :-1], num)


def _pointwise(counts: np.ndarray, num: int) -> Floats:
    """Smallest two-sided binomial p-value along each row of counts below the grid's points, (T, K) to (T,)."""
    return _pvalues(num, counts.shape[1])[counts, np.arange(counts.shape[1])].min(axis=1)


@cache
def _pvalues(num: int, num_points: int) -> Floats:
    """Two-sided binomial p-value of each count below each point, (R + 1, K)."""
    counts, points = np.arange(num + 1)[:, None], np.arange(1, num_points + 1) / (num_points + 1)
    return 2 * np.minimum(stats.binom.cdf(counts, num, points), stats.binom.sf(counts - 1, num, points))
