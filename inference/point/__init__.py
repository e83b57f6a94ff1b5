"""Point estimates: where Laplace, averaging and subspace methods start."""

from inference.point.largest_variance import LargestVariance
from inference.point.map import MAP
from inference.point.subset import Subset

__all__ = ["MAP", "LargestVariance", "Subset"]
