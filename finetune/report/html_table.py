"""Write the table of the HTML report: its columns, its rows, and the details that each row unfolds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from .axes import show_metric_name
from .markup import escape
from .metric import show_bytes, show_share
from .readable import DASH, show_difference, show_metric, show_p, show_seconds, show_setting
from .runs import NO_RESULT
from .schema import ComparisonData, MetricData, RowData, has_any
from .styles import Style, find_series, make_styles

EMPTY = f'<span class="none">{DASH}</span>'
RANKS = {
    "best": ("best", "better than every other row"),
    "tie": ("top", "not shown to differ from the best mean"),
}  # the rank of a row: its badge and the badge's title


class Cell(NamedTuple):
    """A table cell: the value that its column is sorted by (None if it has none), and its HTML."""

    value: Any = None
    html: str = EMPTY


@dataclass(frozen=True)
class Column:
    """A column: its heading, an explanation of it, and a function that returns the cell of a row."""

    heading: str
    explanation: str
    write_cell: Callable[[RowData], Cell]
    numeric: bool = True


def make_columns(comparison: ComparisonData) -> list[Column]:
    """Return all columns but the first, which has the labels of the rows."""
    rows = comparison["rows"]
    columns = []
    for key in comparison["by"]:
        if not _is_in_labels(key, rows):
            columns.append(Column(key, f"the setting {key}", partial(_write_setting, key), numeric=False))
    columns.append(_make_mean_column(comparison))
    started = "finished runs out of all started ones, and what happened to the others"
    columns.append(Column("seeds", started, _write_seeds))
    if has_any(rows, "versus"):
        columns.append(_make_versus_column(comparison))
    if has_any(rows, "retention"):
        columns.append(_make_retention_column(comparison))
    columns.append(
        _make_number_column("trained", "trained", "parameters that the optimizer updates", "{:,}".format)
    )
    if has_any(rows, "changed"):
        meaning = "share of the adapted entries that differ from the pretrained ones at the end"
        columns.append(_make_number_column("changed", "changed", meaning, show_share))
    columns += [
        _make_number_column("stored_bytes", "stored", "size of the files of the trained change", show_bytes),
        _make_number_column("step_seconds", "time per step", "median over steps and seeds", show_seconds),
        _make_number_column(
            "peak_memory_bytes", "peak memory", "maximum over seeds of the memory in use at once", show_bytes
        ),
    ]
    if has_any(rows, "trials"):
        tried = "how many values of the tuned setting were tried on validation"
        columns.append(_make_number_column("trials", "tuning trials", tried, str))
    return columns


def _is_in_labels(key: str, rows: Sequence[RowData]) -> bool:
    """Tell whether every label begins with the value of the setting, which then needs no column."""
    return all(row["label"].startswith(show_setting(row["by"].get(key))) for row in rows)


def _write_setting(key: str, row: RowData) -> Cell:
    value = row["by"].get(key)
    if value is None:
        return Cell()
    return Cell(value, escape(show_setting(value)))


def _make_number_column(key: str, heading: str, explanation: str, show: Callable[[Any], str]) -> Column:
    """Return a column that shows one number of each row; the number may be missing."""
    return Column(heading, explanation, partial(_write_number, key, show))


def _write_number(key: str, show: Callable[[Any], str], row: RowData) -> Cell:
    value = row.get(key)
    if value is None:
        return Cell()
    return Cell(value, escape(show(value)))


def _make_mean_column(comparison: ComparisonData) -> Column:
    """Return the column of means and intervals, with a picture on a scale that all rows share."""
    metric, styles = comparison["metric"], make_styles(comparison)
    ends = []
    for row in comparison["rows"]:
        ends += [row[key] for key in ("mean", "low", "high") if row[key] is not None]
    start = min(ends, default=0.0)
    span = (max(ends, default=1.0) - start) or 1.0

    def write_mean(row: RowData) -> Cell:
        if row["mean"] is None:
            return Cell()
        interval = "one seed"
        if row["low"] is not None and row["high"] is not None:
            interval = f"{show_metric(metric, row['low'])} to {show_metric(metric, row['high'])}"
        colour = styles[find_series(row, comparison["by"])].colour
        picture = _draw_interval(row, start, span, colour)
        mean = show_metric(metric, row["mean"])
        return Cell(row["mean"], f'<b>{mean}</b>{picture}<span class="interval">{interval}</span>')

    heading = show_metric_name(metric)
    if metric["percent"]:
        heading += ", %"
    explanation = (
        "mean over seeds, with its 95 % interval (t) over seeds; the bars of all rows have the same scale"
    )
    return Column(heading, explanation, write_mean)


def _draw_interval(row: RowData, start: float, span: float, colour: str) -> str:
    """Return an SVG of the mean and its interval; the dot of a single seed is hollow."""
    x = {}
    for key in ("mean", "low", "high"):
        if row[key] is not None:
            x[key] = f"{5 + 90 * (row[key] - start) / span:.1f}"
    bar, fill = "", "none"
    if "low" in x and "high" in x:
        bar = f'<line x1="{x["low"]}" x2="{x["high"]}" y1="6" y2="6"/>'
        fill = colour
    dot = f'<circle cx="{x["mean"]}" cy="6" r="3.2" fill="{fill}"/>'
    return f'<svg class="range" viewBox="0 0 100 12" aria-hidden="true" stroke="{colour}">{bar}{dot}</svg>'


def _make_versus_column(comparison: ComparisonData) -> Column:
    baselines = dict.fromkeys(row["versus"]["against"] for row in comparison["rows"] if row["versus"])
    against = ", ".join(baselines)
    explanation = (
        f"difference from {against} with its 95 % interval, and p after Holm's correction; "
        "a tie means that no difference was shown"
    )
    return Column(f"to {against}", explanation, partial(_write_versus, comparison["metric"]))


def _write_versus(metric: MetricData, row: RowData) -> Cell:
    versus = row["versus"]
    if not versus or versus["difference"] is None:
        return Cell()
    interval, chance = "", ""
    if versus["low"] is not None:
        low, high = show_difference(metric, versus["low"]), show_difference(metric, versus["high"])
        interval = f"{low} to {high}"
    if versus["p_holm"] is not None:
        chance = f'<span class="p">p {show_p(versus["p_holm"])}</span>'
    verdict = escape(versus["verdict"])
    badge = f'<span class="badge {verdict}" title="{escape(versus["test"])}">{verdict}</span>'
    difference = show_difference(metric, versus["difference"])
    html = f'{badge}<b>{difference}</b><span class="interval">{interval} {chance}</span>'
    return Cell(versus["difference"], html)


def _make_retention_column(comparison: ComparisonData) -> Column:
    heading, metric = "retention, bits per byte", {"name": "retention.bits_per_byte"}
    if comparison["task"] == "classification":
        heading, metric = "retention, %", {"name": "retention.accuracy"}
    explanation = "the metric on data that the model should not forget"
    return Column(heading, explanation, partial(_write_retention, metric))


def _write_retention(metric: MetricData, row: RowData) -> Cell:
    retention = row["retention"]
    if not retention or retention["mean"] is None:
        return Cell()
    html = show_metric(metric, retention["mean"])
    if retention.get("base") is not None:
        html += f'<span class="interval">{show_metric(metric, retention["base"])} before</span>'
    return Cell(retention["mean"], html)


def count_without_result(row: RowData) -> int:
    """Return how many runs of the row failed, were pruned or have not finished."""
    return int(sum(row[status] for status in NO_RESULT))


def _write_seeds(row: RowData) -> Cell:
    badges = ""
    for status in NO_RESULT:
        if row[status]:
            badges += f'<span class="badge worse">{row[status]} {status}</span>'
    if row["missing"]:
        badges += f'<span class="badge worse">{row["missing"]} without the metric</span>'
    if row["single_seed"]:
        badges += '<span class="badge">single seed</span>'
    without_result = count_without_result(row)
    counts = f"{row['finished']} of {row['finished'] + without_result}"
    return Cell(without_result, f"{counts}<span class=interval>{badges}</span>")


def write_table(comparison: ComparisonData) -> str:
    """Return the whole table; each row is a ``tbody``, so that sorting moves its details with it."""
    columns, styles = make_columns(comparison), make_styles(comparison)
    explanation = (
        "the row's label; a badge marks the best mean, and rows that were not shown to differ from it"
    )
    heads = _write_head(0, "row", explanation, "none", numeric=False)
    best_first = "ascending"
    if comparison["metric"]["higher_is_better"]:
        best_first = "descending"
    sorted_by = [column.numeric for column in columns].index(True)  # the metric, after the settings
    sorting = ["none"] * len(columns)
    sorting[sorted_by] = best_first
    for place, column in enumerate(columns):
        heads += _write_head(place + 1, column.heading, column.explanation, sorting[place], column.numeric)
    bodies = ""
    for place, row in enumerate(comparison["rows"]):
        bodies += _write_row(place, row, comparison, columns, styles)
    return f'<table id="rows"><thead><tr>{heads}</tr></thead>{bodies}</table>'


def _write_head(place: int, heading: str, explanation: str, sorting: str, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    arrow = '<span class="arrow" aria-hidden="true"></span>'
    button = f'<button type="button" data-column="{place}">{escape(heading)}{arrow}</button>'
    return f'<th scope="col"{kind} aria-sort="{sorting}" title="{escape(explanation)}">{button}</th>'


def _write_row(
    place: int,
    row: RowData,
    comparison: ComparisonData,
    columns: Sequence[Column],
    styles: Mapping[str, Style],
) -> str:
    """Return the ``tbody`` of a row; its attributes hold what the page's search and filters use."""
    settings = [show_setting(row["by"].get(key)) for key in dict.fromkeys(comparison["by"])]
    words = escape(" ".join([row["label"], *settings, *row["errors"]]).lower())
    data = ""
    for number, value in enumerate(settings):
        data += f' data-by-{number}="{escape(value)}"'
    colour = styles[find_series(row, comparison["by"])].colour
    cells = _write_label(place, row, colour)
    for column in columns:
        cells += _write_cell(column, row)
    details = _write_details(row, comparison["metric"])
    more = f'<tr class="more" id="more-{place}"><td colspan="{len(columns) + 1}">{details}</td></tr>'
    return f'<tbody data-words="{words}"{data}><tr>{cells}</tr>{more}</tbody>'


def _write_label(place: int, row: RowData, colour: str) -> str:
    """Return the first cell of a row: label, badge, and the buttons for its details and its command."""
    label = escape(row["label"])
    badge = ""
    if row["rank"] in RANKS:
        word, title = RANKS[row["rank"]]
        badge = f' <span class="badge best" title="{title}">{word}</span>'
    name = f'<i class="dot" style="background:{colour}"></i><span class="name">{label}</span>{badge}'
    details = (
        '<button type="button" class="toggle" aria-expanded="false" '
        f'aria-controls="more-{place}">details</button>'
    )
    copy = (
        f'<button type="button" class="copy" data-copy="{escape(row["command"])}" '
        f'aria-label="copy the command of {label}">copy command</button>'
    )
    return f'<th scope="row" data-value="{label}">{name}<span class="does">{details}{copy}</span></th>'


def _write_cell(column: Column, row: RowData) -> str:
    cell = column.write_cell(row)
    sort_value = ""
    if cell.value is not None and not (isinstance(cell.value, float) and not math.isfinite(cell.value)):
        sort_value = escape(str(cell.value))
    kind = " class=number" if column.numeric else ""
    return f'<td{kind} data-value="{sort_value}">{cell.html}</td>'


def _write_details(row: RowData, metric: MetricData) -> str:
    """Return the exact command, the value of every seed, the errors, and the run folders."""
    parts = f"<dt class=command>command</dt><dd class=command><code>{escape(row['command'])}</code></dd>"
    for plugin in row["plugins"]:
        words = f"the plug-in {escape(plugin)}: add --plugins DIR with its folder, unless it is installed"
        parts += f"<dt>needs</dt><dd>{words}</dd>"
    if row["values"]:
        values = ", ".join(show_metric(metric, value) for value in row["values"])
        parts += f"<dt>every seed</dt><dd>{values}</dd>"
    examples = row.get("examples")
    if examples:
        low, high = show_metric(metric, examples["low"]), show_metric(metric, examples["high"])
        parts += (
            f"<dt>this one model</dt><dd>{low} to {high}, "
            f"95 % interval over {examples['count']:,} test examples, not over seeds</dd>"
        )
    if row["base"] is not None:
        parts += f"<dt>before training</dt><dd>{show_metric(metric, row['base'])}</dd>"
    if row["train_seconds"] is not None:
        parts += f"<dt>training</dt><dd>{show_seconds(row['train_seconds'])} in all</dd>"
    if row["errors"]:
        parts += "<dt>failed with</dt>"
        for error in row["errors"]:
            parts += f"<dd>{escape(error)}</dd>"
    parts += "<dt>runs</dt>"
    for run in row["runs"]:
        parts += f"<dd><code>{escape(str(run))}</code></dd>"
    return f"<dl>{parts}</dl>"
