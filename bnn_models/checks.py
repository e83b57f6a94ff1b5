"""Checks and matching that priors and likelihoods share: site-name patterns, scales, hyperpriors."""

import copy
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor


def match_patterns(patterns: Iterable[str], names: Iterable[str], *, all_used: bool = True) -> dict[str, str]:
    """Find the first pattern that matches each name.

    Args:
        patterns: `fnmatch` patterns, tried in order.
        names: Site names.
        all_used: Whether each pattern has to decide about at least one name.

    Returns:
        From name to pattern.

    Raises:
        ValueError: If a name matches no pattern, or a pattern decides about no name.
    """
    patterns, names = list(patterns), list(names)
    matches = {name: next((p for p in patterns if fnmatchcase(name, p)), None) for name in names}
    unmatched = [name for name, pattern in matches.items() if pattern is None]
    if unmatched:
        raise ValueError(f"no pattern of {patterns} matches site '{unmatched[0]}'; add one, or '*' as the last pattern")
    unused = [pattern for pattern in patterns if pattern not in matches.values()]
    if all_used and unused:
        raise ValueError(f"pattern '{unused[0]}' decides about no site (the first match wins); the sites are {names}")
    return {name: pattern for name, pattern in matches.items() if pattern is not None}


def check_scale(name: str, value: object, expected: str = "a positive number") -> None:
    """Check that a hyperparameter is a positive finite number.

    Args:
        name: Name of the field, for the message.
        value: What the user gave.
        expected: What would be right, for the message.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}")


def check_positive_distribution(name: str, distribution: Any) -> None:
    """Check that a hyperprior is a univariate distribution on positive numbers.

    Args:
        name: Name of the field, for the message.
        distribution: What the user gave.

    Raises:
        ValueError: If it is not.
    """
    lower = getattr(getattr(distribution, "support", None), "lower_bound", None)
    if lower is None or bool(torch.as_tensor(lower).lt(0).any()) or distribution.support.is_discrete:
        raise ValueError(f"`{name}` must be a distribution on positive numbers, got {distribution!r}")
    if tuple(distribution.batch_shape) or tuple(distribution.event_shape):
        raise ValueError(f"`{name}` must be univariate, got shape {tuple(distribution.shape())} in {distribution!r}")


def cast_distribution(distribution: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Copy a distribution with its floating-point tensors in another dtype and on another device.

    Args:
        distribution: Any distribution; left untouched.
        dtype: Floating-point type of the copy.
        device: Device of the copy.

    Returns:
        The copy. A number that was rounded to float32 when the distribution was built stays rounded.
    """
    if isinstance(distribution, Tensor):
        return distribution.to(device, dtype if distribution.is_floating_point() else None)
    if isinstance(distribution, list | tuple) and not hasattr(distribution, "_fields"):
        return type(distribution)(cast_distribution(part, dtype, device) for part in distribution)
    if isinstance(distribution, torch.distributions.Distribution | torch.distributions.Transform):
        result = copy.copy(distribution)
        for name, value in vars(distribution).items():
            result.__dict__[name] = cast_distribution(value, dtype, device)
        return result
    return distribution
