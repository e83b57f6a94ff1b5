"""Approximate inference for Bayesian neural networks declared in Pyro: one model, any backend.

Example:
    >>> import torch, pyro, pyro.distributions as dist
    >>> from inference import MAP
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)
    >>> x = torch.tensor([1.0, 2.0]); y = torch.tensor([1.0, 2.0])
    >>> posterior = MAP().fit(model, x, y)
    >>> round(float(posterior.mean_theta), 3)  # x.y / (x.x + 1)
    0.833
"""

from inference.averaging import SWAG
from inference.backend import Backend, FitInfo
from inference.bridges import PyroGuideVI, PyroMCMC
from inference.ensembles import DeepEnsemble
from inference.errors import (
    ApproximationWarning,
    CapabilityError,
    ConvergenceWarning,
    DivergenceWarning,
    NonFiniteError,
    UnsupportedModelError,
)
from inference.evidence import annealed_importance_sampling, evidence_bounds
from inference.gaussian_process import SGDPosteriorSampler
from inference.laplace import (
    DenseLaplace,
    DiagonalLaplace,
    FunctionalLaplace,
    KroneckerLaplace,
    LaplaceEvidence,
    LowRankLaplace,
    OnlineLaplace,
    SampledLaplace,
    TunedPrior,
    laplace_evidence,
    tune_at_linear_mode,
    tune_prior,
)
from inference.mcmc import HMC, MCLMC, MILE, NUTS, ChEESHMC
from inference.particles import SVGD
from inference.point import MAP, LargestVariance, Subset
from inference.posterior import DrawsPosterior, GaussianPosterior, MixturePosterior, Posterior
from inference.prediction import Prediction
from inference.registry import BACKENDS, find_backend
from inference.storage import load
from inference.symmetry import align
from inference.target import Target, compile_target
from inference.variational import MeanFieldVI, Pathfinder

__all__ = [
    "BACKENDS",
    "HMC",
    "MAP",
    "MCLMC",
    "MILE",
    "NUTS",
    "SVGD",
    "SWAG",
    "ApproximationWarning",
    "Backend",
    "CapabilityError",
    "ChEESHMC",
    "ConvergenceWarning",
    "DeepEnsemble",
    "DenseLaplace",
    "DiagonalLaplace",
    "DivergenceWarning",
    "DrawsPosterior",
    "FitInfo",
    "FunctionalLaplace",
    "GaussianPosterior",
    "KroneckerLaplace",
    "LaplaceEvidence",
    "LargestVariance",
    "LowRankLaplace",
    "MeanFieldVI",
    "MixturePosterior",
    "NonFiniteError",
    "OnlineLaplace",
    "Pathfinder",
    "Posterior",
    "Prediction",
    "PyroGuideVI",
    "PyroMCMC",
    "SGDPosteriorSampler",
    "SampledLaplace",
    "Subset",
    "Target",
    "TunedPrior",
    "UnsupportedModelError",
    "align",
    "annealed_importance_sampling",
    "compile_target",
    "evidence_bounds",
    "find_backend",
    "laplace_evidence",
    "load",
    "tune_at_linear_mode",
    "tune_prior",
]
