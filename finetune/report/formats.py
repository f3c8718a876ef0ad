"""Write a comparison as a table: for the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv as csv_module
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import make_printable
from .measure import Measure
from .metric import show_bytes, show_share
from .runs import NO_RESULT
from .schema import ComparisonData, RowData, has_any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MARKS = {"best": " *", "tie": " ="}  # the mark behind a row's label, by rank
LEGEND = {"best": "* the best", "tie": "= shares the top: no difference was shown"}
WIDE = 150  # columns of a terminal that is wide enough for a single table
LONGEST = 24  # a word of at most this many characters in a label is not broken
CSV_KEYS = (
    "rank",
    "mean",
    "low",
    "high",
    "sd",
    "base",
    "single_seed",
    "finished",
    *NO_RESULT,
    "missing",
    "trained",
    "changed",
    "stored_bytes",
    "step_seconds",
    "train_seconds",
    "peak_memory_bytes",
    "trials",
)
VERSUS_KEYS = ("against", "difference", "low", "high", "p", "p_holm", "test", "verdict")
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "\n": " ",
    "[": "{[}",
}
FORMULA_STARTS = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
)  # a spreadsheet takes texts that start like this for formulas


class Column(NamedTuple):
    """A column: its heading, the text of a row's cell, and whether it is about the result or its cost."""

    heading: str
    cell: Callable[[RowData], str]
    is_result: bool = True


def make_columns(data: ComparisonData) -> list[Column]:
    """Return the columns of a table for people, without those that would be empty in every row."""
    measure, rows = Measure(data["metric"]["name"]), data["rows"]
    columns = [
        Column(_name_measure(measure), partial(_show_mean, measure)),
        Column("95 % interval", partial(_show_interval, measure)),
    ]
    if has_any(rows, "versus"):
        columns.append(Column("difference", partial(_show_versus, measure)))
        columns.append(Column("p", _show_p))
    if has_any(rows, "retention"):
        retention = Measure("retention.bits_per_byte")
        if data["task"] == "classification":
            retention = Measure("retention.accuracy")
        columns.append(Column(_name_measure(retention), partial(_show_retention, retention)))
    columns.append(Column("seeds", _show_seeds, is_result=False))
    if has_any(rows, "base"):
        columns.append(Column("untrained", partial(_show_base, measure), is_result=False))
    if has_any(rows, "trials"):
        columns.append(Column("tuning trials", _show_trials, is_result=False))
    columns.append(Column("trained", partial(_show_cost, "trained", "{:,}".format), is_result=False))
    if has_any(rows, "changed"):
        columns.append(Column("changed", partial(_show_cost, "changed", show_share), is_result=False))
    columns.append(Column("stored", partial(_show_cost, "stored_bytes", show_bytes), is_result=False))
    columns.append(Column("s/step", partial(_show_cost, "step_seconds", "{:.3g}".format), is_result=False))
    columns.append(
        Column("peak memory", partial(_show_cost, "peak_memory_bytes", show_bytes), is_result=False)
    )
    return columns


def _name_measure(measure: Measure) -> str:
    return f"{measure.words} %" if measure.percent else measure.words


def _show_mean(measure: Measure, row: RowData) -> str:
    return measure.show(row["mean"])


def _show_base(measure: Measure, row: RowData) -> str:
    return measure.show(row["base"])


def _show_cost(key: str, show: Callable[[Any], str], row: RowData) -> str:
    """Return a cost of a row; a dash means that it is unknown."""
    if row[key] is None:
        return "-"
    return show(row[key])


def _show_interval(measure: Measure, row: RowData) -> str:
    if row["low"] is not None:
        return f"[{measure.show(row['low'])}, {measure.show(row['high'])}]"
    return "one seed" if row["single_seed"] else "-"


def _show_versus(measure: Measure, row: RowData) -> str:
    versus = row["versus"]
    if not versus or versus["difference"] is None:
        return "-"
    sign = "-" if versus["difference"] < 0 else "+"
    return f"{sign}{measure.show(abs(versus['difference']))} {versus['verdict']}"


def _show_p(row: RowData) -> str:
    p: float | None = (row["versus"] or {}).get("p_holm")
    if p is None:
        return "-"
    if p < 0.001:
        return "<0.001"
    if p < 0.1:
        return f"{p:.2g}"
    return f"{p:.2f}"


def _show_retention(measure: Measure, row: RowData) -> str:
    if not row["retention"]:
        return "-"
    return measure.show(row["retention"]["mean"])


def _show_trials(row: RowData) -> str:
    return "none" if row["trials"] is None else str(row["trials"])


def _show_seeds(row: RowData) -> str:
    counts = [f"{row[key]} {key}" for key in (*NO_RESULT, "missing") if row[key]]
    if not counts:
        return str(row["finished"])
    return f"{row['finished']} ({', '.join(counts)})"


def show_in_terminal(data: ComparisonData, width: int) -> list[RenderableType]:
    """Return what the terminal shows: fairness check, table, errors and notes.

    The table is split in two, results and costs, unless ``width`` is at least ``WIDE``.
    """
    from rich.text import Text

    columns = make_columns(data)
    halves = [columns]
    if width < WIDE:
        first_cost = [column.is_result for column in columns].index(False)
        halves = [columns[:first_cost], columns[first_cost:]]
    parts: list[RenderableType] = []
    for line in describe_fairness(data):
        parts.append(Text(make_printable(line)))
    for half in halves:
        parts += [Text(), _make_table(data, half, width)]
    parts.append(Text())
    legend = _list_legend(data)
    if legend:
        parts.append(Text("; ".join(legend) + "."))
    for line in (*describe_errors(data), *data["notes"]):
        parts.append(Text(make_printable(line)))
    return parts


def _list_legend(data: ComparisonData) -> list[str]:
    """Return what the marks of this table mean."""
    ranks = {row["rank"] for row in data["rows"]}
    return [LEGEND[rank] for rank in LEGEND if rank in ranks]


def _make_table(data: ComparisonData, columns: Sequence[Column], width: int) -> Table:
    """Return the table; only headings and labels are folded, as long as that leaves room for the labels."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    labels = [make_printable(row["label"]) + MARKS.get(row["rank"], "") for row in data["rows"]]
    widths, room = _fit_columns(data, columns, labels, width)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("row", overflow="fold", max_width=room)
    for column, fixed in zip(columns, widths, strict=True):
        table.add_column(column.heading, justify="right", overflow="fold", width=fixed)
    for label, row in zip(labels, data["rows"], strict=True):
        table.add_row(Text(label), *[Text(column.cell(row)) for column in columns])
    return table


def _fit_columns(
    data: ComparisonData, columns: Sequence[Column], labels: Sequence[str], width: int
) -> tuple[Sequence[int | None], int | None]:
    """Return the width of each column, and of the labels; None leaves a width to rich."""
    whole, folded = [], []
    for column in columns:
        widest = max(len(column.cell(row)) for row in data["rows"])
        whole.append(max(widest, len(column.heading)))
        folded.append(max(widest, *map(len, column.heading.split())))
    room = width - 2 * len(columns)
    widths = whole
    if room - sum(whole) < max(map(len, labels)):
        widths = folded
    left = room - sum(widths)
    longest_word = max(len(word) for label in labels for word in label.split())
    if left < min(LONGEST, longest_word):
        return [None] * len(columns), None
    return widths, left or None


def describe_fairness(data: ComparisonData) -> list[str]:
    """Return the fairness check as lines of text."""
    findings = [f"- {finding['words']}" for finding in data["fairness"]]
    if len(data["rows"]) < 2:
        return findings
    if not findings:
        return ["Fairness check: the rows differ only in what is compared."]
    return ["Fairness check: the rows differ in more than what is compared.", *findings]


def describe_errors(data: ComparisonData) -> list[str]:
    """Return why runs failed, one line for each reason of a row."""
    lines = []
    for row in data["rows"]:
        reasons: dict[str, int] = {}
        for error in row["errors"]:
            reason = error.partition(": ")[2]
            reasons[reason] = reasons.get(reason, 0) + 1
        for reason, count in reasons.items():
            lines.append(f"{row['label']}: {count} failed: {reason}")
    return lines


def write_csv(data: ComparisonData) -> str:
    """Return CSV with plain numbers, one line per row, and a column for each compared setting."""
    out = io.StringIO()
    writer = csv_module.writer(out, lineterminator="\n")
    versus = [f"versus_{key}" for key in VERSUS_KEYS]
    writer.writerow(
        ["row", *data["by"], "metric", *CSV_KEYS, "retention", "seeds", "values", *versus, "command"]
    )
    for row in data["rows"]:
        cells = [row["label"]]
        for key in data["by"]:
            cells.append(row["by"][key])
        cells.append(data["metric"]["name"])
        for key in CSV_KEYS:
            cells.append(row[key])
        cells.append((row["retention"] or {}).get("mean"))
        cells.append(" ".join(map(str, row["seeds"])))
        cells.append(" ".join(map(str, row["values"])))
        for key in VERSUS_KEYS:
            cells.append((row["versus"] or {}).get(key))
        cells.append(row["command"])
        writer.writerow(map(_make_csv_safe, cells))
    return out.getvalue()


def _make_csv_safe(value: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would take for a formula; keep numbers."""
    if not isinstance(value, str):
        return value
    text = make_printable(value)
    return f"'{text}" if value.startswith(FORMULA_STARTS) else text


def write_markdown(data: ComparisonData) -> str:
    """Return a Markdown table with the fairness check above it and the notes below."""
    lines = []
    for line in describe_fairness(data):
        lines.append(_escape_markdown(line))
        if not line.startswith("- "):
            lines.append("")
    columns = make_columns(data)
    lines += ["", _join_markdown(["row", *(column.heading for column in columns)])]
    lines.append(f"|---|{'---:|' * len(columns)}")
    for row in data["rows"]:
        label = row["label"] + MARKS.get(row["rank"], "")
        lines.append(_join_markdown([label, *(column.cell(row) for column in columns)]))
    lines.append("")
    for line in (*_list_legend(data), *describe_errors(data), *data["notes"]):
        lines.append(f"- {_escape_markdown(line)}")
    return "\n".join(lines) + "\n"


def _join_markdown(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(_escape_markdown, cells))} |"


def _escape_markdown(text: str) -> str:
    """Return text that Markdown shows literally."""
    text = make_printable(text)
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def write_latex(data: ComparisonData) -> str:
    """Return a ``tabular`` for booktabs: the best rows in bold, fairness check and notes as comments."""
    columns = make_columns(data)
    lines = [f"% {make_printable(line)}" for line in (*describe_fairness(data), *data["notes"])]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(columns)}}}", "\\toprule"]
    headings = " & ".join(escape_latex(column.heading) for column in columns)
    lines += [rf"& {headings} \\", "\\midrule"]
    for row in data["rows"]:
        cells = [escape_latex(row["label"])]
        for column in columns:
            cells.append(escape_latex(column.cell(row)))
        if row["rank"] in MARKS:
            cells[1] = f"\\textbf{{{cells[1]}}}"
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """Return text that LaTeX shows literally."""
    return "".join(LATEX.get(mark, mark) for mark in make_printable(text))
