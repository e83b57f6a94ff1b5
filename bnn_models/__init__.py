"""Bayesian neural networks as Pyro models: architectures, priors and likelihoods; nothing about inference."""

from bnn_models import likelihoods, priors
from bnn_models.mlp import MLP
from bnn_models.wrap import BayesianModule, bayesianize

__all__ = ["MLP", "BayesianModule", "bayesianize", "likelihoods", "priors"]
