"""What must be known to change the noise scale of a Normal likelihood without running the network again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inference.jacobians import CHUNK_BYTES, chunk_size
from inference.taps import few, floats_per_datum, passes
from inference.target import Target


@dataclass(frozen=True, eq=False)
class Noise:
    """Residuals under a Normal likelihood of known scale.

    Attributes:
        log_scale: Mean of the logarithms of the declared scales; the logarithm of the scale where there is one.
        squares: Sum of the squared residuals over the declared variances.
        count: Number of targets, N times those of one datum.
    """

    log_scale: float
    squares: float
    count: int


def normal_noise(target: Target, theta: Tensor) -> Noise | None:
    """Residuals under a Normal likelihood of known scale, in float64.

    Args:
        target: The model.
        theta: Parameters, (P,).

    Returns:
        The residuals, or None for any other likelihood.
    """
    family = target.family(few(target, target.x))
    if family.kind != "normal" or "scale" in family.varying:
        return None
    logs = squares = 0.0
    size = chunk_size(floats_per_datum(target, 0), theta, CHUNK_BYTES)
    for rows, _, done in passes(target, theta, target.x, size):
        loc, scale = done.params["loc"].detach().double(), done.params["scale"].detach().double()
        squares += float(((target.y[rows] - loc) / scale).square().sum())
        logs += float(scale.log().expand_as(loc).sum())
    count = target.y.numel()
    return Noise(logs / count, squares, count)


def require_noise(noise: Noise | None, target: Target) -> Noise:
    """Refuse to change the noise of a likelihood that has none to change.

    Args:
        noise: Residuals, where there are any.
        target: The model.

    Returns:
        The residuals.

    Raises:
        ValueError: If there are none.
    """
    if noise is not None:
        return noise
    family = target.family(few(target, target.x))
    what = "a Normal whose scale is latent" if family.kind == "normal" else f"{family.cls.__name__}"
    raise ValueError(
        f"only the noise of a Normal likelihood of known scale is chosen here, but the likelihood is {what}: a latent "
        "scale is learnt with the mode and integrated over by the curvature, so leave the noise out"
    )
