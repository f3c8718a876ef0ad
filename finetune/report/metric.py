"""The one number by which runs of a task are told apart, and how people read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A key of ``metrics.test`` in ``result.json``."""

    key: str
    words: str
    higher_is_better: bool

    def show(self, value: float) -> str:
        """``value`` to the precision that is worth reading."""
        return f"{100 * value:.2f} %" if self.key == "accuracy" else f"{value:.4f}"


METRICS = (Metric("accuracy", "accuracy", True), Metric("bits_per_byte", "bits per byte", False))


def main_metric(values: Mapping[str, object] | None) -> Metric | None:
    """The first of ``METRICS`` that ``values`` holds a number for."""
    return next((metric for metric in METRICS if values and values.get(metric.key) is not None), None)


def show_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
