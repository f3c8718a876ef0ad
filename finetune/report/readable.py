"""Show numbers, settings and lists to people."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .measure import Measure
from .schema import MetricData

DASH, MINUS = "\u2013", "\u2212"


def show_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 row`` or ``1,000 rows``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def show_some(names: Sequence[str], most: int) -> str:
    """Return at most ``most`` names, and how many more there are, such as ``a, b and 3 more``."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def show_metric(metric: MetricData, value: float | None) -> str:
    """Return a value of the metric as text; shares are in percent, without the percent sign."""
    if value is None:
        return DASH
    return Measure(str(metric["name"])).show(value)


def show_difference(metric: MetricData, value: float | None) -> str:
    """Return a difference of two values of the metric as text with its sign."""
    if value is None:
        return DASH
    sign = "+" if value >= 0 else MINUS
    return sign + show_metric(metric, abs(value))


def show_seconds(value: float) -> str:
    """Return ``0.0213`` as ``21.3 ms``."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{1000 * value:.3g} ms"


def show_setting(value: object) -> str:
    """Return the value of a compared setting; a dash means that the method has no such setting."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value)


def show_p(p: float | None) -> str:
    """Return a p-value with its relation, such as ``= 0.021`` or ``< 0.001``."""
    if p is None:
        return "unknown"
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.2g}"
