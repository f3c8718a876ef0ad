"""Choose the units, titles, scales and ticks of the axes of figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .schema import ComparisonData, MetricData

BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
COUNTS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
LOG_SPAN = 8  # from this ratio of largest to smallest value on, only a logarithmic axis shows them all
MOST_TICKS = 7
PERCENT = 0.01  # the scale of an axis in percent


@dataclass(frozen=True)
class Axis:
    """An axis: its title, the number by which values were divided, and whether it is logarithmic."""

    title: str
    scale: float = 1.0
    log: bool = False


@dataclass(frozen=True)
class Cost:
    """A cost of a result: its key in a row, its name for people, and its units, the largest first."""

    key: str
    words: str
    units: tuple[tuple[float, str], ...]


COSTS = (
    Cost("peak_memory_bytes", "peak memory", BYTES),
    Cost("trained", "trained parameters", COUNTS),
    Cost("step_seconds", "time per step", SECONDS),
    Cost("stored_bytes", "stored change", BYTES),
)


def show_metric_name(metric: MetricData) -> str:
    """Return the name of the metric with its split, such as ``test accuracy``."""
    if str(metric["name"]).startswith("test."):
        return f"test {metric['words']}"
    return str(metric["words"])


def make_metric_axis(comparison: ComparisonData) -> Axis:
    """Return the axis of the compared metric; its title has the unit and the better direction."""
    metric = comparison["metric"]
    better = "higher is better" if metric["higher_is_better"] else "lower is better"
    if metric["percent"]:
        return Axis(f"{show_metric_name(metric)} in %, {better}", PERCENT)
    return Axis(f"{show_metric_name(metric)}, {better}")


def make_cost_axis(cost: Cost, values: Sequence[float]) -> Axis:
    """Return the axis of a cost.

    Its unit is the largest one in which a typical value is at least 1: the largest value, or the middle of a
    logarithmic axis.
    """
    log = needs_log(values)
    typical = math.sqrt(min(values) * max(values)) if log else max(values, default=0)
    scale, unit = _choose_unit(cost, typical)
    title = f"{cost.words}, {unit}" if unit else cost.words
    return Axis(title, scale, log)


def _choose_unit(cost: Cost, value: float) -> tuple[float, str]:
    """Return the largest unit in which ``value`` is at least 1, or else the smallest unit."""
    for scale, unit in cost.units:
        if value >= scale:
            return scale, unit
    return cost.units[-1]


def divide(value: float | None, axis: Axis) -> float | None:
    """Return ``value`` in the unit of ``axis``; None stays None."""
    if value is None:
        return None
    return value / axis.scale


def needs_log(values: Sequence[float]) -> bool:
    """Tell whether positive values span so much that only a logarithmic axis shows them all."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_SPAN


def choose_log_ticks(low: float, high: float) -> list[float]:
    """Return round positions on a logarithmic axis.

    These are 1, 2 and 5 of each decade; if that is too many, 1 and 3 of each decade, or the decades alone.
    """
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = []
        for decade in decades:
            for digit in digits:
                place = float(f"{digit}e{decade}")
                if low * 0.8 <= place <= high * 1.25:
                    ticks.append(place)
        if len(ticks) <= MOST_TICKS:
            break
    return ticks
