"""Averages of the iterates of SGD."""

from inference.averaging.swag import SWAG

__all__ = ["SWAG"]
