"""What each figure of a comparison shows, as plain numbers: drawn for the screen by ``figures`` and for paper by ``plots``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Data = Mapping[str, Any]
# told apart by colour-blind eyes, on white and on black
PALETTE = ("#0f7fc4", "#dd5f0c", "#079268", "#c25f9a", "#a3780a", "#8367d6", "#c9404a", "#5d7f88")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "pentagon", "star")
ROWS = "rows"  # the one series of rows that only numbers tell apart
MOST_CURVES = 12
FEW = 5  # points of a curve up to which each has a marker
TOLD = ("better", "worse")  # verdicts that tell two rows apart
VALIDATED = {
    "classification": ("accuracy", True),
    "causal_lm": ("bits per byte", False),
}  # by task: what is validated, and whether it is a share
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


@dataclass(frozen=True)
class Cost:
    """Something to pay for a result: a key of a row, how it is called, and its units from the largest to the smallest."""

    key: str
    words: str
    units: tuple[tuple[float, str], ...]


COSTS = (
    Cost("peak_memory_bytes", "peak memory", SIZES),
    Cost(
        "trained", "trained parameters", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))
    ),
    Cost("step_seconds", "time per step", ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))),
    Cost("stored_bytes", "stored change", SIZES),
)


@dataclass(frozen=True)
class Style:
    """How a series looks in every figure."""

    colour: str
    symbol: str


@dataclass(frozen=True)
class Axis:
    """The words under an axis, what its values were divided by, and whether it is logarithmic."""

    title: str
    scale: float = 1.0
    log: bool = False


@dataclass(frozen=True)
class Point:
    """One row in a figure; ``low`` and ``high`` are the ends of its 95 % interval, missing for a single seed."""

    label: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    emphasis: bool = False  # on the front; told apart from the baseline


@dataclass(frozen=True)
class View:
    """A figure: points by row, and lines as lists of x and y; ``left_out`` says in words which rows it cannot show."""

    key: str
    x: Axis
    y: Axis
    points: list[Point]
    line: list[tuple[float, float]] = field(default_factory=list)
    left_out: str = ""


def series(row: Data, by: Sequence[str]) -> str:
    """What gives a row its colour: its method, or else the first compared setting that is no number."""
    keys = [key for key in by if key == "method"] or [
        key for key in by if row["by"].get(key) is not None and not _number(row["by"][key])
    ]
    value = row["by"].get(keys[0]) if keys else None
    return ROWS if value is None else str(value)


def styles(comparison: Data) -> dict[str, Style]:
    """Colour and symbol of each series; by name, so that the same methods look the same in every report on them."""
    names = sorted({series(row, comparison["by"]) for row in comparison["rows"]})
    return {name: Style(PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)]) for i, name in enumerate(names)}


def metric_axis(comparison: Data) -> Axis:
    """The metric's name with its unit and the better direction."""
    metric = comparison["metric"]
    better = "higher is better" if metric["higher_is_better"] else "lower is better"
    return Axis(
        f"{metric_words(metric)}{' in %' if metric['percent'] else ''}, {better}",
        0.01 if metric["percent"] else 1.0,
    )


def metric_words(metric: Data) -> str:
    """``test accuracy``"""
    return ("test " if str(metric["name"]).startswith("test.") else "") + str(metric["words"])


def _scaled(value: float | None, axis: Axis) -> float | None:
    return None if value is None else value / axis.scale


def _wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them all."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 8


def ticks(low: float, high: float) -> list[float]:
    """Round places on a logarithmic axis: 1, 2 and 5 of each decade, or where that is crowded the decades alone."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        inside = [place for place in found if low * 0.8 <= place <= high * 1.25]
        if len(inside) <= 7:
            break
    return inside


def _left_out(rows: Sequence[Data], shown: int, why: str) -> str:
    missing = len(rows) - shown
    return (
        f"{missing} of {len(rows)} rows {'is' if missing == 1 else 'are'} not drawn ({why})."
        if missing
        else ""
    )


def cost_axis(cost: Cost, values: Sequence[float]) -> Axis:
    """In the largest unit in which the largest value, or on a logarithmic axis the middle, is at least one."""
    log = _wide(values)
    typical = math.sqrt(min(values) * max(values)) if log else max(values, default=0)
    scale, unit = next((pair for pair in cost.units if typical >= pair[0]), cost.units[-1])
    return Axis(f"{cost.words}, {unit}" if unit else cost.words, scale, log)


def front(costs: Sequence[float], values: Sequence[float], higher_is_better: bool) -> list[int]:
    """The places that no other beats: at most the cost and at least the value, and better in one of them; by cost."""
    sign = 1 if higher_is_better else -1
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -sign * values[i])):
        last = found[-1] if found else None
        if (
            last is None
            or sign * values[i] > sign * values[last]
            or (costs[i], values[i]) == (costs[last], values[last])
        ):
            found.append(i)
    return found


def pareto(comparison: Data, cost: Cost) -> View | None:
    """Metric against a cost, with the front as a step line that goes on to the right edge; ``None`` if no row has both."""
    rows = [row for row in comparison["rows"] if row["mean"] is not None and row.get(cost.key) is not None]
    if not rows:
        return None
    x, y = cost_axis(cost, [row[cost.key] for row in rows]), metric_axis(comparison)
    best = front(
        [row[cost.key] for row in rows],
        [row["mean"] for row in rows],
        comparison["metric"]["higher_is_better"],
    )
    points = [
        _point(row, comparison["by"], row[cost.key] / x.scale, y, i in best) for i, row in enumerate(rows)
    ]
    line = [(points[i].x, points[i].y) for i in best]
    line.append((max(point.x for point in points), line[-1][1]))
    return View(
        cost.key,
        x,
        y,
        points,
        line,
        _left_out(comparison["rows"], len(rows), "no finished run or no such cost"),
    )


def _point(row: Data, by: Sequence[str], x: float, y: Axis, emphasis: bool = False) -> Point:
    return Point(
        row["label"],
        series(row, by),
        x,
        row["mean"] / y.scale,
        _scaled(row["low"], y),
        _scaled(row["high"], y),
        emphasis,
    )


@dataclass(frozen=True)
class Curve:
    """A line with its band; ``low`` and ``high`` are empty for a single seed. ``dash`` counts the curves of the series before it."""

    label: str
    series: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    dash: int

    @property
    def points(self) -> list[Point]:
        """Those that get a marker: all of a curve of few points, since a line of one does not show."""
        if len(self.x) > FEW:
            return []
        ends = zip(self.low, self.high, strict=True) if self.low else [(None, None)] * len(self.x)
        return [
            Point(self.label, self.series, x, y, low, high)
            for x, y, (low, high) in zip(self.x, self.y, ends, strict=True)
        ]


def curves(comparison: Data) -> tuple[Axis, list[Curve], str]:
    """The validation metric over steps, of the best rows where they are many; and which rows are left out, in words."""
    metric = comparison["metric"]
    words, percent = VALIDATED.get(str(comparison["task"]), (metric["words"], metric["percent"]))
    axis = Axis(f"validation {words}{' in %' if percent else ''}", 0.01 if percent else 1.0)
    rows = [row for row in comparison["rows"] if any(point["mean"] is not None for point in row["curve"])]
    made: list[Curve] = []
    for row in rows[:MOST_CURVES]:
        points = [point for point in row["curve"] if point["mean"] is not None]
        name = series(row, comparison["by"])
        band = all(point["low"] is not None and point["high"] is not None for point in points)
        columns = {
            key: [point[key] / axis.scale for point in points]
            for key in ("mean", *(("low", "high") if band else ()))
        }
        steps = [point["step"] for point in points]
        dash = sum(curve.series == name for curve in made)
        made.append(
            Curve(
                row["label"],
                name,
                steps,
                columns["mean"],
                columns.get("low", []),
                columns.get("high", []),
                dash,
            )
        )
    why = f"only the best {MOST_CURVES} are" if len(rows) > MOST_CURVES else "no validation"
    return axis, made, _left_out(comparison["rows"], len(made), why)


@dataclass(frozen=True)
class Settings:
    """Metric against a setting: a line of points for each series and other settings, and rows without that setting as levels."""

    key: str
    x: Axis
    y: Axis
    lines: dict[str, list[Point]]
    levels: list[Point]
    left_out: str


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings(comparison: Data) -> list[Settings]:
    """A figure for each compared setting of which at least two numbers occur; sparsity becomes density on a logarithmic axis."""
    rows = [row for row in comparison["rows"] if row["mean"] is not None]
    found = [
        _setting(comparison, rows, key)
        for key in comparison["by"]
        if len({v for row in rows if _number(v := row["by"].get(key))}) > 1
    ]
    return [setting for setting in found if setting.lines]


def _setting(comparison: Data, rows: Sequence[Data], key: str) -> Settings:
    by, y, dense = comparison["by"], metric_axis(comparison), key.split(".")[-1] == "sparsity"
    place: Callable[[float], float] = (lambda value: round(100 * (1 - value), 9)) if dense else float
    have = [row for row in rows if _number(row["by"].get(key)) and not (dense and place(row["by"][key]) <= 0)]
    title = "density of the change in % (100 - sparsity)" if dense else key
    x = Axis(title, log=dense or _wide([place(row["by"][key]) for row in have]))
    lines: dict[str, list[Point]] = {}
    for row in have:
        told = {k.removeprefix("method."): row["by"].get(k) for k in by if k != key}
        others = [
            f"{k}={value}" for k, value in told.items() if value is not None and str(value) != series(row, by)
        ]
        name = [series(row, by)] if series(row, by) != ROWS or not others else []
        lines.setdefault(" ".join([*name, *others]), []).append(_point(row, by, place(row["by"][key]), y))
    for points in lines.values():
        points.sort(key=lambda point: point.x)
    levels = [_point(row, by, 0.0, y) for row in rows if row["by"].get(key) is None]
    why = f"no finished run, or no {key} that this axis can show"
    return Settings(key, x, y, lines, levels, _left_out(comparison["rows"], len(have) + len(levels), why))


def place(found: Settings, name: str) -> int:
    """How many lines of the same series stand before the line ``name``: by this, lines of one colour are told apart."""
    names = [
        other for other, points in found.lines.items() if points[0].series == found.lines[name][0].series
    ]
    return names.index(name)


def differences(comparison: Data) -> View | None:
    """Differences to what the rows are held against, in the order of the table; ``None`` if there is none."""
    rows = [
        row
        for row in comparison["rows"]
        if row["versus"] and row["versus"]["difference"] is not None and row["mean"] is not None
    ]
    if not rows:
        return None
    metric, scale = comparison["metric"], metric_axis(comparison).scale
    against = list(dict.fromkeys(row["versus"]["against"] for row in rows))
    unit = " in percentage points" if metric["percent"] else ""
    better = "right is better" if metric["higher_is_better"] else "left is better"
    x, points = Axis(f"difference in {metric_words(metric)}{unit}, {better}", scale), []
    for place, row in enumerate(rows):
        low, difference, high = (_scaled(row["versus"][key], x) for key in ("low", "difference", "high"))
        points.append(
            Point(
                row["label"],
                series(row, comparison["by"]),
                difference or 0.0,
                place,
                low,
                high,
                row["versus"]["verdict"] in TOLD,
            )
        )
    shown = {row["label"] for row in rows} | set(against)
    others = [row for row in comparison["rows"] if row["label"] not in shown]
    left_out = _left_out(comparison["rows"], len(comparison["rows"]) - len(others), "no such test")
    return View(", ".join(against), x, Axis(""), points, [], left_out)


@dataclass(frozen=True)
class Ranks:
    """Mean ranks, best first; a clique is a lane, the first and the last place that its bar joins."""

    points: list[Point]
    difference: float
    blocks: int
    cliques: list[tuple[int, int, int]]


def ranks(comparison: Data) -> Ranks | None:
    """The critical-difference diagram turned upright, so that long names have room; ``None`` if the comparison has none."""
    found = comparison["critical_difference"]
    if not found or not found["ranks"]:
        return None
    colours = {row["label"]: series(row, comparison["by"]) for row in comparison["rows"]}
    ordered = sorted(found["ranks"], key=lambda label: (found["ranks"][label], label))
    points = [
        Point(label, colours.get(label, label), found["ranks"][label], place)
        for place, label in enumerate(ordered)
    ]
    spans = sorted(
        {
            (min(s), max(s))
            for c in found["cliques"]
            if len(s := [ordered.index(label) for label in c if label in ordered]) > 1
        }
    )
    lanes: list[int] = []  # the last place that each lane's bars reach
    cliques = []
    for first, last in spans:
        lane = next((i for i, reached in enumerate(lanes) if reached < first), len(lanes))
        lanes[lane : lane + 1] = [last]
        cliques.append((lane, first, last))
    return Ranks(points, found["cd"], found["blocks"], cliques)
