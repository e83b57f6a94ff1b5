"""Published results on the standard UCI splits, to stand beside ours: one network of 50 hidden units, 20 splits.

Test log-likelihoods are nats per datum in original units, higher is better; RMSE in original units. The number after
each figure is a standard error over splits unless the row says otherwise. What differs from our protocol is said in
the row: no row is a bar to clear unless the protocols agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Figure = tuple[float, float | None]


@dataclass(frozen=True)
class Published:
    """One column of a published table.

    Attributes:
        name: What the table calls the method.
        source: Where the figures come from.
        note: What to keep in mind, and how the figures were obtained.
        log_likelihood: Test log-likelihood and its spread, by data set.
        rmse: Test RMSE and its spread, by data set.
        spread: What the second number of each figure is.
    """

    name: str
    source: str
    note: str
    log_likelihood: Mapping[str, Figure] = field(default_factory=dict)
    rmse: Mapping[str, Figure] = field(default_factory=dict)
    spread: str = "standard error"


_SETS = ("boston", "concrete", "energy", "wine", "yacht")


def _column(*figures: tuple[float, float | None]) -> dict[str, Figure]:
    return dict(zip(_SETS, figures, strict=True))


PBP = Published(
    "PBP",
    "Lakshminarayanan et al. 2017, Table 1, after Hernandez-Lobato and Adams 2015",
    "probabilistic backpropagation; read in the source",
    _column((-2.57, 0.09), (-3.16, 0.02), (-2.04, 0.02), (-0.97, 0.01), (-1.63, 0.02)),
    _column((3.01, 0.18), (5.67, 0.09), (1.80, 0.05), (0.64, 0.01), (1.02, 0.05)),
)
VI_GRAVES = Published(
    "VI (Graves)",
    "Hernandez-Lobato and Adams 2015",
    "mean-field variational inference; recalled from the paper, not re-read",
    _column((-2.903, 0.071), (-3.391, 0.017), (-2.391, 0.029), (-0.980, 0.013), (-3.439, 0.163)),
    _column((4.320, None), (7.128, None), (2.646, None), (0.646, None), (6.887, None)),
)
MCD_GRID = Published(
    "MC dropout, grid search",
    "per-split result files of the 2018 rerun of Gal and Ghahramani 2016, mean and standard error recomputed",
    "hyperparameters chosen inside each training part, 10,000 passes; read in the source",
    _column((-2.402, 0.042), (-2.937, 0.025), (-1.212, 0.005), (-0.928, 0.013), (-1.250, 0.015)),
    _column((2.904, 0.177), (4.827, 0.161), (0.539, 0.014), (0.622, 0.008), (0.666, 0.049)),
)
DEEP_ENSEMBLE_5 = Published(
    "Deep ensemble, 5 members",
    "Lakshminarayanan et al. 2017, Table 1",
    "a second output for the noise, adversarial training; read in the source",
    _column((-2.41, 0.25), (-3.06, 0.18), (-1.38, 0.22), (-0.94, 0.12), (-1.18, 0.21)),
    _column((3.28, 1.00), (6.03, 0.58), (2.09, 0.29), (0.64, 0.04), (1.58, 0.48)),
    spread="standard deviation",
)
HMC_BUI = Published(
    "HMC",
    "Bui et al. 2016",
    "its own tuning and noise model; recalled from the paper, not re-read: a direction, not a bar",
    _column((-2.27, 0.03), (-2.72, 0.02), (-0.93, 0.01), (-0.91, 0.02), (-1.62, 0.01)),
)

PUBLISHED = (VI_GRAVES, PBP, MCD_GRID, DEEP_ENSEMBLE_5, HMC_BUI)
"""Every row, oldest first."""
