"""A comparison as one HTML file that needs no network: table, figures, fairness check and commands."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from .. import __version__
from ..errors import ConfigError
from . import views
from .cells import DASH, show, show_p, show_setting, table
from .figures import Figure, figures
from .markup import escape
from .runs import LOST
from .views import Data

SHAPES = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<path d="M3 3h10v10H3z"/>',
    "diamond": '<path d="M8 1.5 14.5 8 8 14.5 1.5 8z"/>',
    "triangle-up": '<path d="M8 2 14.5 13h-13z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>',
    "triangle-down": '<path d="M8 14 1.5 3h13z"/>',
    "x": '<path d="m4.5 2 3.5 3.5L11.500 2 14 4.500 10.500 8 14 11.500 11.500 14 8 10.500 4.500 14 2 11.500 5.500 8 2 4.500z"/>',
    "pentagon": '<path d="m8 2 6 4.500-2.300 7H4.300L2 6.500z"/>',
    "star": '<path d="m8 1 2 5h5l-4 3.200L12.500 15 8 11.500 3.500 15 5 9.200 1 6h5z"/>',
}
KINDS = {"trained": "budget", "trials": "tuning"}  # findings that people call otherwise
OMNIBUS = {"cochran q": "Cochran's Q", "friedman": "Friedman's test"}
TASKS = {"causal_lm": "language modelling"}


def write(comparison: Data, file: Path) -> None:
    """Write the report on ``Comparison.as_dict()`` to ``file``, whole or not at all. Raises ``ConfigError`` if that cannot be written."""
    text = document(comparison)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The report {file} cannot be written: {error.strerror}. Name a file in a folder that you may write to."
        ) from error


def document(comparison: Data) -> str:
    """The report's HTML, scripts and styles included."""
    drawn = figures(comparison)
    plotly, own = _plotly(), _asset("report.js")
    sources = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in (plotly, own)
    )
    title = views.metric_words(comparison["metric"]) + (
        f": {TASKS.get(comparison['task'], str(comparison['task']))}" if comparison["task"] else ""
    )
    return Template(_asset("report.html")).substitute(
        scripts=sources, style=_asset("report.css"), title=escape(title), counts=_counts(comparison), verdict=_verdict(comparison),
        fairness=_fairness(comparison["fairness"]), selects=_selects(comparison), rows=len(comparison["rows"]), table=table(comparison),
        chips=_chips(comparison), figures="".join(_figure(figure) for figure in drawn), tests=_tests(comparison), notes=_notes(comparison["notes"]),
        version=escape(__version__), data=_data(drawn), plotly=plotly, own=own,
    )  # fmt: skip


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's script as its package ships it, read without importing it."""
    try:
        return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(
            "An HTML report needs the package plotly, which is not installed: pip install plotly"
        ) from error


def _data(drawn: Sequence[Figure]) -> str:
    """The figures as JSON that no browser mistakes for the end of its script."""
    text = json.dumps([{"key": figure.key, **figure.as_plotly()} for figure in drawn], allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _counts(comparison: Data) -> str:
    rows = comparison["rows"]
    finished, lost = sum(row["finished"] for row in rows), sum(row[key] for row in rows for key in LOST)
    by = f" by {' and '.join(comparison['by'])}" if comparison["by"] else ""
    held = f", held against {comparison['baseline']}" if comparison["baseline"] else ""
    return escape(
        f"{_many(len(rows), 'row')}{by}, {_many(finished, 'finished run')}"
        + (f", {lost} that did not finish" if lost else "")
        + held
    )


def _verdict(comparison: Data) -> str:
    """The first thing to know, in one or two sentences."""
    rows, metric = comparison["rows"], comparison["metric"]
    best = next((row for row in rows if row["mean"] is not None), None)
    if best is None:
        return "No run has finished with this metric, so there is nothing to compare yet."
    unit = " %" if metric["percent"] else ""
    known = best["low"] is not None and best["high"] is not None
    interval = (
        f"95 % interval {show(metric, best['low'])} to {show(metric, best['high'])}"
        if known
        else "one seed, so no interval"
    )
    said = f"Best mean: <b>{escape(best['label'])}</b> with {show(metric, best['mean'])}{unit} ({interval})."
    ties = [row["label"] for row in rows if row["rank"] == "tie" and row is not best]
    if ties:
        names = ", ".join(f"<b>{escape(name)}</b>" for name in ties[:5]) + (
            f" and {len(ties) - 5} more" if len(ties) > 5 else ""
        )
        said += f" These runs do not tell it apart from {names}."
    if best["rank"] == "best" and len(rows) > 1:
        said += " It is better than every other row that was tested."
    return said


def _fairness(findings: Sequence[Data]) -> str:
    if not findings:
        return '<p class="fair">Nothing was found that differs between the rows beside what is compared.</p>'
    items = "".join(_finding(finding) for finding in findings)
    return f'<p class="unfair">{_many(len(findings), "thing")} beside what is compared may decide who wins:</p><ul class="findings">{items}</ul>'


def _finding(finding: Data) -> str:
    values = "".join(
        f'<tr><th scope="row">{escape(str(row))}</th><td>{escape(str(value))}</td></tr>'
        for row, value in finding["values"].items()
    )
    shown = (
        f"<details><summary>{escape(str(finding['what']))}, row by row</summary><table>{values}</table></details>"
        if values
        else ""
    )
    return f'<li><span class="kind">{escape(KINDS.get(finding["kind"], str(finding["kind"])))}</span> {escape(finding["words"])}{shown}</li>'


def _selects(comparison: Data) -> str:
    """A choice for each compared setting that has more than one value."""
    made = []
    for number, key in enumerate(comparison["by"]):
        values = list(dict.fromkeys(row["by"].get(key) for row in comparison["rows"]))
        values.sort(
            key=lambda value: (
                value is None,
                isinstance(value, str),
                value if isinstance(value, int | float) else 0,
                str(value),
            )
        )
        options = "".join(f"<option>{escape(show_setting(value))}</option>" for value in values)
        if len(values) > 1:
            made.append(
                f'<label>{escape(key)} <select data-by="{number}"><option value="*">all</option>{options}</select></label>'
            )
    return "".join(made)


def _chips(comparison: Data) -> str:
    """The legend of all figures: each button hides and shows a series everywhere."""
    made = []
    for name, look in views.styles(comparison).items():
        picture = (
            f'<svg viewBox="0 0 16 16" fill="{look.colour}" aria-hidden="true">{SHAPES[look.symbol]}</svg>'
        )
        made.append(
            f'<button type="button" class="chip" aria-pressed="true" data-series="{escape(name)}">{picture}{escape(name)}</button>'
        )
    return "".join(made) if len(made) > 1 else ""


def _figure(figure: Figure) -> str:
    wide = (
        " wide"
        if figure.key in ("curves", "differences", "critical_difference") or figure.key.startswith("by_")
        else ""
    )
    title, height = escape(figure.title), figure.layout["height"]
    plot = f'<div class="plot" id="plot-{escape(figure.key)}" role="img" aria-label="{title}" style="min-height:{height}px"></div>'
    return f'<figure class="card{wide}"><h3>{title}</h3>{plot}<figcaption>{escape(figure.caption)}</figcaption></figure>'


def _tests(comparison: Data) -> str:
    """All pairs, folded; and the test of all rows together."""
    made, metric, omnibus = [], comparison["metric"], comparison["omnibus"]
    if omnibus and omnibus.get("p") is not None:
        says = "at least two rows differ" if omnibus["p"] < 0.05 else "no difference was found among them"
        name = OMNIBUS.get(omnibus["test"], str(omnibus["test"]))
        chance = omnibus["p"]
        made.append(f"<p>{escape(f'All rows together, {name}: p {show_p(chance)}; {says}.')}</p>")
    if comparison["tests"]:
        heads = "".join(
            f'<th scope="col">{head}</th>'
            for head in ("row", "against", "difference", "95 % interval", "p", "p, Holm", "verdict", "test")
        )
        lines = "".join(_pair(metric, test) for test in comparison["tests"])
        inner = (
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        )
        made.append(
            f"<details><summary>{_many(len(comparison['tests']), 'pair')} of rows, tested</summary>{inner}</details>"
        )
    return (
        f'<section aria-labelledby="h-tests"><h2 id="h-tests">Tests</h2>{"".join(made)}</section>'
        if made
        else ""
    )


def _pair(metric: Data, test: Data) -> str:
    interval = (
        DASH
        if test["low"] is None
        else f"{show(metric, test['low'], sign=True)} to {show(metric, test['high'], sign=True)}"
    )
    chances = [DASH if test[key] is None else f"{test[key]:.2g}" for key in ("p", "p_holm")]
    cells = [
        test["a"],
        test["b"],
        show(metric, test["difference"], sign=True),
        interval,
        *chances,
        test["verdict"],
        test["test"],
    ]
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<section aria-labelledby="h-notes"><h2 id="h-notes">Notes</h2><ul>{items}</ul></section>'
        if items
        else ""
    )
