"""Ensembles of networks trained side by side."""

from inference.ensembles.deep_ensemble import DeepEnsemble

__all__ = ["DeepEnsemble"]
