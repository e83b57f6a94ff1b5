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
from inference.laplace import DenseLaplace, DiagonalLaplace
from inference.mcmc import HMC, NUTS
from inference.particles import SVGD
from inference.point import MAP, Subset
from inference.posterior import DrawsPosterior, GaussianPosterior, MixturePosterior, Posterior
from inference.prediction import Prediction
from inference.registry import BACKENDS, find_backend
from inference.storage import load
from inference.target import Target, compile_target
from inference.variational import MeanFieldVI

__all__ = [
    "BACKENDS",
    "HMC",
    "MAP",
    "NUTS",
    "SVGD",
    "SWAG",
    "ApproximationWarning",
    "Backend",
    "CapabilityError",
    "ConvergenceWarning",
    "DeepEnsemble",
    "DenseLaplace",
    "DiagonalLaplace",
    "DivergenceWarning",
    "DrawsPosterior",
    "FitInfo",
    "GaussianPosterior",
    "MeanFieldVI",
    "MixturePosterior",
    "NonFiniteError",
    "Posterior",
    "Prediction",
    "PyroGuideVI",
    "PyroMCMC",
    "Subset",
    "Target",
    "UnsupportedModelError",
    "compile_target",
    "find_backend",
    "load",
]
