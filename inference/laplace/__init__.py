"""Laplace approximations: a Gaussian at a mode of the posterior, from its curvature there."""

from inference.laplace.dense import DenseLaplace
from inference.laplace.diagonal import DiagonalLaplace

__all__ = ["DenseLaplace", "DiagonalLaplace"]
