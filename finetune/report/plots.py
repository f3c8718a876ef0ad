"""Draw a comparison's figures for papers: one column wide, as PNG and as PDF with embedded fonts.

The colours are those of the HTML report.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import views
from .axes import COSTS, PERCENT, Axis, choose_log_ticks
from .figures import MOST_VALUES, NO_SERIES, choose_opacity, measure_dashes, style_curve
from .schema import ComparisonData
from .styles import Style, make_styles
from .traces import PERCENT_RANGE, shorten
from .views import PlotPoint, list_xs

WIDTH = 3.3  # inches: a column of the usual two-column styles
STYLE: Any = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7,
    "text.parse_math": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.2,
}
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "triangle-down": "v",
    "x": "X",
    "pentagon": "p",
    "star": "*",
}  # matplotlib's names of the symbols
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)), (0, (7, 2, 1, 2)))
TITLE_LINE = 34  # characters of an axis title on one line
NARROW = 24  # characters of a label beside or below a figure
Styles = Mapping[str, Style]
Handles = list[tuple[str, Any]]  # labels of a legend with matplotlib's handles


def write_plots(
    comparison: ComparisonData, folder: Path, kinds: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Write every figure that the comparison has data for into ``folder``, and return the files.

    A file is written whole or not at all. Raises ``ConfigError`` if one cannot be written.
    """
    import matplotlib

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # A label in a script that the font lacks is drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            for name, figure in draw_plots(comparison):
                for kind in kinds:
                    file = folder / f"{name}.{kind}"
                    _save(figure, file, kind)
                    written.append(file)
    except OSError as error:
        raise ConfigError(
            f"Plots cannot be written to {folder}: {error.strerror}. Name a folder that you may write to."
        ) from error
    return written


def _save(figure: Any, file: Path, kind: str) -> None:
    metadata = {"CreationDate": None} if kind == "pdf" else None  # the same data give the same file
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=kind, dpi=300, metadata=metadata)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def draw_plots(comparison: ComparisonData) -> Iterator[tuple[str, Any]]:
    """Yield the name, as in the HTML report, and the matplotlib figure of each plot."""
    styles = make_styles(comparison)
    differences = views.view_differences(comparison)
    if differences is not None:
        yield "differences", _draw_differences(differences, styles)
    for cost in COSTS:
        pareto = views.view_pareto(comparison, cost)
        if pareto is not None:
            yield f"pareto_{cost.key}", _draw_pareto(pareto, styles)
    for setting in views.view_settings(comparison):
        yield f"by_{setting.key}", _draw_setting(setting, styles)
    curves = views.view_curves(comparison)
    if curves.curves:
        yield "curves", _draw_curves(curves, styles)
    ranks = views.view_ranks(comparison)
    if ranks is not None:
        yield "critical_difference", _draw_ranks(ranks, styles)


def _new_figure(height: float) -> tuple[Any, Any]:
    """Return a figure and its axes on the Agg canvas, which needs neither pyplot's state nor a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish_axes(axes: Any, x: Axis, y: Axis) -> None:
    """Write the titles and limit a y axis in percent; call it after everything is drawn."""
    axes.set_xlabel(_break_title(x.title))
    axes.set_ylabel(_break_title(y.title))
    if y.scale == PERCENT:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, PERCENT_RANGE[0]), min(high, PERCENT_RANGE[1]))


def _break_title(title: str) -> str:
    if len(title) > TITLE_LINE:
        return title.replace(", ", ",\n")
    return title


def _make_x_log(axes: Any, places: Sequence[float]) -> None:
    """Make the x axis logarithmic, with ticks at ``places`` written as plain numbers."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _measure_arms(point: PlotPoint, value: float) -> list[list[float]] | None:
    """Return the interval as ``errorbar`` takes it, which need not be symmetric; None for a single seed."""
    if point.low is None or point.high is None:
        return None
    return [[value - point.low], [point.high - value]]


def _draw_point(
    axes: Any,
    point: PlotPoint,
    style: Style,
    hollow: bool,
    horizontal: bool = False,
    alpha: float | None = None,
) -> None:
    """Draw a point with its interval, which is vertical unless ``horizontal``."""
    if horizontal:
        arms = {"xerr": _measure_arms(point, point.x)}
    else:
        arms = {"yerr": _measure_arms(point, point.y)}
    axes.errorbar(
        point.x,
        point.y,
        **arms,
        color=style.colour,
        fmt=MARKERS[style.symbol],
        elinewidth=0.7,
        capsize=1.5,
        markerfacecolor="white" if hollow else style.colour,
        markeredgecolor=style.colour,
        markeredgewidth=0.8,
        alpha=alpha,
    )


def _add_legend(figure: Any, handles: Handles) -> None:
    """Put a legend below the axes, in as many columns as fit, and make the figure taller by its height."""
    if len(handles) < 2:
        return
    labels, lines = zip(*handles, strict=True)
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            lines,
            _shorten_labels(labels),
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


def _shorten_labels(labels: Sequence[str]) -> list[str]:
    """Return the labels, shortened as far as they stay different."""
    for longest in (NARROW, 2 * NARROW):
        short = [shorten(label, longest) for label in labels]
        if len(set(short)) == len(set(labels)):
            return short
    return list(labels)


def _make_handle(style: Style, line: Any = "none", marked: bool = True) -> Any:
    """Return the handle of a legend entry."""
    from matplotlib.lines import Line2D

    marker = MARKERS[style.symbol] if marked else "none"
    return Line2D([], [], color=style.colour, marker=marker, linestyle=line)


def _draw_pareto(view: views.ParetoView, styles: Styles) -> Any:
    figure, axes = _new_figure(2.2)
    xs, ys = zip(*view.front, strict=True)
    axes.step(xs, ys, where="post", color="#888888", linewidth=0.9, zorder=1)
    for point in view.points:
        style = styles[point.series]
        _draw_point(axes, point, style, hollow=point.low is None, alpha=choose_opacity(point))
    if view.x.log:
        costs = list_xs(view.points)
        _make_x_log(axes, choose_log_ticks(min(costs), max(costs)))
    _finish_axes(axes, view.x, view.y)
    handles: Handles = []
    for name in sorted({point.series for point in view.points}):
        handles.append((name, _make_handle(styles[name])))
    _add_legend(figure, handles)
    return figure


def _draw_setting(view: views.SettingView, styles: Styles) -> Any:
    figure, axes = _new_figure(2.2)
    handles: Handles = []
    for name, points in view.lines.items():
        style = styles[points[0].series]
        dash = DASHES[view.count_earlier(name) % len(DASHES)]
        axes.plot(list_xs(points), [point.y for point in points], color=style.colour, linestyle=dash)
        for point in points:
            _draw_point(axes, point, style, hollow=point.low is None)
        handles.append((name, _make_handle(style, dash)))
    for level, lengths in measure_dashes(view, styles):
        style, level_dash = styles[level.series], (0, [length / 2.5 for length in lengths])
        axes.axhline(level.y, color=style.colour, linestyle=level_dash)
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low, level.high, color=style.colour, alpha=0.1, linewidth=0)
        handles.append((level.label, _make_handle(style, level_dash, marked=False)))
    if view.x.log:
        ticks = view.list_places()
        if len(ticks) > MOST_VALUES:
            ticks = choose_log_ticks(ticks[0], ticks[-1])
        _make_x_log(axes, ticks)
    _finish_axes(axes, view.x, view.y)
    _add_legend(figure, handles)
    return figure


def _draw_curves(view: views.CurveView, styles: Styles) -> Any:
    figure, axes = _new_figure(2.3)
    handles: Handles = []
    for curve in view.curves:
        style, dash = style_curve(curve, styles), DASHES[curve.dash % len(DASHES)]
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.12, linewidth=0)
        axes.plot(curve.x, curve.y, color=style.colour, linestyle=dash)
        points = curve.marked_points
        for point in points:
            if len(points) > 1:  # the band shows the intervals
                point = replace(point, low=None, high=None)
            _draw_point(axes, point, style, hollow=not curve.low)
        handles.append((curve.label, _make_handle(style, dash, marked=bool(points))))
    _finish_axes(axes, Axis("optimizer step"), view.y)
    _add_legend(figure, handles)
    return figure


def _put_labels(axes: Any, points: Sequence[PlotPoint], top: float) -> None:
    """Write the labels down the side, the first at the top."""
    axes.set_yticks(range(len(points)), [shorten(point.label, NARROW) for point in points])
    axes.set_ylim(len(points) - 0.4, top)
    axes.grid(visible=False, axis="y")


def _draw_differences(view: views.DifferenceView, styles: Styles) -> Any:
    figure, axes = _new_figure(0.75 + 0.17 * len(view.points))
    axes.axvline(0, color="#444444", linewidth=0.8, linestyle=":")
    for point in view.points:
        _draw_point(axes, point, styles[point.series], hollow=not point.emphasis, horizontal=True)
    _put_labels(axes, view.points, -0.6)
    _finish_axes(axes, view.x, Axis(""))
    return figure


def _draw_ranks(view: views.RankView, styles: Styles) -> Any:
    figure, axes = _new_figure(0.95 + 0.17 * len(view.points))
    for point in view.points:
        style = styles.get(point.series, NO_SERIES)
        axes.plot(point.x, point.y, MARKERS[style.symbol], color=style.colour)
    axes.plot([1, 1 + view.difference], [-1, -1], color="black", linewidth=1.8)
    axes.annotate(f" {view.difference:.3g}", (1 + view.difference, -1), va="center")
    right = max(1 + view.difference, *list_xs(view.points))
    for lane, first, last in view.cliques:
        x = right + (lane + 2) * (right - 1) / 26
        axes.plot([x, x], [first - 0.2, last + 0.2], color="black", linewidth=2.2, solid_capstyle="butt")
    _put_labels(axes, view.points, -1.7)
    step = max(1, round(right / 8))
    axes.set_xticks(range(1, int(right) + 1, step))
    _finish_axes(axes, Axis(f"mean rank over {view.blocks} blocks, 1 is best"), Axis(""))
    return figure
