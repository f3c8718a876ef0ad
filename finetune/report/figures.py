"""A comparison's figures for the screen: Plotly's figures as plain data, which ``html`` embeds and ``plotly.graph_objects.Figure`` takes.

They name no colour but those of the series, so that the page can set them in light or dark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import views
from .cells import show_p
from .views import Axis, Data, Point, Style

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INTERVAL = "Bars are 95 % intervals over seeds; a hollow point is a single seed, which has none."
LONGEST = 30
LEGEND = {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0.0}
SHARE = (
    -1.5,
    101.5,
)  # what an axis of shares in % shows at most, though intervals may end beyond; a marker at 100 is whole
INK = {"ink": True}  # to be drawn in the colour of the text


@dataclass(frozen=True)
class Figure:
    """One figure: its name in files, what stands above and below it, and Plotly's data and layout."""

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def as_plotly(self) -> dict[str, Any]:
        """What ``plotly.graph_objects.Figure`` and ``Plotly.react`` take."""
        return {"data": self.data, "layout": self.layout}


def figures(comparison: Data) -> list[Figure]:
    """All figures that the comparison has data for."""
    looks = views.styles(comparison)
    made = [_differences(comparison, looks), *(_pareto(comparison, looks, cost) for cost in views.COSTS)]
    made += [_settings(found, looks) for found in views.settings(comparison)]
    return [
        figure
        for figure in (*made, _curves(comparison, looks), _ranks(comparison, looks))
        if figure is not None
    ]


def escaped(text: object) -> str:
    """Text that Plotly shows as it is: it reads tags and entities in all that it writes."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(label: str, longest: int = LONGEST) -> str:
    """A label that leaves room for its figure; the middle goes, since labels differ at their ends."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[-half:]}"


def _axis(axis: Axis, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": escaped(axis.title), "standoff": 12},
        "automargin": True,
        "type": "log" if axis.log else "linear",
        **more,
    }


def _upright(axis: Axis) -> dict[str, Any]:
    """The y axis of a metric."""
    return _axis(axis) | (
        {"autorangeoptions": {"clipmin": SHARE[0], "clipmax": SHARE[1]}} if axis.scale == 0.01 else {}
    )


def _ticks(places: Sequence[float]) -> dict[str, Any]:
    return {"tickvals": list(places), "ticktext": [f"{place:g}" for place in places], "tickangle": 0}


def _layout(x: Mapping[str, Any], y: Mapping[str, Any], height: int = 380, **more: Any) -> dict[str, Any]:
    margin = {"l": 8, "r": 16, "t": 34, "b": 8}
    return {
        "xaxis": dict(x),
        "yaxis": dict(y),
        "height": height,
        "margin": margin,
        "showlegend": False,
        "hovermode": "closest",
        **more,
    }


def _error(points: Sequence[Point], axis: str) -> dict[str, Any]:
    """Both arms of each interval; a missing one has no arm."""
    value = [point.y if axis == "y" else point.x for point in points]
    high = [None if p.high is None else p.high - v for p, v in zip(points, value, strict=True)]
    low = [None if p.low is None else v - p.low for p, v in zip(points, value, strict=True)]
    return {
        f"error_{axis}": {
            "type": "data",
            "symmetric": False,
            "array": high,
            "arrayminus": low,
            "thickness": 1.4,
            "width": 3,
        }
    }


def _markers(points: Sequence[Point], look: Style, hollow: Iterable[bool], size: int = 10) -> dict[str, Any]:
    symbols = [look.symbol + ("-open" if empty else "") for empty in hollow]
    line = {"color": look.colour, "width": [2.0 if symbol.endswith("-open") else 0.0 for symbol in symbols]}
    return {"color": look.colour, "symbol": symbols, "size": size, "line": line}


def _by_series(points: Iterable[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.series, []).append(point)
    return groups


def _scatter(name: str, points: Sequence[Point], hover: Iterable[str], **more: Any) -> dict[str, Any]:
    place = {"x": [point.x for point in points], "y": [point.y for point in points], "name": escaped(name)}
    return {
        "type": "scatter",
        "mode": "markers",
        **place,
        "meta": {"series": points[0].series},
        "customdata": list(hover),
        "hovertemplate": "%{customdata}<extra></extra>",
        **more,
    }


def _hover(point: Point, value: float, y: Axis, *more: str) -> str:
    unit = " %" if y.scale == 0.01 else ""
    interval = (
        "one seed, no interval"
        if point.low is None or point.high is None
        else f"95 %: {point.low:.4g} to {point.high:.4g}{unit}"
    )
    return "<br>".join([f"<b>{escaped(point.label)}</b>", f"{value:.4g}{unit}", interval, *more])


def _pareto(comparison: Data, looks: Mapping[str, Style], cost: views.Cost) -> Figure | None:
    view = views.pareto(comparison, cost)
    if view is None:
        return None
    line = {"shape": "hv", "width": 1.5, "dash": "solid"}
    edge = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in view.line],
        "y": [y for _, y in view.line],
        "line": line,
    }
    data: list[dict[str, Any]] = [
        {**edge, "name": "front", "meta": INK, "hoverinfo": "skip", "opacity": 0.55}
    ]
    for name, points in _by_series(view.points).items():
        hover = [
            _hover(
                p,
                p.y,
                view.y,
                f"{escaped(view.x.title)}: {p.x:.4g}",
                *(["on the front"] if p.emphasis else []),
            )
            for p in points
        ]
        marker = _markers(points, looks[name], (p.low is None for p in points))
        marker["opacity"] = [1.0 if p.emphasis else 0.5 for p in points]
        data.append(_scatter(name, points, hover, marker=marker, **_error(points, "y")))
    words = comparison["metric"]["words"]
    best = ", ".join(p.label for p in sorted(view.points, key=lambda p: p.x) if p.emphasis)
    joins = f"The stepped line joins the rows that no other beats with the same {cost.words} or less ({best}); the others are paler."
    caption = f"{joins} {INTERVAL} {view.left_out}"
    xs = [p.x for p in view.points]
    layout = _layout(
        _axis(view.x) | (_ticks(views.ticks(min(xs), max(xs))) if view.x.log else {}), _upright(view.y)
    )
    return Figure(f"pareto_{cost.key}", f"{words} against {cost.words}", caption, data, layout)


def level_dashes(found: views.Settings, looks: Mapping[str, Style]) -> Iterator[tuple[Point, list[int]]]:
    """Each level with the lengths of its ink and gaps: a dash, and then a dot for each level of its colour before it."""
    before = Counter[str]()
    for level in found.levels:
        colour = looks[level.series].colour
        yield level, [8, 5, *([2, 5] * before[colour])]
        before[colour] += 1


def _settings(found: views.Settings, looks: Mapping[str, Style]) -> Figure:
    data = []
    for name, points in found.lines.items():
        look, hover = (
            looks[points[0].series],
            [_hover(p, p.y, found.y, f"{escaped(found.x.title)}: {p.x:.4g}") for p in points],
        )
        marker = _markers(points, look, (p.low is None for p in points))
        line = {"color": look.colour, "width": 2, "dash": DASHES[views.place(found, name) % len(DASHES)]}
        data.append(
            _scatter(
                name, points, hover, marker=marker, mode="lines+markers", line=line, **_error(points, "y")
            )
        )
    xs = [point.x for points in found.lines.values() for point in points]
    for level, lengths in level_dashes(found, looks):
        look, ends = looks[level.series], [min(xs), max(xs)]
        hover = [_hover(level, level.y, found.y, f"has no {escaped(found.key)}")] * 2
        line = {"color": look.colour, "width": 2, "dash": ",".join(f"{length}px" for length in lengths)}
        arms = _error([replace(level, low=None, high=None), level], "y")
        data.append(_scatter(level.label, [level] * 2, hover, mode="lines", line=line, **arms) | {"x": ends})
    dashed = f"Dashed: without {found.key}. " if found.levels else ""
    caption = f"{dashed}{INTERVAL} {found.left_out}"
    told = any(name != points[0].series for name, points in found.lines.items()) or any(
        level.label != level.series for level in found.levels
    )
    legend = {"showlegend": told, "legend": LEGEND}
    ticks = _ticks(sorted(set(xs))) if len(set(xs)) <= 8 else {}
    layout = _layout(_axis(found.x) | ticks, _upright(found.y), 380 + 6 * told * len(data), **legend)
    return Figure(
        f"by_{found.key}",
        f"what {'density' if 'density' in found.x.title else found.key} does",
        caption,
        data,
        layout,
    )


def curve_look(curve: views.Curve, looks: Mapping[str, Style]) -> Style:
    """With a symbol of its own, which tells apart the curves of one series as their dashes do."""
    look = looks[curve.series]
    return replace(
        look, symbol=views.SYMBOLS[(views.SYMBOLS.index(look.symbol) + curve.dash) % len(views.SYMBOLS)]
    )


def _curves(comparison: Data, looks: Mapping[str, Style]) -> Figure | None:
    axis, found, left_out = views.curves(comparison)
    if not found:
        return None
    data: list[dict[str, Any]] = []
    for curve in found:
        colour, group, meta = looks[curve.series].colour, escaped(curve.label), {"series": curve.series}
        if curve.low:
            edge = {
                "x": [*curve.x, *curve.x[::-1]],
                "y": [*curve.high, *curve.low[::-1]],
                "mode": "lines",
                "line": {"width": 0},
                "fill": "toself",
            }
            band = {
                "fillcolor": _faint(colour),
                "legendgroup": group,
                "showlegend": False,
                "hoverinfo": "skip",
                "name": group,
            }
            data.append({"type": "scatter", "meta": meta, **edge, **band})
        line = {"color": colour, "width": 2, "dash": DASHES[curve.dash % len(DASHES)]}
        place: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines",
            "meta": meta,
            "x": curve.x,
            "y": curve.y,
            "legendgroup": group,
        }
        place["name"] = escaped(short(curve.label))
        if points := curve.points:
            place |= {
                "mode": "lines+markers",
                "marker": _markers(points, curve_look(curve, looks), [not curve.low] * len(points), 8),
            }
        if curve.low and len(points) == 1:  # no band to see
            place |= _error(points, "y")
        data.append(
            {
                **place,
                "line": line,
                "text": group,
                "hovertemplate": "<b>%{text}</b><br>step %{x}: %{y:.4g}<extra></extra>",
            }
        )
    caption = f"Means over seeds, with the band or bar of their 95 % interval; a curve without one is a single seed. {left_out}"
    legend = {"showlegend": True, "legend": LEGEND}
    layout = _layout(_axis(Axis("optimizer step")), _upright(axis), 420 + 12 * len(found), **legend)
    return Figure("curves", "learning curves", caption, data, layout)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.13)"


def _places(points: Sequence[Point]) -> dict[str, Any]:
    """A y axis of names, the first at the top."""
    names = [escaped(short(point.label)) for point in points]
    return {
        "tickvals": list(range(len(points))),
        "ticktext": names,
        "range": [len(points) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }


def _differences(comparison: Data, looks: Mapping[str, Style]) -> Figure | None:
    view = views.differences(comparison)
    if view is None:
        return None
    versus = {row["label"]: row["versus"] for row in comparison["rows"] if row["versus"]}
    unit, data = (" points" if comparison["metric"]["percent"] else ""), []
    for name, points in _by_series(view.points).items():
        hover = []
        for p in points:
            interval = (
                "no interval"
                if p.low is None or p.high is None
                else f"95 %: {p.low:+.3g} to {p.high:+.3g}{unit}"
            )
            test = versus[p.label]
            said = [
                f"<b>{escaped(p.label)}</b>",
                f"{p.x:+.3g}{unit}",
                interval,
                f"{escaped(test['verdict'])}, p {show_p(test['p_holm'])} (Holm)",
            ]
            hover.append("<br>".join(said))
        marker = _markers(points, looks[name], (not p.emphasis for p in points))
        data.append(_scatter(name, points, hover, marker=marker, **_error(points, "x")))
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"width": 1.5, "dash": "dot"},
    }
    layout = _layout(
        _axis(view.x, zeroline=False), _places(view.points), 110 + 26 * len(view.points), shapes=[zero]
    )
    caption = f"Bars are 95 % intervals. Filled: told apart from {view.key} after Holm's correction; hollow: not told apart, or not tested. {view.left_out}"
    return Figure("differences", f"differences to {view.key}", caption, data, layout)


def _ranks(comparison: Data, looks: Mapping[str, Style]) -> Figure | None:
    found = views.ranks(comparison)
    if found is None:
        return None
    last, data = max(point.x for point in found.points), []
    for name, points in _by_series(found.points).items():
        hover = [f"<b>{escaped(p.label)}</b><br>mean rank {p.x:.3g}" for p in points]
        look = looks.get(name, Style("#5d7f88", "circle"))
        data.append(_scatter(name, points, hover, marker=_markers(points, look, (False for _ in points))))
    ruler: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+text",
        "name": "critical difference",
        "meta": INK,
        "hoverinfo": "skip",
    }
    ruler |= {
        "x": [1, 1 + found.difference],
        "y": [-1, -1],
        "text": ["", f" {found.difference:.3g}"],
        "textposition": "middle right",
    }
    data.append(ruler | {"line": {"width": 3}, "cliponaxis": False})
    right = max(last, 1 + found.difference)
    step = max(right - 1, 1) / 28
    for lane, first, end in found.cliques:
        place = right + step * (lane + 2)
        bar: dict[str, Any] = {
            "x": [place, place],
            "y": [first - 0.2, end + 0.2],
            "line": {"width": 5},
            "name": "not told apart",
        }
        data.append({"type": "scatter", "mode": "lines", "meta": INK, "hoverinfo": "skip", **bar})
    y = _places(found.points) | {"range": [len(found.points) - 0.4, -1.7]}
    width = right + step * (2 + max((lane for lane, _, _ in found.cliques), default=-1) + 1.5)
    x = _axis(
        Axis(f"mean rank over {found.blocks} blocks, 1 is best"),
        zeroline=False,
        tickmode="linear",
        dtick=max(1, round(right / 10)),
        tick0=1,
        range=[1 - step, width],
    )
    layout = _layout(x, y, 130 + 24 * len(found.points))
    caption = "Rows that a bar to the right joins are not told apart: their mean ranks differ by less than the critical difference, the ruler's length."
    return Figure("critical_difference", "critical differences", caption, data, layout)
