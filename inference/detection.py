"""Out-of-distribution detection: does the uncertainty rise where the model knows nothing?

The score is larger where the datum looks foreign: predictive entropy, mutual information, epistemic variance, minus the
largest probability. Out of distribution is the positive class throughout.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from inference.arrays import Array, Floats, as_finite


def auroc(scores: Array, is_ood: Array) -> float:
    """Area under the ROC curve of a score that should be larger out of distribution (the positive class).

    Args:
        scores: Such as predictive entropy, mutual information or minus the largest probability, shape (N,).
        is_ood: True or 1 where the datum is out of distribution, shape (N,).

    Returns:
        Probability that an out-of-distribution datum scores higher than another one; ties count 1/2.

    Raises:
        ValueError: If the shapes differ, a score is not finite, or one of the two kinds is missing.
    """
    values, positive = _check_detection(scores, is_ood)
    return float(roc_auc_score(positive, values))


def aupr(scores: Array, is_ood: Array) -> float:
    """Average precision of the same score, out of distribution being the positive class.

    Args:
        scores: Scores, larger out of distribution, shape (N,).
        is_ood: True or 1 where the datum is out of distribution, shape (N,).

    Returns:
        Average precision; a useless score has the share of positives, not 1/2.

    Raises:
        ValueError: If the shapes differ, a score is not finite, or one of the two kinds is missing.
    """
    values, positive = _check_detection(scores, is_ood)
    return float(average_precision_score(positive, values))


def fpr95(scores: Array, is_ood: Array) -> float:
    """Share of in-distribution data flagged at the strictest threshold that finds 95 % of the others.

    Args:
        scores: Scores, larger out of distribution, shape (N,).
        is_ood: True or 1 where the datum is out of distribution, shape (N,).

    Returns:
        False positive rate, 0 to 1; 1 for a constant score.

    Raises:
        ValueError: If the shapes differ, a score is not finite, or one of the two kinds is missing.
    """
    values, positive = _check_detection(scores, is_ood)
    false_positive, true_positive, _ = roc_curve(positive, values, drop_intermediate=False)
    return float(false_positive[np.argmax(true_positive >= 0.95)])


def _check_detection(scores: Array, is_ood: Array) -> tuple[Floats, NDArray[np.bool_]]:
    values, kinds = as_finite("scores", scores), as_finite("is_ood", is_ood)
    if values.ndim != 1 or values.shape != kinds.shape:
        raise ValueError(f"scores and is_ood must both have shape (N,), got {values.shape} and {kinds.shape}")
    if not np.isin(kinds, (0, 1)).all() or kinds.min() == kinds.max():
        raise ValueError(f"is_ood must hold both 0 and 1 and nothing else, got {np.unique(kinds)[:5]}")
    return values, kinds == 1
