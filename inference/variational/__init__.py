"""Variational families: the posterior approximated by optimisation."""

from inference.variational.mean_field import MeanFieldVI

__all__ = ["MeanFieldVI"]
