"""Markov chain Monte Carlo: exact in the limit of many draws."""

from inference.mcmc.hmc import HMC
from inference.mcmc.nuts import NUTS

__all__ = ["HMC", "NUTS"]
