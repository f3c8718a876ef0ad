"""Draw the plots of an analysis as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.analysis import Curves, HeatMap, Plot


def draw_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write ``NAME.png`` into ``folder`` for each plot; return the files."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        figure = _draw_heat_map(plot) if isinstance(plot, HeatMap) else _draw_curves(plot)
        file = folder / f"{plot.name}.png"
        figure.savefig(file, dpi=120)
        written.append(file)
    return written


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes on the Agg canvas, which needs neither pyplot's state nor a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _draw_heat_map(plot: HeatMap) -> Any:
    figure, axes = _new_figure(2.5 + 0.7 * len(plot.columns), 1.8 + 0.28 * len(plot.rows))
    image = axes.imshow(plot.values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(plot.columns)), plot.columns)
    axes.set_yticks(range(len(plot.rows)), plot.rows)
    _label(axes, plot)
    figure.colorbar(image, ax=axes)
    return figure


def _draw_curves(plot: Curves) -> Any:
    figure, axes = _new_figure(5.5, 3.2)
    for name, values in plot.curves.items():
        axes.plot(plot.x, values, marker=".", label=name)
    if all(isinstance(x, int) for x in plot.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    if len(plot.curves) > 1:
        axes.legend()
    _label(axes, plot)
    return figure


def _label(axes: Any, plot: Plot) -> None:
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.set_title(plot.title, fontsize=10)
