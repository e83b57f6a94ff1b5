"""Markov chain Monte Carlo: exact in the limit of many draws."""

from inference.mcmc.chees import ChEESHMC
from inference.mcmc.hmc import HMC
from inference.mcmc.mclmc import MCLMC
from inference.mcmc.mile import MILE
from inference.mcmc.nuts import NUTS

__all__ = ["HMC", "MCLMC", "MILE", "NUTS", "ChEESHMC"]
