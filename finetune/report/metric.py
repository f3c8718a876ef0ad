"""Define the main metric of each task, and format its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The main metric of a task. ``key`` is its name in ``metrics.test`` of ``result.json``."""

    key: str
    words: str
    higher_is_better: bool

    def show(self, value: float) -> str:
        """Return ``value`` as text with its unit and a sensible number of digits."""
        if self.key == "accuracy":
            return f"{100 * value:.2f} %"
        return f"{value:.4f}"


METRICS = (Metric("accuracy", "accuracy", True), Metric("bits_per_byte", "bits per byte", False))


def main_metric(values: Mapping[str, object] | None) -> Metric | None:
    """Return the first of ``METRICS`` that has a value in ``values``."""
    for metric in METRICS:
        if values and values.get(metric.key) is not None:
            return metric
    return None


def show_bytes(count: float) -> str:
    """Return ``1536`` as ``1.5 KiB``."""
    if count < 1024:
        return f"{count:.0f} bytes"
    count /= 1024
    for unit in ("KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def show_share(share: float) -> str:
    """Return ``0.118`` as ``11.8 %``."""
    return f"{100 * share:.3g} %"
