"""Compute what each figure of a comparison shows, as plain numbers.

``figures`` draws these views for the screen, ``plots`` for paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from .axes import (
    PERCENT,
    Axis,
    Cost,
    divide,
    make_cost_axis,
    make_metric_axis,
    needs_log,
    show_metric_name,
)
from .schema import ComparisonData, RowData, has_all
from .styles import ALL_ROWS, find_series, is_number

MOST_CURVES = 12
FEW = 5  # a curve of at most this many points has a marker at each
SHOWN_DIFFERENCE = ("better", "worse")  # verdicts that say that two rows differ
VALIDATED = {
    "classification": ("accuracy", True),
    "causal_lm": ("bits per byte", False),
}  # by task: the metric that is validated, and whether it is shown in percent


@dataclass(frozen=True)
class PlotPoint:
    """A row in a figure. ``low`` and ``high`` end its 95 % interval; they are None for a single seed."""

    label: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    emphasis: bool = False  # the row is on the front, or differs from the baseline


def is_sparsity(key: str) -> bool:
    """Tell whether a setting is a sparsity."""
    return key.split(".")[-1] == "sparsity"


def list_xs(points: Iterable[PlotPoint]) -> list[float]:
    """Return the x of each point."""
    return [point.x for point in points]


@dataclass(frozen=True)
class ParetoView:
    """Metric against a cost. ``front`` is the step line through the rows that no other row beats."""

    x: Axis
    y: Axis
    points: list[PlotPoint]
    front: list[tuple[float, float]]
    left_out: str  # which rows are not drawn, in words


@dataclass(frozen=True)
class DifferenceView:
    """Differences to the rows named by ``baseline``, one point below the other."""

    baseline: str
    x: Axis
    points: list[PlotPoint]
    left_out: str


@dataclass(frozen=True)
class SettingView:
    """Metric against the setting ``key``.

    ``lines`` has the points of each series and combination of other settings; ``levels`` are rows without the
    setting.
    """

    key: str
    x: Axis
    y: Axis
    lines: dict[str, list[PlotPoint]]
    levels: list[PlotPoint]
    left_out: str

    @property
    def is_density(self) -> bool:
        """Whether the setting is a sparsity, which is drawn as density."""
        return is_sparsity(self.key)

    def list_places(self) -> list[float]:
        """Return the different values of the setting on the x axis, sorted."""
        places: set[float] = set()
        for points in self.lines.values():
            places.update(list_xs(points))
        return sorted(places)

    def count_earlier(self, name: str) -> int:
        """Count the lines before ``name`` in the same series; the count chooses the dash of a line."""
        count = 0
        for other, points in self.lines.items():
            if other == name:
                break
            if points[0].series == self.lines[name][0].series:
                count += 1
        return count


@dataclass(frozen=True)
class Curve:
    """The validation metric of a row over steps.

    ``low`` and ``high`` bound its band and are empty for a single seed. ``dash`` counts the curves of its
    series before this one.
    """

    label: str
    series: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    dash: int

    @property
    def marked_points(self) -> list[PlotPoint]:
        """The points that get a marker: all of a short curve, since a line of one point is invisible."""
        if len(self.x) > FEW:
            return []
        found = []
        for at, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            point = PlotPoint(self.label, self.series, x, y)
            if self.low:
                point = replace(point, low=self.low[at], high=self.high[at])
            found.append(point)
        return found


@dataclass(frozen=True)
class CurveView:
    """The validation metric over steps, for the best rows if there are many."""

    y: Axis
    curves: list[Curve]
    left_out: str


@dataclass(frozen=True)
class RankView:
    """Mean ranks, best first, as a critical-difference diagram.

    A clique is drawn as a bar: its lane, and the first and last place that it joins.
    """

    points: list[PlotPoint]
    difference: float
    blocks: int
    cliques: list[tuple[int, int, int]]


def _describe_left_out(rows: Sequence[RowData], shown: int, why: str) -> str:
    missing = len(rows) - shown
    if not missing:
        return ""
    verb = "is" if missing == 1 else "are"
    return f"{missing} of {len(rows)} rows {verb} not drawn ({why})."


def _make_point(row: RowData, by: Sequence[str], x: float, y: Axis, emphasis: bool = False) -> PlotPoint:
    """Return the point of a row with its mean and interval on the y axis."""
    low, high = divide(row["low"], y), divide(row["high"], y)
    return PlotPoint(row["label"], find_series(row, by), x, row["mean"] / y.scale, low, high, emphasis)


def find_front(costs: Sequence[float], values: Sequence[float], higher_is_better: bool) -> list[int]:
    """Return the places of the Pareto front, sorted by cost.

    A place is on the front if no other has at most its cost and at least its value and is better in one of
    them.
    """
    sign = 1 if higher_is_better else -1
    found: list[int] = []
    for place in sorted(range(len(costs)), key=lambda at: (costs[at], -sign * values[at])):
        if found:
            last = found[-1]
            is_better = sign * values[place] > sign * values[last]
            is_equal = (costs[place], values[place]) == (costs[last], values[last])
            if not is_better and not is_equal:
                continue
        found.append(place)
    return found


def view_pareto(comparison: ComparisonData, cost: Cost) -> ParetoView | None:
    """Return the metric against a cost; None if no row has both.

    The front continues to the right edge.
    """
    rows, costs, means = [], [], []
    for row in comparison["rows"]:
        if row["mean"] is not None and row.get(cost.key) is not None:
            rows.append(row)
            costs.append(row[cost.key])
            means.append(row["mean"])
    if not rows:
        return None
    x, y = make_cost_axis(cost, costs), make_metric_axis(comparison)
    best = find_front(costs, means, comparison["metric"]["higher_is_better"])
    points = []
    for place, row in enumerate(rows):
        points.append(_make_point(row, comparison["by"], row[cost.key] / x.scale, y, place in best))
    front = [(points[place].x, points[place].y) for place in best]
    front.append((max(list_xs(points)), front[-1][1]))
    left_out = _describe_left_out(comparison["rows"], len(rows), "no finished run or no such cost")
    return ParetoView(x, y, points, front, left_out)


def view_curves(comparison: ComparisonData) -> CurveView:
    """Return the validation metric over steps; there are no curves if no row was validated."""
    metric = comparison["metric"]
    words, percent = VALIDATED.get(str(comparison["task"]), (metric["words"], metric["percent"]))
    axis = Axis(f"validation {words}")
    if percent:
        axis = Axis(f"validation {words} in %", PERCENT)
    validated = []
    for row in comparison["rows"]:
        points = [point for point in row["curve"] if point["mean"] is not None]
        if points:
            validated.append((row, points))
    curves: list[Curve] = []
    counts: dict[str, int] = {}
    for row, points in validated[:MOST_CURVES]:
        series = find_series(row, comparison["by"])
        low: list[float] = []
        high: list[float] = []
        if has_all(points, "low") and has_all(points, "high"):
            low = _read_column(points, "low", axis)
            high = _read_column(points, "high", axis)
        steps, means = [point["step"] for point in points], _read_column(points, "mean", axis)
        curves.append(Curve(row["label"], series, steps, means, low, high, counts.get(series, 0)))
        counts[series] = counts.get(series, 0) + 1
    why = "no validation"
    if len(validated) > MOST_CURVES:
        why = f"only the best {MOST_CURVES} are"
    return CurveView(axis, curves, _describe_left_out(comparison["rows"], len(curves), why))


def _read_column(points: Sequence[dict[str, Any]], key: str, axis: Axis) -> list[float]:
    return [point[key] / axis.scale for point in points]


def view_settings(comparison: ComparisonData) -> list[SettingView]:
    """Return a view for each compared setting that has at least two different numbers.

    A sparsity is drawn as density, on a logarithmic axis.
    """
    rows = [row for row in comparison["rows"] if row["mean"] is not None]
    found = []
    for key in comparison["by"]:
        numbers = {row["by"][key] for row in rows if is_number(row["by"].get(key))}
        if len(numbers) > 1:
            view = _view_setting(comparison, rows, key)
            if view.lines:
                found.append(view)
    return found


def _view_setting(comparison: ComparisonData, rows: Sequence[RowData], key: str) -> SettingView:
    by, y = comparison["by"], make_metric_axis(comparison)
    lines: dict[str, list[PlotPoint]] = {}
    levels: list[PlotPoint] = []
    places: list[float] = []
    for row in rows:
        value = row["by"].get(key)
        if value is None:
            levels.append(_make_point(row, by, 0.0, y))
        elif is_number(value):
            x = float(value)
            if is_sparsity(key):
                x = round(100 * (1 - value), 9)  # density in %
                if x <= 0:  # which has no place on a logarithmic axis
                    continue
            lines.setdefault(_name_line(row, by, key), []).append(_make_point(row, by, x, y))
            places.append(x)
    if is_sparsity(key):
        x_axis = Axis("density of the change in % (100 - sparsity)", log=True)
    else:
        x_axis = Axis(key, log=needs_log(places))
    for points in lines.values():
        points.sort(key=attrgetter("x"))
    why = f"no finished run, or no {key} that this axis can show"
    left_out = _describe_left_out(comparison["rows"], len(places) + len(levels), why)
    return SettingView(key, x_axis, y, lines, levels, left_out)


def _name_line(row: RowData, by: Sequence[str], key: str) -> str:
    """Return the series of a row and the values of its other compared settings."""
    series = find_series(row, by)
    others = []
    for other in by:
        value = row["by"].get(other)
        if other != key and value is not None and str(value) != series:
            others.append(f"{other.removeprefix('method.')}={value}")
    if series == ALL_ROWS and others:
        return " ".join(others)
    return " ".join([series, *others])


def view_differences(comparison: ComparisonData) -> DifferenceView | None:
    """Return differences from the baseline or best row in the table's order; None if there are none."""
    by, metric, scale = comparison["by"], comparison["metric"], make_metric_axis(comparison).scale
    unit = " in percentage points" if metric["percent"] else ""
    better = "right is better" if metric["higher_is_better"] else "left is better"
    x = Axis(f"difference in {show_metric_name(metric)}{unit}, {better}", scale)
    points: list[PlotPoint] = []
    baselines: dict[str, None] = {}
    for row in comparison["rows"]:
        versus = row["versus"]
        if not versus or versus["difference"] is None or row["mean"] is None:
            continue
        difference = versus["difference"] / scale or 0.0  # -0.0 would be shown with a minus
        low, high = divide(versus["low"], x), divide(versus["high"], x)
        differs = versus["verdict"] in SHOWN_DIFFERENCE
        place = len(points)
        points.append(PlotPoint(row["label"], find_series(row, by), difference, place, low, high, differs))
        baselines[versus["against"]] = None
    if not points:
        return None
    drawn = {*baselines, *(point.label for point in points)}  # a baseline is the line at zero
    shown = sum(row["label"] in drawn for row in comparison["rows"])
    left_out = _describe_left_out(comparison["rows"], shown, "no such test")
    return DifferenceView(", ".join(baselines), x, points, left_out)


def view_ranks(comparison: ComparisonData) -> RankView | None:
    """Return the critical-difference diagram; None if the comparison has none.

    Rows are listed from top to bottom, so that there is room for long names.
    """
    found = comparison["critical_difference"]
    if not found or not found["ranks"]:
        return None
    series = {row["label"]: find_series(row, comparison["by"]) for row in comparison["rows"]}
    labels = sorted(found["ranks"], key=lambda label: (found["ranks"][label], label))
    points = []
    for place, label in enumerate(labels):
        points.append(PlotPoint(label, series.get(label, label), found["ranks"][label], place))
    return RankView(points, found["cd"], found["blocks"], _place_bars(labels, found["cliques"]))


def _place_bars(labels: Sequence[str], cliques: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """Give each clique of at least two rows the first lane in which its bar touches no other."""
    spans = set()
    for clique in cliques:
        places = [labels.index(label) for label in clique if label in labels]
        if len(places) > 1:
            spans.add((min(places), max(places)))
    ends: list[int] = []  # where the last bar of each lane ends
    bars = []
    for first, last in sorted(spans):
        lane = 0
        while lane < len(ends) and ends[lane] >= first:
            lane += 1
        ends[lane : lane + 1] = [last]
        bars.append((lane, first, last))
    return bars
