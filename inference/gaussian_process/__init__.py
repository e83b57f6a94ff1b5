"""Gaussian processes by stochastic gradients: posterior draws without an N x N matrix."""

from inference.gaussian_process.kernels import RBF, Linear, Matern
from inference.gaussian_process.sampler import FunctionMoments, FunctionPosterior, SGDPosteriorSampler

__all__ = ["RBF", "FunctionMoments", "FunctionPosterior", "Linear", "Matern", "SGDPosteriorSampler"]
