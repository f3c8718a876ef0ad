"""Sweeps: many runs, each in a process of its own, that survive whatever ends them."""

from .grid import Point, freeze, points

__all__ = ["Point", "freeze", "points"]
