"""Pyro's own guides and kernels as backends: nothing of Pyro is lost, and they are the slow twins in the tests."""

from inference.bridges.pyro_guide import PyroGuideVI
from inference.bridges.pyro_mcmc import PyroMCMC

__all__ = ["PyroGuideVI", "PyroMCMC"]
