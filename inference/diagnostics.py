r"""Convergence diagnostics of draws: is the fit to be trusted?

R-hat compares the variance between chains with the variance within them; the effective sample size says how many
independent draws the correlated ones are worth. Both are computed on normal scores of ranks,

.. math:: z = \Phi^{-1}\left(\frac{r - 3/8}{n + 1/4}\right),

so that they exist for any posterior, and both split each chain in two, so that a drifting chain disagrees with itself.

All functions take draws of shape (C, S, ...), in weight space (C, S, P) or in function space (C, S, N, K), and return
one figure per trailing index, equal to ArviZ's. They sort whole blocks of scalars at once and read the normal scores
from a table; the work memory is bounded however many scalars there are. What they cannot see: modes that no chain
visited, and in weight space the symmetries of a network, which make R-hat large where the functions agree.

Source: vehtari2021rank (Bayesian Analysis 16(2), 667-718); the details follow ArviZ 0.23.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.arrays import Array, Floats, as_numpy
from inference.psis import psis_khat, psis_weights
from inference.rank_blocks import Block, Progress, by_blocks, effective_size

__all__ = [
    "Convergence",
    "StandardErrors",
    "bfmi",
    "convergence",
    "ess_bulk",
    "ess_evolution",
    "ess_mean",
    "ess_quantile",
    "ess_tail",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "nested_rhat",
    "psis_khat",
    "psis_weights",
    "rhat",
    "standard_errors",
]


@dataclass(frozen=True)
class Convergence:
    """The four figures to report for every scalar, each of the trailing shape of the draws.

    Attributes:
        rhat: The larger of bulk and folded rank-normalised split R-hat; NaN for a single chain.
        ess_bulk: Effective sample size of the centre of the distribution, in draws.
        ess_tail: The smaller of the effective sample sizes of the 5 % and 95 % quantiles, in draws.
        mcse_mean: Monte-Carlo standard error of the mean, in the units of the draws.
    """

    rhat: Floats
    ess_bulk: Floats
    ess_tail: Floats
    mcse_mean: Floats


@dataclass(frozen=True)
class StandardErrors:
    """Monte-Carlo standard errors of every scalar, each of the trailing shape, in the units of the draws.

    Attributes:
        mean: Of the mean.
        sd: Of the standard deviation.
        quantile: The larger of those of the 5 % and the 95 % quantile.
    """

    mean: Floats
    sd: Floats
    quantile: Floats


def convergence(draws: Array, *, progress: Progress | None = None) -> Convergence:
    """R-hat, bulk and tail ESS and the standard error of the mean, sharing one sort.

    Args:
        draws: Draws, shape (C, S, ...); float32 is read without a copy and computed in float64.
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        The four figures; NaN where a scalar holds NaN or S < 4.

    Example:
        >>> import numpy as np
        >>> found = convergence(np.random.default_rng(0).normal(size=(4, 500, 3)))
        >>> found.rhat.shape, bool((found.rhat < 1.02).all())
        ((3,), True)
    """

    def figures(block: Block) -> tuple[Floats, ...]:
        return block.rhat(), effective_size(block.bulk_scores), block.ess_tail(), block.mcse_mean()

    return Convergence(*by_blocks(draws, figures, 4, progress))


def rhat(draws: Array, *, progress: Progress | None = None) -> Floats:
    r"""Rank-normalised split R-hat, the larger of the bulk and the folded one.

    With W the mean variance within the 2C half chains, B/n the variance of their means, n draws in each,
    :math:`\hat R = \sqrt{((n - 1) W / n + B / n) / W}`.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        R-hat of each scalar, of the trailing shape; 1 when the chains agree, above 1.01 look again; NaN for one
        chain, for S < 4, for constant draws and where a draw is NaN.
    """
    return by_blocks(draws, lambda block: (block.rhat(),), 1, progress)[0]


def ess_bulk(draws: Array, *, progress: Progress | None = None) -> Floats:
    """Effective sample size of the normal scores: how well the centre of the distribution is known.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Effective number of draws of each scalar; C S for constant draws, NaN for S < 4 and where a draw is NaN.
    """
    return by_blocks(draws, lambda block: (effective_size(block.bulk_scores),), 1, progress)[0]


def ess_tail(draws: Array, *, progress: Progress | None = None) -> Floats:
    """Effective sample size of the tails: the smaller one of the 5 % and the 95 % quantile.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Effective number of draws of each scalar; NaN for S < 4 and where a draw is NaN.
    """
    return by_blocks(draws, lambda block: (block.ess_tail(),), 1, progress)[0]


def ess_mean(draws: Array, *, progress: Progress | None = None) -> Floats:
    """Effective sample size of the draws themselves, not of their ranks: for the mean, where the variance exists.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Effective number of draws of each scalar; NaN for S < 4 and where a draw is not finite.
    """
    return by_blocks(draws, lambda block: (effective_size(block.split),), 1, progress)[0]


def mcse_mean(draws: Array, *, progress: Progress | None = None) -> Floats:
    """Monte-Carlo standard error of the mean, standard deviation over the root of ``ess_mean``.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Standard error of each scalar, in the units of the draws; NaN for S < 4 and where a draw is not finite.
    """
    return by_blocks(draws, lambda block: (block.mcse_mean(),), 1, progress)[0]


def mcse_sd(draws: Array, *, progress: Progress | None = None) -> Floats:
    """Monte-Carlo standard error of the standard deviation, by the delta method on the mean of squares.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Standard error of each scalar, in the units of the draws; NaN for S < 4, for constant draws and where a
        draw is not finite.
    """
    return by_blocks(draws, lambda block: (block.mcse_sd(),), 1, progress)[0]


def ess_quantile(draws: Array, probability: float, *, progress: Progress | None = None) -> Floats:
    """Effective sample size of a quantile: of the indicator of lying below it.

    Args:
        draws: Draws, shape (C, S, ...).
        probability: Level of the quantile, in (0, 1).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Effective number of draws of each scalar; NaN for S < 4 and where a draw is NaN.
    """
    _check_probability(probability)
    return by_blocks(draws, lambda block: (block.ess_quantile(probability)[1],), 1, progress)[0]


def mcse_quantile(draws: Array, probability: float, *, progress: Progress | None = None) -> Floats:
    """Monte-Carlo standard error of a quantile, from the beta law of an order statistic of ``ess_quantile`` draws.

    Args:
        draws: Draws, shape (C, S, ...).
        probability: Level of the quantile, in (0, 1).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        Standard error of each scalar, in the units of the draws; NaN for S < 4 and where a draw is NaN.
    """
    _check_probability(probability)
    return by_blocks(draws, lambda block: (block.mcse_quantile(probability),), 1, progress)[0]


def standard_errors(draws: Array, *, progress: Progress | None = None) -> StandardErrors:
    """Standard errors of mean, standard deviation and tail quantiles.

    Args:
        draws: Draws, shape (C, S, ...).
        progress: Called as ``progress(done, total)`` in scalars after each block.

    Returns:
        The three figures; NaN where a scalar holds NaN or S < 4.
    """

    def figures(block: Block) -> tuple[Floats, ...]:
        tails = np.maximum(block.mcse_quantile(0.05), block.mcse_quantile(0.95))
        return block.mcse_mean(), block.mcse_sd(), tails

    return StandardErrors(*by_blocks(draws, figures, 3, progress))


def ess_evolution(draws: Array, num_points: int = 10) -> tuple[NDArray[np.intp], Floats]:
    """Bulk effective sample size of the first draws of each chain: grows in proportion to them when chains mix.

    Args:
        draws: Draws, shape (C, S, ...).
        num_points: Number of lengths, spread evenly up to S.

    Returns:
        Lengths in draws per chain, (n,), and the effective number of draws at each, (n, ...).

    Raises:
        ValueError: If ``num_points`` is below 1 or there are fewer than 4 draws per chain.
    """
    array = as_numpy(draws)
    if num_points < 1 or array.ndim < 2 or array.shape[1] < 4:
        raise ValueError(
            f"an evolution needs num_points >= 1 and draws of shape (C, S, ...) with S >= 4, got {num_points} and "
            f"{array.shape}"
        )
    lengths = np.unique(np.linspace(array.shape[1] / num_points, array.shape[1], num_points).round().astype(int))
    lengths = lengths[lengths >= 4]
    return lengths, np.stack([ess_bulk(array[:, :length]) for length in lengths])


def nested_rhat(draws: Array, superchains: int | Array) -> Floats:
    r"""Nested R-hat, for many short chains: superchains of M chains that share a starting point.

    With :math:`\hat B` the variance of the K superchains' means, :math:`\tilde B_k` that of the chains' means within
    superchain k and :math:`\tilde W_k` the mean variance within its chains,

    .. math:: \hat R_\nu = \sqrt{1 + \hat B / \hat W}, \qquad \hat W = \frac1K \sum_k (\tilde B_k + \tilde W_k).

    Near 1 even for single draws when all chains have forgotten their starting points; about
    :math:`\sqrt{1 + 1/(M\,\mathrm{ESS})}` then, with the effective size of one chain. Chains that started apart may
    be grouped too, which makes the figure less sensitive. Draws are not ranked. Source: margossian2024nested [recalled
    from the paper, not re-read].

    Args:
        draws: Draws, shape (C, S, ...).
        superchains: Number K >= 2 of superchains, of C / K consecutive chains each, or the superchain of each chain,
            (C,), all of one size.

    Returns:
        One figure per scalar, of the trailing shape; NaN where all draws are equal or one is NaN.

    Raises:
        ValueError: If the draws have no chains, or the superchains do not fit them.
    """
    array = as_numpy(draws)
    if array.ndim < 2 or array.dtype.kind not in "fiub":
        raise ValueError(f"draws must be real numbers of shape (C, S, ...), got {array.dtype} of shape {array.shape}")
    ids = _superchains(superchains, array.shape[0])
    count = len(np.unique(ids))
    ordered = array[np.argsort(ids, kind="stable")].astype(np.float64, copy=False)
    length = ordered.shape[1]
    means = ordered.mean(axis=1).reshape(count, -1, *array.shape[2:])  # (K, M, ...)
    within = (
        ordered.var(axis=1, ddof=1).reshape(means.shape).mean(axis=1) if length > 1 else np.zeros(means[:, 0].shape)
    )
    between_chains = means.var(axis=1, ddof=1) if means.shape[1] > 1 else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(1 + means.mean(axis=1).var(axis=0, ddof=1) / (between_chains + within).mean(axis=0))


def bfmi(energy: Array) -> Floats:
    r"""Bayesian fraction of missing information, :math:`\sum_s (E_s - E_{s-1})^2 / \sum_s (E_s - \bar E)^2`.

    Args:
        energy: Hamiltonian of each accepted state, nats, shape (C, S).

    Returns:
        One figure per chain, shape (C,); below 0.3 the momentum refreshment explores the energies too slowly.

    Raises:
        ValueError: If energy is not of shape (C, S) with S >= 2.
    """
    values = as_numpy(energy).astype(np.float64, copy=False)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"energy must have shape (C, S) with S >= 2, got {values.shape}; pass one row per chain")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.square(np.diff(values, axis=1)).mean(axis=1) / values.var(axis=1, ddof=1)


def _check_probability(probability: float) -> None:
    """Raise unless a quantile's level is inside (0, 1)."""
    if not 0 < probability < 1:
        raise ValueError(f"`probability` must be between 0 and 1, got {probability}")


def _superchains(given: int | Array, num_chains: int) -> NDArray:
    """The superchain of each chain."""
    if isinstance(given, int):
        if given < 2 or num_chains % given:
            raise ValueError(f"{num_chains} chains do not make {given} superchains of one size, at least 2 of them")
        return np.repeat(np.arange(given), num_chains // given)
    ids = as_numpy(given)
    sizes = np.unique(ids, return_counts=True)[1] if ids.shape == (num_chains,) else np.array([])
    if len(sizes) < 2 or sizes.min() != sizes.max():
        raise ValueError(
            f"`superchains` must name one of at least 2 superchains of one size for each of {num_chains} chains"
        )
    return ids
