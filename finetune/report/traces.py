"""Write the parts of a Plotly figure as plain data: axes, layouts, markers and hover texts.

Only series have fixed colours: the page draws everything else in the colours of its light or dark theme. A
trace whose ``meta`` is ``INK`` is drawn in the colour of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .axes import PERCENT, Axis
from .styles import Style
from .views import PlotPoint, list_xs

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LONGEST = 30  # the most characters of a label
LEGEND = {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0.0}
# The range of an axis in percent; intervals may end beyond it. It leaves room for a marker at 0 or 100.
PERCENT_RANGE = (-1.5, 101.5)
INK = {"ink": True}
Trace = dict[str, Any]


def escape_tags(text: object) -> str:
    """Escape a text for Plotly, which interprets tags and entities in every text."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shorten(label: str, longest: int = LONGEST) -> str:
    """Shorten a label to ``longest`` characters by leaving out its middle: labels differ at their ends."""
    if len(label) <= longest:
        return label
    half = (longest - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


def group_by_series(points: Iterable[PlotPoint]) -> dict[str, list[PlotPoint]]:
    """Return the points of each series, in order of first appearance."""
    groups: dict[str, list[PlotPoint]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    return groups


def make_axis(axis: Axis, **more: Any) -> dict[str, Any]:
    """Return Plotly's description of an axis."""
    return {
        "title": {"text": escape_tags(axis.title), "standoff": 12},
        "automargin": True,
        "type": "log" if axis.log else "linear",
        **more,
    }


def make_metric_axis(axis: Axis) -> dict[str, Any]:
    """Return the y axis of a metric; in percent it ends at 0 and 100."""
    found = make_axis(axis)
    if axis.scale == PERCENT:
        found["autorangeoptions"] = {"clipmin": PERCENT_RANGE[0], "clipmax": PERCENT_RANGE[1]}
    return found


def make_label_axis(points: Sequence[PlotPoint]) -> dict[str, Any]:
    """Return a y axis of labels, the first at the top."""
    return {
        "tickvals": list(range(len(points))),
        "ticktext": [escape_tags(shorten(point.label)) for point in points],
        "range": [len(points) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }


def make_ticks(places: Sequence[float]) -> dict[str, Any]:
    """Return the settings that put ticks at ``places``, written as plain numbers."""
    return {"tickvals": list(places), "ticktext": [f"{place:g}" for place in places], "tickangle": 0}


def make_layout(x: Mapping[str, Any], y: Mapping[str, Any], height: int, **more: Any) -> dict[str, Any]:
    """Return the layout of a figure; ``height`` is in pixels."""
    return {
        "xaxis": dict(x),
        "yaxis": dict(y),
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 34, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        **more,
    }


def make_error_bars(points: Sequence[PlotPoint], axis: str) -> dict[str, Any]:
    """Return the error bars of all points along ``axis`` (``x`` or ``y``); a single seed has none."""
    above: list[float | None] = []
    below: list[float | None] = []
    for point in points:
        if point.low is None or point.high is None:
            above.append(None)
            below.append(None)
            continue
        value = point.y if axis == "y" else point.x
        above.append(point.high - value)
        below.append(value - point.low)
    bars = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "thickness": 1.4,
        "width": 3,
    }
    return {f"error_{axis}": bars}


def make_markers(style: Style, hollow: Iterable[bool], size: int = 10) -> dict[str, Any]:
    """Return markers in the style of a series, one for each item of ``hollow``."""
    symbols, widths = [], []
    for is_hollow in hollow:
        if is_hollow:
            symbols.append(f"{style.symbol}-open")
            widths.append(2.0)
        else:
            symbols.append(style.symbol)
            widths.append(0.0)
    return {
        "color": style.colour,
        "symbol": symbols,
        "size": size,
        "line": {"color": style.colour, "width": widths},
    }


def make_scatter(name: str, points: Sequence[PlotPoint], hover: Iterable[str], **more: Any) -> Trace:
    """Return a trace of points of one series, with a hover text for each."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list_xs(points),
        "y": [point.y for point in points],
        "name": escape_tags(name),
        "meta": {"series": points[0].series},
        "customdata": list(hover),
        "hovertemplate": "%{customdata}<extra></extra>",
        **more,
    }


def make_hover(point: PlotPoint, value: float, axis: Axis, *more: str) -> str:
    """Return the hover text of a point: label, value, interval, and more lines of HTML."""
    unit = " %" if axis.scale == PERCENT else ""
    interval = "one seed, no interval"
    if point.low is not None and point.high is not None:
        interval = f"95 %: {point.low:.4g} to {point.high:.4g}{unit}"
    return "<br>".join([f"<b>{escape_tags(point.label)}</b>", f"{value:.4g}{unit}", interval, *more])
