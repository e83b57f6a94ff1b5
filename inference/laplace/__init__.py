"""Laplace approximations: a Gaussian at a mode of the posterior, from its curvature there."""

from inference.laplace.dense import DenseLaplace
from inference.laplace.diagonal import DiagonalLaplace
from inference.laplace.kronecker import KroneckerLaplace
from inference.laplace.low_rank import LowRankLaplace

__all__ = ["DenseLaplace", "DiagonalLaplace", "KroneckerLaplace", "LowRankLaplace"]
