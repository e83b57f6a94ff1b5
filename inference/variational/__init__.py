"""Variational families: the posterior approximated by optimisation."""

from inference.variational.mean_field import MeanFieldVI
from inference.variational.pathfinder import Pathfinder

__all__ = ["MeanFieldVI", "Pathfinder"]
