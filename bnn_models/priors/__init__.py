r"""Priors over network weights, as normalised Pyro distributions on whole tensors.

A prior is a frozen dataclass. A model asks it for the distribution of one tensor, described by a `Slot` (site name,
shape, fan-in, bias or not), and samples that under the site's name. Scales stay Python floats until the model runs, so
the prior follows the dtype and the device of the data. With ``scale="fan_in"`` the standard deviation of a weight is
:math:`s_w / \sqrt{\text{fan-in}}`, which keeps network outputs of order one at any width (Neal 1996; the convention of
Fortuin et al. 2022); a bias gets the standard deviation :math:`s_w` itself, where :math:`s_w` is ``gain``.
"""

from bnn_models.priors.assignment import PerSite, assign
from bnn_models.priors.base import Prior, Slot
from bnn_models.priors.empirical import EmpCov
from bnn_models.priors.hierarchical import Hierarchical
from bnn_models.priors.independent import Laplace, Logistic, Normal, ScaleMixture, StudentT

__all__ = [
    "EmpCov",
    "Hierarchical",
    "Laplace",
    "Logistic",
    "Normal",
    "PerSite",
    "Prior",
    "ScaleMixture",
    "Slot",
    "StudentT",
    "assign",
]
