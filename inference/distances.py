"""Distances between a prediction and a reference's, such as that of long HMC chains on the same model.

Classification compares probabilities (N, K); regression compares draws (S, N, ...) with (T, N, ...), datum by datum.
"""

import numpy as np

from inference.arrays import Array, Floats, as_finite, check_probs, column_blocks


def agreement(probs: Array, reference: Array) -> float:
    """Share of data where the prediction and the reference name the same class.

    Args:
        probs: Predicted probabilities, shape (N, K).
        reference: The reference's probabilities, shape (N, K).

    Returns:
        Agreement, 0 to 1.

    Raises:
        ValueError: If either is not an array of probabilities, or the shapes differ.
    """
    p, q = _check_two_probs(probs, reference)
    return float(np.mean(p.argmax(axis=1) == q.argmax(axis=1)))


def total_variation(probs: Array, reference: Array) -> float:
    r"""Mean total variation distance, :math:`\tfrac12 \sum_k |p_k - q_k|`.

    Args:
        probs: Predicted probabilities, shape (N, K).
        reference: The reference's probabilities, shape (N, K).

    Returns:
        Distance, 0 to 1, averaged over the data.

    Raises:
        ValueError: If either is not an array of probabilities, or the shapes differ.
    """
    p, q = _check_two_probs(probs, reference)
    return float(np.abs(p - q).sum(axis=1).mean() / 2)


def wasserstein1(draws: Array, reference: Array) -> Floats:
    r"""Exact one-dimensional Wasserstein distance of two samples, :math:`\int |F^{-1}(u) - G^{-1}(u)| du`, per datum.

    Args:
        draws: Draws from the prediction, shape (S, N, ...).
        reference: Draws from the reference, shape (T, N, ...); T may differ from S.

    Returns:
        Distance at each datum, in the units of the draws, shape (N, ...).

    Raises:
        ValueError: If the shapes do not fit, or a number is not finite.
    """
    a, b = _check_two_samples(draws, reference)
    # Both quantile functions are steps, at multiples of 1/S and of 1/T; in units of 1/(S T) the steps are exact.
    steps = np.union1d(np.arange(len(a) + 1) * len(b), np.arange(len(b) + 1) * len(a))
    share = np.diff(steps) / (len(a) * len(b))
    left, right = a.reshape(len(a), -1), b.reshape(len(b), -1)
    out = np.empty(left.shape[1])
    for block in column_blocks(len(steps), left.shape[1]):
        x, y = np.sort(left[:, block], axis=0), np.sort(right[:, block], axis=0)
        out[block] = share @ np.abs(x[steps[:-1] // len(b)] - y[steps[:-1] // len(a)])
    return out.reshape(a.shape[1:])


def variance_ratio(draws: Array, reference: Array) -> Floats:
    """Variance of the draws over that of the reference, per datum: below 1 too sure, above 1 too unsure.

    Args:
        draws: Draws from the prediction, shape (S, N, ...).
        reference: Draws from the reference, shape (T, N, ...); T may differ from S.

    Returns:
        Ratio at each datum, shape (N, ...).

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, there are fewer than two draws, or the reference
            does not vary at some datum.
    """
    a, b = _check_two_samples(draws, reference)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"a variance needs at least 2 draws, got {len(a)} and {len(b)}")
    spread = b.var(axis=0, ddof=1)
    if (spread == 0).any():
        raise ValueError("reference must vary at every datum, but its variance is 0 somewhere; drop those data")
    return a.var(axis=0, ddof=1) / spread


def _check_two_probs(probs: Array, reference: Array) -> tuple[Floats, Floats]:
    p, q = check_probs("probs", probs), check_probs("reference", reference)
    if p.shape != q.shape:
        raise ValueError(f"probs and reference must have one shape, got {p.shape} and {q.shape}")
    return p, q


def _check_two_samples(draws: Array, reference: Array) -> tuple[Floats, Floats]:
    a, b = as_finite("draws", draws), as_finite("reference", reference)
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"draws (S, N, ...) and reference (T, N, ...) must agree on the data, got {a.shape} and {b.shape}"
        )
    return a, b
