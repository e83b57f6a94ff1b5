"""Laplace approximations: a Gaussian at a mode of the posterior, from its curvature there."""

from inference.laplace.dense import DenseLaplace
from inference.laplace.diagonal import DiagonalLaplace
from inference.laplace.functional import FunctionalLaplace
from inference.laplace.kronecker import KroneckerLaplace
from inference.laplace.linear_mode import tune_at_linear_mode
from inference.laplace.log_evidence import LaplaceEvidence, laplace_evidence
from inference.laplace.low_rank import LowRankLaplace
from inference.laplace.online import OnlineLaplace
from inference.laplace.sampled import SampledLaplace
from inference.laplace.tuned import TunedPrior
from inference.laplace.tuning import tune_prior

__all__ = [
    "DenseLaplace",
    "DiagonalLaplace",
    "FunctionalLaplace",
    "KroneckerLaplace",
    "LaplaceEvidence",
    "LowRankLaplace",
    "OnlineLaplace",
    "SampledLaplace",
    "TunedPrior",
    "laplace_evidence",
    "tune_at_linear_mode",
    "tune_prior",
]
