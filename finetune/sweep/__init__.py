"""Sweeps: many runs, each in its own process. A sweep can be interrupted and continued at any time."""

from .grid import Point, freeze, points

__all__ = ["Point", "freeze", "points"]
