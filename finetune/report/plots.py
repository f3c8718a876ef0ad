"""A comparison's figures for papers: one column wide, PNG and PDF with embedded fonts, in the colours of the HTML report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import views
from .figures import SHARE, curve_look, level_dashes, short
from .views import Axis, Data, Point, Style

WIDTH = 3.3  # inches: a column of the usual two-column styles
STYLE: Any = {
    "pdf.fonttype": 42, "ps.fonttype": 42, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7, "text.parse_math": False,
    "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "legend.frameon": False, "legend.fontsize": 6.5, "lines.linewidth": 1.1, "lines.markersize": 4.2,
}  # fmt: skip
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "triangle-down": "v", "x": "X", "pentagon": "p", "star": "*",
}  # fmt: skip
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)), (0, (7, 2, 1, 2)))
LINE = 34  # letters of an axis title on one line
NARROW = 24  # letters of a name beside or below a figure
Looks = Mapping[str, Style]
Handles = list[tuple[str, Any]]


def write(comparison: Data, folder: Path, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write every figure that the comparison has data for into ``folder``, each whole or not at all; returns the files.

    Raises ``ConfigError`` if they cannot be written.
    """
    import matplotlib

    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Glyph .* missing"
            )  # a name in a script that the font lacks is drawn as boxes
            for key, figure in figures(comparison):
                made += [_save(figure, folder / f"{key}.{kind}", kind) for kind in kinds]
    except OSError as error:
        raise ConfigError(
            f"Plots cannot be written to {folder}: {error.strerror}. Name a folder that you may write to."
        ) from error
    return made


def _save(figure: Any, file: Path, kind: str) -> Path:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(
            temporary, format=kind, dpi=300, metadata={"CreationDate": None} if kind == "pdf" else None
        )
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def figures(comparison: Data) -> Iterator[tuple[str, Any]]:
    """Name and matplotlib figure of each; named as in the HTML report."""
    looks = views.styles(comparison)
    if (found := views.differences(comparison)) is not None:
        yield "differences", _differences(found, looks)
    for cost in views.COSTS:
        if (view := views.pareto(comparison, cost)) is not None:
            yield f"pareto_{cost.key}", _pareto(view, looks)
    for setting in views.settings(comparison):
        yield f"by_{setting.key}", _settings(setting, looks)
    axis, curves, _ = views.curves(comparison)
    if curves:
        yield "curves", _curves(axis, curves, looks)
    if (ranks := views.ranks(comparison)) is not None:
        yield "critical_difference", _ranks(ranks, looks)


def _figure(height: float) -> tuple[Any, Any]:
    """A figure on the Agg canvas, without pyplot's global state and whatever display there is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _label(axes: Any, x: Axis, y: Axis) -> None:
    """The titles, and the limits of an axis of shares, when all is drawn."""
    for name, title in ((axes.set_xlabel, x.title), (axes.set_ylabel, y.title)):
        name(title.replace(", ", ",\n") if len(title) > LINE else title)
    if y.scale == 0.01:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, SHARE[0]), min(high, SHARE[1]))


def _log(axes: Any, places: Sequence[float]) -> None:
    """A logarithmic x axis with round numbers, written out."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _arms(point: Point, value: float) -> list[list[float]] | None:
    """What ``errorbar`` takes for an interval that need not be symmetric; ``None`` for a single seed."""
    return None if point.low is None or point.high is None else [[value - point.low], [point.high - value]]


def _draw(axes: Any, point: Point, look: Style, hollow: bool, across: bool = False, **more: Any) -> None:
    """A point with its interval, upright or across."""
    arms = {"xerr": _arms(point, point.x)} if across else {"yerr": _arms(point, point.y)}
    fill = {
        "markerfacecolor": "white" if hollow else look.colour,
        "markeredgecolor": look.colour,
        "markeredgewidth": 0.8,
    }
    axes.errorbar(
        point.x,
        point.y,
        **arms,
        color=look.colour,
        fmt=MARKERS[look.symbol],
        elinewidth=0.7,
        capsize=1.5,
        **fill,
        **more,
    )


def _legend(figure: Any, handles: Handles) -> None:
    """Below the axes, in as many columns as the width holds; the figure grows by its height."""
    if len(handles) < 2:
        return
    names = _distinct([name for name, _ in handles])
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            [handle for _, handle in handles],
            names,
            loc="outside lower center",
            ncols=columns,
            handlelength=2.2,
            columnspacing=1.2,
        )
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, as short as tells them apart."""
    cuts = ([short(name, longest) for name in names] for longest in (NARROW, 2 * NARROW))
    return next((cut for cut in cuts if len(set(cut)) == len(set(names))), list(names))


def _handle(look: Style, line: Any = "none", marked: bool = True) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=look.colour, marker=MARKERS[look.symbol] if marked else "none", linestyle=line
    )


def _pareto(view: views.View, looks: Looks) -> Any:
    figure, axes = _figure(2.2)
    axes.step(
        [x for x, _ in view.line],
        [y for _, y in view.line],
        where="post",
        color="#888888",
        linewidth=0.9,
        zorder=1,
    )
    for point in view.points:
        _draw(axes, point, looks[point.series], point.low is None, alpha=1.0 if point.emphasis else 0.5)
    if view.x.log:
        xs = [point.x for point in view.points]
        _log(axes, views.ticks(min(xs), max(xs)))
    _label(axes, view.x, view.y)
    _legend(
        figure, [(name, _handle(looks[name])) for name in sorted({point.series for point in view.points})]
    )
    return figure


def _settings(found: views.Settings, looks: Looks) -> Any:
    figure, axes = _figure(2.2)
    handles: Handles = []
    for name, points in found.lines.items():
        look = looks[points[0].series]
        dash = DASHES[views.place(found, name) % len(DASHES)]
        axes.plot(
            [point.x for point in points], [point.y for point in points], color=look.colour, linestyle=dash
        )
        for point in points:
            _draw(axes, point, look, point.low is None)
        handles.append((name, _handle(look, dash)))
    xs = sorted({point.x for points in found.lines.values() for point in points})
    for level, lengths in level_dashes(found, looks):
        look, dash = looks[level.series], (0, [length / 2.5 for length in lengths])
        axes.axhline(level.y, color=look.colour, linestyle=dash)
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low, level.high, color=look.colour, alpha=0.1, linewidth=0)
        handles.append((level.label, _handle(look, dash, marked=False)))
    if found.x.log:
        _log(axes, xs if len(xs) <= 8 else views.ticks(xs[0], xs[-1]))
    _label(axes, found.x, found.y)
    _legend(figure, handles)
    return figure


def _curves(axis: Axis, found: Sequence[views.Curve], looks: Looks) -> Any:
    figure, axes = _figure(2.3)
    handles: Handles = []
    for curve in found:
        look, dash = curve_look(curve, looks), DASHES[curve.dash % len(DASHES)]
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=look.colour, alpha=0.12, linewidth=0)
        axes.plot(curve.x, curve.y, color=look.colour, linestyle=dash)
        for point in curve.points:
            _draw(
                axes,
                point if len(curve.x) == 1 else replace(point, low=None, high=None),
                look,
                hollow=not curve.low,
            )
        handles.append((curve.label, _handle(look, dash, marked=bool(curve.points))))
    _label(axes, Axis("optimizer step"), axis)
    _legend(figure, handles)
    return figure


def _names(axes: Any, points: Sequence[Point], top: float) -> None:
    """Names down the side, the first at the top."""
    axes.set_yticks(range(len(points)), [short(point.label, NARROW) for point in points])
    axes.set_ylim(len(points) - 0.4, top)
    axes.grid(visible=False, axis="y")


def _differences(view: views.View, looks: Looks) -> Any:
    figure, axes = _figure(0.75 + 0.17 * len(view.points))
    axes.axvline(0, color="#444444", linewidth=0.8, linestyle=":")
    for point in view.points:
        _draw(axes, point, looks[point.series], not point.emphasis, across=True)
    _names(axes, view.points, -0.6)
    _label(axes, view.x, Axis(""))
    return figure


def _ranks(found: views.Ranks, looks: Looks) -> Any:
    figure, axes = _figure(0.95 + 0.17 * len(found.points))
    for point in found.points:
        look = looks.get(point.series, Style("#5d7f88", "circle"))
        axes.plot(point.x, point.y, MARKERS[look.symbol], color=look.colour)
    axes.plot([1, 1 + found.difference], [-1, -1], color="black", linewidth=1.8)
    axes.annotate(f" {found.difference:.3g}", (1 + found.difference, -1), va="center")
    right = max(1 + found.difference, *(point.x for point in found.points))
    for lane, first, last in found.cliques:
        axes.plot(
            [right + (lane + 2) * (right - 1) / 26] * 2,
            [first - 0.2, last + 0.2],
            color="black",
            linewidth=2.2,
            solid_capstyle="butt",
        )
    _names(axes, found.points, -1.7)
    step = max(1, round(right / 8))
    axes.set_xticks(range(1, int(right) + 1, step))
    _label(axes, Axis(f"mean rank over {found.blocks} blocks, 1 is best"), Axis(""))
    return figure
