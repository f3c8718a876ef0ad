"""A comparison as a table: for the terminal, as CSV, Markdown and LaTeX. What it takes is ``Comparison.as_dict()``."""

from __future__ import annotations

import csv as csv_module
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import visible
from .metric import show_bytes
from .runs import LOST
from .score import Score

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Data = Mapping[str, Any]
MARKS = {"best": " *", "tie": " ="}
LEGEND = {"best": "* the best", "tie": "= shares the top: no difference was shown"}
WIDE = 150  # columns of a terminal that hold everything in one table
LONGEST = 24  # columns up to which a word in the name of a row is kept whole
CSV_KEYS = (
    "rank", "mean", "low", "high", "sd", "base", "single_seed", "finished", *LOST, "missing", "trained", "stored_bytes",
    "step_seconds", "train_seconds", "peak_memory_bytes", "trials",
)  # fmt: skip
VERSUS_KEYS = ("against", "difference", "low", "high", "p", "p_holm", "test", "verdict")
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {"\n": " ", "[": "{[}"}


class Column(NamedTuple):
    """A heading, what stands in a row, and whether it tells of the result (or of its cost)."""

    name: str
    cell: Callable[[Data], str]
    result: bool = True


def columns(data: Data) -> list[Column]:
    """What a table for people shows; columns that would be empty throughout are left out."""
    score, rows = Score(data["metric"]["name"]), data["rows"]
    unit = " %" if score.percent else ""
    found = [
        Column(f"{score.words}{unit}", lambda row: score.show(row["mean"])),
        Column("95 % interval", lambda row: _interval(score, row)),
    ]
    if any(row["versus"] for row in rows):
        found.append(Column("difference", lambda row: _versus(score, row["versus"])))
        found.append(Column("p", lambda row: _p(row["versus"])))
    if any(row["retention"] for row in rows):
        key = {"classification": "accuracy"}.get(data["task"], "bits_per_byte")
        kept = Score(f"retention.{key}")
        found.append(
            Column(
                f"{kept.words}{' %' * kept.percent}",
                lambda row: kept.show(row["retention"] and row["retention"]["mean"]),
            )
        )
    found.append(Column("seeds", _seeds, result=False))
    if any(row["base"] is not None for row in rows):
        found.append(Column("untrained", lambda row: score.show(row["base"]), result=False))
    if any(row["trials"] is not None for row in rows):
        found.append(
            Column(
                "tuning trials",
                lambda row: "none" if row["trials"] is None else str(row["trials"]),
                result=False,
            )
        )
    return [
        *found,
        Column("trained", lambda row: "-" if row["trained"] is None else f"{row['trained']:,}", result=False),
        Column(
            "stored",
            lambda row: "-" if row["stored_bytes"] is None else show_bytes(row["stored_bytes"]),
            result=False,
        ),
        Column(
            "s/step",
            lambda row: "-" if row["step_seconds"] is None else f"{row['step_seconds']:.3g}",
            result=False,
        ),
        Column(
            "peak memory",
            lambda row: "-" if row["peak_memory_bytes"] is None else show_bytes(row["peak_memory_bytes"]),
            result=False,
        ),
    ]


def _interval(score: Score, row: Data) -> str:
    if row["low"] is None:
        return "one seed" if row["single_seed"] else "-"
    return f"[{score.show(row['low'])}, {score.show(row['high'])}]"


def _signed(score: Score, value: float) -> str:
    return ("-" if value < 0 else "+") + score.show(abs(value))


def _versus(score: Score, versus: Data | None) -> str:
    if not versus or versus["difference"] is None:
        return "-"
    return f"{_signed(score, versus['difference'])} {versus['verdict']}"


def _p(versus: Data | None) -> str:
    p: float | None = versus["p_holm"] if versus else None
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _seeds(row: Data) -> str:
    counts = [f"{row[key]} {key}" for key in (*LOST, "missing") if row[key]]
    return f"{row['finished']}" + (f" ({', '.join(counts)})" if counts else "")


def terminal(data: Data, width: int) -> list[RenderableType]:
    """The fairness check, the table (in two halves where it would not fit), errors and notes."""
    from rich.text import Text

    lines: list[RenderableType] = [Text(visible(line)) for line in fairness(data)]
    shown = columns(data)
    halves = (
        [_table(data, shown, width)]
        if width >= WIDE
        else [
            _table(data, [c for c in shown if c.result], width),
            _table(data, [c for c in shown if not c.result], width),
        ]
    )
    ranks = {row["rank"] for row in data["rows"]}
    legend = [words for rank, words in LEGEND.items() if rank in ranks]
    after = [*(["; ".join(legend) + "."] if legend else []), *errors(data), *data["notes"]]
    blank = Text()
    return [
        *lines,
        *(part for half in halves for part in (blank, half)),
        blank,
        *(Text(visible(line)) for line in after),
    ]


def _table(data: Data, shown: Sequence[Column], width: int) -> Table:
    """Only headings and the rows' names are folded, as long as that leaves them room."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    marked = [visible(row["label"]) + MARKS.get(row["rank"], "") for row in data["rows"]]
    cells = [[column.cell(row) for row in data["rows"]] for column in shown]
    room = width - 2 * len(shown)
    whole = [max(map(len, (column.name, *told))) for column, told in zip(shown, cells, strict=True)]
    folded = [max(map(len, (*column.name.split(), *told))) for column, told in zip(shown, cells, strict=True)]
    widths: Sequence[int | None] = whole if room - sum(whole) >= max(map(len, marked)) else folded
    left = room - sum(width or 0 for width in widths)
    if left < min(LONGEST, max(len(word) for name in marked for word in name.split())):
        widths, left = [None] * len(shown), 0
    table.add_column("row", overflow="fold", max_width=left or None)
    for column, fixed in zip(shown, widths, strict=True):
        table.add_column(column.name, justify="right", overflow="fold", width=fixed)
    for name, *told in zip(marked, *cells, strict=True):
        table.add_row(Text(name), *map(Text, told))
    return table


def fairness(data: Data) -> list[str]:
    """The fairness check in words."""
    if len(data["rows"]) < 2:
        return [f"- {finding['words']}" for finding in data["fairness"]]
    if not data["fairness"]:
        return ["Fairness check: the rows differ in nothing but what is compared."]
    return [
        "Fairness check: the rows differ in more than what is compared.",
        *(f"- {finding['words']}" for finding in data["fairness"]),
    ]


def errors(data: Data) -> list[str]:
    """Why runs failed, a line for each reason of a row."""
    lines = []
    for row in data["rows"]:
        reasons: dict[str, int] = {}
        for error in row["errors"]:
            reason = error.partition(": ")[2]
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"{row['label']}: {count} failed: {reason}" for reason, count in reasons.items()]
    return lines


def csv(data: Data) -> str:
    """Plain numbers, a line a row, with a column for each compared field."""
    out = io.StringIO()
    writer = csv_module.writer(out, lineterminator="\n")
    versus = [f"versus_{key}" for key in VERSUS_KEYS]
    writer.writerow(
        ["row", *data["by"], "metric", *CSV_KEYS, "retention", "seeds", "values", *versus, "command"]
    )
    for row in data["rows"]:
        kept, test = row["retention"] or {}, row["versus"] or {}
        lists = [" ".join(str(value) for value in row[key]) for key in ("seeds", "values")]
        plain = [row["by"][key] for key in data["by"]]
        cells = [
            *(row[key] for key in CSV_KEYS),
            kept.get("mean"),
            *lists,
            *(test.get(key) for key in VERSUS_KEYS),
            row["command"],
        ]
        writer.writerow([_cell(cell) for cell in (row["label"], *plain, data["metric"]["name"], *cells)])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would calculate is led by an apostrophe; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return (
        f"'{visible(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else visible(value)
    )


def markdown(data: Data) -> str:
    """A table with the fairness check above it and the notes below."""
    shown = columns(data)
    lines = [*(line if line.startswith("- ") else f"{line}\n" for line in map(_marked, fairness(data))), ""]
    lines += [
        f"| row | {' | '.join(_marked(column.name) for column in shown)} |",
        f"|---|{'---:|' * len(shown)}",
    ]
    for row in data["rows"]:
        cells = [
            _marked(row["label"] + MARKS.get(row["rank"], "")),
            *(_marked(column.cell(row)) for column in shown),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ranks = {row["rank"] for row in data["rows"]}
    after = [words for rank, words in LEGEND.items() if rank in ranks] + errors(data) + list(data["notes"])
    return "\n".join([*lines, "", *(f"- {_marked(line)}" for line in after)]) + "\n"


def _marked(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = visible(text)
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def latex(data: Data) -> str:
    """A ``tabular`` for booktabs; the best in bold, the fairness check and notes as comments."""
    shown = columns(data)
    lines = [f"% {visible(line)}" for line in (*fairness(data), *data["notes"])]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(shown)}}}", "\\toprule"]
    lines += [" & ".join(["", *(tex(column.name) for column in shown)]).strip() + r" \\", "\\midrule"]
    for row in data["rows"]:
        cells = [tex(row["label"]), *(tex(column.cell(row)) for column in shown)]
        cells[1] = f"\\textbf{{{cells[1]}}}" if row["rank"] in MARKS else cells[1]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(LATEX.get(mark, mark) for mark in visible(text))
