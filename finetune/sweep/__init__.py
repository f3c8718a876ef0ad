"""Sweeps: many runs, each in its own process. A sweep can be interrupted and continued at any time."""

from .grid import Point, freeze, list_points

__all__ = ["Point", "freeze", "list_points"]
