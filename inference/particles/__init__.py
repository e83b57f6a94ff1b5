"""Interacting particles."""

from inference.particles.svgd import SVGD

__all__ = ["SVGD"]
