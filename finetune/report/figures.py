"""Draw a comparison's figures for the screen, as Plotly's plain data.

``html`` embeds them; ``plotly.graph_objects.Figure`` takes them, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from . import traces, views
from .axes import COSTS, Axis, Cost, choose_log_ticks
from .readable import show_p
from .schema import ComparisonData
from .styles import SYMBOLS, Style, make_styles
from .traces import DASHES, Trace, escape_tags, group_by_series, make_hover, make_layout
from .views import PlotPoint, list_xs

INTERVAL = "Bars are 95 % intervals over seeds; a hollow point is a single seed, which has none."
NO_SERIES = Style("#5d7f88", "circle")  # style of a rank whose row is not in the table
MOST_VALUES = 8  # a setting with at most this many values has a tick for each
Styles = Mapping[str, Style]


@dataclass(frozen=True)
class Figure:
    """A figure: its name in files, the texts above and below it, and Plotly's data and layout."""

    key: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]

    def as_plotly(self) -> dict[str, Any]:
        """Return what ``plotly.graph_objects.Figure`` and ``Plotly.react`` take."""
        return {"data": self.data, "layout": self.layout}


def make_figures(comparison: ComparisonData) -> list[Figure]:
    """Return every figure that the comparison has data for."""
    styles = make_styles(comparison)
    figures = [_draw_differences(comparison, styles)]
    for cost in COSTS:
        figures.append(_draw_pareto(comparison, styles, cost))
    for setting in views.view_settings(comparison):
        figures.append(_draw_setting(setting, styles))
    figures.append(_draw_curves(comparison, styles))
    figures.append(_draw_ranks(comparison, styles))
    return [figure for figure in figures if figure is not None]


def _draw_pareto(comparison: ComparisonData, styles: Styles, cost: Cost) -> Figure | None:
    view = views.view_pareto(comparison, cost)
    if view is None:
        return None
    xs, ys = map(list, zip(*view.front, strict=True))
    front = {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": {"shape": "hv", "width": 1.5, "dash": "solid"},
        "name": "front",
        "meta": traces.INK,
        "hoverinfo": "skip",
        "opacity": 0.55,
    }
    data: list[Trace] = [front]
    for name, points in group_by_series(view.points).items():
        hover = []
        for point in points:
            lines = [f"{escape_tags(view.x.title)}: {point.x:.4g}"]
            if point.emphasis:
                lines.append("on the front")
            hover.append(make_hover(point, point.y, view.y, *lines))
        marker = traces.make_markers(styles[name], _find_single_seeds(points))
        marker["opacity"] = list(map(choose_opacity, points))
        bars = traces.make_error_bars(points, "y")
        data.append(traces.make_scatter(name, points, hover, marker=marker, **bars))
    x = traces.make_axis(view.x)
    if view.x.log:
        costs = list_xs(view.points)
        x |= traces.make_ticks(choose_log_ticks(min(costs), max(costs)))
    words = comparison["metric"]["words"]
    return Figure(
        f"pareto_{cost.key}",
        f"{words} against {cost.words}",
        _caption_pareto(view, cost),
        data,
        make_layout(x, traces.make_metric_axis(view.y), 380),
    )


def choose_opacity(point: PlotPoint) -> float:
    """Return the opacity of a row in a Pareto figure: rows that are not on the front are paler."""
    return 1.0 if point.emphasis else 0.5


def _caption_pareto(view: views.ParetoView, cost: Cost) -> str:
    points = sorted(view.points, key=attrgetter("x"))
    labels = ", ".join(point.label for point in points if point.emphasis)
    return (
        f"The stepped line joins the rows that no other row beats with the same {cost.words} or less "
        f"({labels}); the other rows are paler. {INTERVAL} {view.left_out}"
    )


def _find_single_seeds(points: Sequence[PlotPoint]) -> list[bool]:
    """Tell for each point whether it is a single seed, which has no interval and is drawn hollow."""
    return [point.low is None for point in points]


def measure_dashes(view: views.SettingView, styles: Styles) -> Iterator[tuple[PlotPoint, list[int]]]:
    """Yield each level of a setting with the lengths of its dashes and gaps, in pixels.

    A level has one dash, followed by a dot for each earlier level of the same colour.
    """
    earlier = Counter[str]()
    for level in view.levels:
        colour = styles[level.series].colour
        yield level, [8, 5, *([2, 5] * earlier[colour])]
        earlier[colour] += 1


def _draw_setting(view: views.SettingView, styles: Styles) -> Figure:
    data = []
    needs_legend = False
    for name, points in view.lines.items():
        style = styles[points[0].series]
        hover = []
        for point in points:
            hover.append(make_hover(point, point.y, view.y, f"{escape_tags(view.x.title)}: {point.x:.4g}"))
        look = {
            "marker": traces.make_markers(style, _find_single_seeds(points)),
            "mode": "lines+markers",
            "line": {
                "color": style.colour,
                "width": 2,
                "dash": DASHES[view.count_earlier(name) % len(DASHES)],
            },
        }
        bars = traces.make_error_bars(points, "y")
        data.append(traces.make_scatter(name, points, hover, **look, **bars))
        needs_legend |= name != points[0].series
    xs = view.list_places()
    for level, lengths in measure_dashes(view, styles):
        data.append(_draw_level(view, level, lengths, styles[level.series], (xs[0], xs[-1])))
        needs_legend |= level.label != level.series
    x = traces.make_axis(view.x)
    if len(xs) <= MOST_VALUES:
        x |= traces.make_ticks(xs)
    height = 380
    if needs_legend:
        height += 6 * len(data)
    caption = f"{INTERVAL} {view.left_out}"
    if view.levels:
        caption = f"Dashed: without {view.key}. {caption}"
    cause = "density" if view.is_density else view.key
    return Figure(
        f"by_{view.key}",
        f"effect of {cause}",
        caption,
        data,
        make_layout(
            x, traces.make_metric_axis(view.y), height, showlegend=needs_legend, legend=traces.LEGEND
        ),
    )


def _draw_level(
    view: views.SettingView, level: PlotPoint, lengths: Sequence[int], style: Style, ends: tuple[float, float]
) -> Trace:
    """Return a dashed line for a row without the setting; its interval is drawn at the right end."""
    hover = make_hover(level, level.y, view.y, f"has no {escape_tags(view.key)}")
    line = {"color": style.colour, "width": 2, "dash": ",".join(f"{length}px" for length in lengths)}
    bars = traces.make_error_bars([replace(level, low=None, high=None), level], "y")
    trace = traces.make_scatter(level.label, [level] * 2, [hover] * 2, mode="lines", line=line, **bars)
    return trace | {"x": list(ends)}


def style_curve(curve: views.Curve, styles: Styles) -> Style:
    """Return the style of a curve's markers: the curves of one series have different symbols."""
    style = styles[curve.series]
    place = (SYMBOLS.index(style.symbol) + curve.dash) % len(SYMBOLS)
    return replace(style, symbol=SYMBOLS[place])


def _draw_curves(comparison: ComparisonData, styles: Styles) -> Figure | None:
    view = views.view_curves(comparison)
    if not view.curves:
        return None
    data: list[Trace] = []
    for curve in view.curves:
        if curve.low:
            data.append(_draw_band(curve, styles[curve.series].colour))
        data.append(_draw_curve(curve, styles))
    caption = (
        "Means over seeds, with the band or bar of their 95 % interval; "
        f"a curve without one is a single seed. {view.left_out}"
    )
    layout = make_layout(
        traces.make_axis(Axis("optimizer step")),
        traces.make_metric_axis(view.y),
        420 + 12 * len(view.curves),
        showlegend=True,
        legend=traces.LEGEND,
    )
    return Figure("curves", "learning curves", caption, data, layout)


def _draw_band(curve: views.Curve, colour: str) -> Trace:
    label = escape_tags(curve.label)
    return {
        "type": "scatter",
        "meta": {"series": curve.series},
        "x": [*curve.x, *curve.x[::-1]],
        "y": [*curve.high, *curve.low[::-1]],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": _make_faint(colour),
        "legendgroup": label,
        "showlegend": False,
        "hoverinfo": "skip",
        "name": label,
    }


def _draw_curve(curve: views.Curve, styles: Styles) -> Trace:
    label = escape_tags(curve.label)
    trace: Trace = {
        "type": "scatter",
        "mode": "lines",
        "meta": {"series": curve.series},
        "x": curve.x,
        "y": curve.y,
        "legendgroup": label,
        "name": escape_tags(traces.shorten(curve.label)),
    }
    points = curve.marked_points
    if points:
        trace["mode"] = "lines+markers"
        trace["marker"] = traces.make_markers(style_curve(curve, styles), [not curve.low] * len(points), 8)
    if curve.low and len(points) == 1:  # a band of one step is invisible
        trace |= traces.make_error_bars(points, "y")
    colour, dash = styles[curve.series].colour, DASHES[curve.dash % len(DASHES)]
    trace["line"] = {"color": colour, "width": 2, "dash": dash}
    trace["text"] = label
    trace["hovertemplate"] = "<b>%{text}</b><br>step %{x}: %{y:.4g}<extra></extra>"
    return trace


def _make_faint(colour: str) -> str:
    red, green, blue = int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
    return f"rgba({red},{green},{blue},0.13)"


def _draw_differences(comparison: ComparisonData, styles: Styles) -> Figure | None:
    view = views.view_differences(comparison)
    if view is None:
        return None
    versus = {row["label"]: row["versus"] for row in comparison["rows"]}
    unit = " points" if comparison["metric"]["percent"] else ""
    data = []
    for name, points in group_by_series(view.points).items():
        hover = []
        for point in points:
            hover.append(_describe_difference(point, versus[point.label], unit))
        marker = traces.make_markers(styles[name], [not point.emphasis for point in points])
        bars = traces.make_error_bars(points, "x")
        data.append(traces.make_scatter(name, points, hover, marker=marker, **bars))
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"width": 1.5, "dash": "dot"},
    }
    layout = make_layout(
        traces.make_axis(view.x, zeroline=False),
        traces.make_label_axis(view.points),
        110 + 26 * len(view.points),
        shapes=[zero],
    )
    caption = (
        f"Bars are 95 % intervals. Filled: differs from {view.baseline} after Holm's correction; "
        f"hollow: no difference was shown, or not tested. {view.left_out}"
    )
    return Figure("differences", f"differences from {view.baseline}", caption, data, layout)


def _describe_difference(point: PlotPoint, versus: Mapping[str, Any], unit: str) -> str:
    interval = "no interval"
    if point.low is not None and point.high is not None:
        interval = f"95 %: {point.low:+.3g} to {point.high:+.3g}{unit}"
    lines = [
        f"<b>{escape_tags(point.label)}</b>",
        f"{point.x:+.3g}{unit}",
        interval,
        f"{escape_tags(versus['verdict'])}, p {show_p(versus['p_holm'])} (Holm)",
    ]
    return "<br>".join(lines)


def _draw_ranks(comparison: ComparisonData, styles: Styles) -> Figure | None:
    view = views.view_ranks(comparison)
    if view is None:
        return None
    data = []
    for name, points in group_by_series(view.points).items():
        hover = []
        for point in points:
            hover.append(f"<b>{escape_tags(point.label)}</b><br>mean rank {point.x:.3g}")
        marker = traces.make_markers(styles.get(name, NO_SERIES), [False] * len(points))
        data.append(traces.make_scatter(name, points, hover, marker=marker))
    ruler: Trace = {
        "type": "scatter",
        "mode": "lines+text",
        "name": "critical difference",
        "meta": traces.INK,
        "hoverinfo": "skip",
        "x": [1, 1 + view.difference],
        "y": [-1, -1],
        "text": ["", f" {view.difference:.3g}"],
        "textposition": "middle right",
        "line": {"width": 3},
        "cliponaxis": False,
    }
    data.append(ruler)
    right = max(1 + view.difference, *list_xs(view.points))
    lane_width = max(right - 1, 1) / 28
    lanes = 0
    for lane, first, last in view.cliques:
        place = right + lane_width * (lane + 2)
        bar: Trace = {
            "type": "scatter",
            "mode": "lines",
            "meta": traces.INK,
            "hoverinfo": "skip",
            "x": [place, place],
            "y": [first - 0.2, last + 0.2],
            "line": {"width": 5},
            "name": "no difference shown",
        }
        data.append(bar)
        lanes = max(lanes, lane + 1)
    x = traces.make_axis(
        Axis(f"mean rank over {view.blocks} blocks, 1 is best"),
        zeroline=False,
        tickmode="linear",
        dtick=max(1, round(right / 10)),
        tick0=1,
        range=[1 - lane_width, right + lane_width * (lanes + 2.5)],
    )
    y = traces.make_label_axis(view.points) | {"range": [len(view.points) - 0.4, -1.7]}
    caption = (
        "A bar to the right joins rows that were not shown to differ: "
        "their mean ranks differ by less than the critical difference, the ruler's length."
    )
    layout = make_layout(x, y, 130 + 24 * len(view.points))
    return Figure("critical_difference", "critical differences", caption, data, layout)
