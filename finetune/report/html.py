"""Write a comparison as one HTML file that needs no network: table, figures, fairness check and commands."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from ..errors import ConfigError
from ..system.version import __version__
from .axes import show_metric_name
from .figures import Figure, make_figures
from .html_table import count_without_result, write_table
from .markup import escape
from .readable import DASH, show_count, show_difference, show_metric, show_p, show_setting, show_some
from .schema import ComparisonData, Finding, MetricData, Verdict
from .styles import make_styles

SHAPES = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<path d="M3 3h10v10H3z"/>',
    "diamond": '<path d="M8 1.5 14.5 8 8 14.5 1.5 8z"/>',
    "triangle-up": '<path d="M8 2 14.5 13h-13z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>',
    "triangle-down": '<path d="M8 14 1.5 3h13z"/>',
    "x": (
        '<path d="m4.5 2 3.5 3.5L11.500 2 14 4.500 10.500 8 14 11.500 '
        '11.500 14 8 10.500 4.500 14 2 11.500 5.500 8 2 4.500z"/>'
    ),
    "pentagon": '<path d="m8 2 6 4.500-2.300 7H4.300L2 6.500z"/>',
    "star": '<path d="m8 1 2 5h5l-4 3.200L12.500 15 8 11.500 3.500 15 5 9.200 1 6h5z"/>',
}  # SVG of each symbol
KINDS = {"trained": "budget", "trials": "tuning"}  # kinds of findings that have another name on the page
OMNIBUS = {"cochran q": "Cochran's Q", "friedman": "Friedman's test"}
TASKS = {"causal_lm": "language modelling"}
WIDE_FIGURES = ("curves", "differences", "critical_difference")  # wide, as are the figures of settings
LISTED = 5  # most rows that the summary names
PAIR_HEADINGS = ("row", "against", "difference", "95 % interval", "p", "p, Holm", "verdict", "test")


def write_report(comparison: ComparisonData, file: Path) -> None:
    """Write the report to ``file``, whole or not at all. Raises ``ConfigError`` if it cannot be written."""
    text = make_document(comparison)
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
            f"The report {file} cannot be written: {error.strerror}. "
            "Name a file in a folder that you may write to."
        ) from error


def make_document(comparison: ComparisonData) -> str:
    """Return the report's HTML, which includes all scripts and styles."""
    figures = make_figures(comparison)
    plotly, own = _read_plotly(), _read_asset("report.js")
    return Template(_read_asset("report.html")).substitute(
        scripts=f"{_hash_script(plotly)} {_hash_script(own)}",
        style=_read_asset("report.css"),
        title=escape(_make_title(comparison)),
        counts=_write_counts(comparison),
        verdict=_write_summary(comparison),
        fairness=_write_fairness(comparison["fairness"]),
        selects=_write_selects(comparison),
        rows=len(comparison["rows"]),
        table=write_table(comparison),
        chips=_write_chips(comparison),
        figures="".join(map(_write_figure, figures)),
        tests=_write_tests(comparison),
        notes=_write_notes(comparison["notes"]),
        version=escape(__version__),
        data=_encode_figures(figures),
        plotly=plotly,
        own=own,
    )


def _read_asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _read_plotly() -> str:
    """Return Plotly's script from its package, without importing the package."""
    try:
        return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(
            "An HTML report needs the package plotly, which is not installed: pip install plotly"
        ) from error


def _hash_script(script: str) -> str:
    """Return the hash by which the page's security policy allows a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _encode_figures(figures: Sequence[Figure]) -> str:
    """Return the figures as JSON that cannot close the script element around it."""
    data = [{"key": figure.key, **figure.as_plotly()} for figure in figures]
    text = json.dumps(data, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _make_title(comparison: ComparisonData) -> str:
    name, task = show_metric_name(comparison["metric"]), comparison["task"]
    if not task:
        return name
    return f"{name}: {TASKS.get(task, str(task))}"


def _write_counts(comparison: ComparisonData) -> str:
    """Return how many rows and runs there are, and what the rows are compared with."""
    rows = comparison["rows"]
    text = show_count(len(rows), "row")
    if comparison["by"]:
        text += f" by {' and '.join(comparison['by'])}"
    finished = without_result = 0
    for row in rows:
        finished += row["finished"]
        without_result += count_without_result(row)
    text += f", {show_count(finished, 'finished run')}"
    if without_result:
        text += f", {without_result} that did not finish"
    if comparison["baseline"]:
        text += f", compared with {comparison['baseline']}"
    return escape(text)


def _write_summary(comparison: ComparisonData) -> str:
    """Return the most important result, in one or two sentences of HTML."""
    rows, metric = comparison["rows"], comparison["metric"]
    ranked = [row for row in rows if row["mean"] is not None]
    if not ranked:
        return "No run has finished with this metric, so there is nothing to compare yet."
    best = ranked[0]
    unit = " %" if metric["percent"] else ""
    interval = "one seed, so no interval"
    if best["low"] is not None and best["high"] is not None:
        low, high = show_metric(metric, best["low"]), show_metric(metric, best["high"])
        interval = f"95 % interval {low} to {high}"
    mean = show_metric(metric, best["mean"])
    summary = f"Best mean: <b>{escape(best['label'])}</b> with {mean}{unit} ({interval})."
    ties = [f"<b>{escape(row['label'])}</b>" for row in ranked[1:] if row["rank"] == "tie"]
    if ties:
        summary += f" These runs do not show a difference from {show_some(ties, LISTED)}."
    if best["rank"] == "best" and len(rows) > 1:
        summary += " It is better than every other row that was tested."
    return summary


def _write_fairness(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="fair">The rows differ only in what is compared.</p>'
    count = show_count(len(findings), "finding")
    heading = f"Other differences between the rows may decide which row wins ({count}):"
    items = "".join(map(_write_finding, findings))
    return f'<p class="unfair">{escape(heading)}</p><ul class="findings">{items}</ul>'


def _write_finding(finding: Finding) -> str:
    lines = ""
    for row, value in finding["values"].items():
        lines += f'<tr><th scope="row">{escape(str(row))}</th><td>{escape(str(value))}</td></tr>'
    details = ""
    if lines:
        summary = f"{escape(str(finding['what']))}, row by row"
        details = f"<details><summary>{summary}</summary><table>{lines}</table></details>"
    kind = escape(KINDS.get(finding["kind"], str(finding["kind"])))
    return f'<li><span class="kind">{kind}</span> {escape(finding["words"])}{details}</li>'


def _write_selects(comparison: ComparisonData) -> str:
    """Return a selection list for each compared setting that has more than one value."""
    selects = ""
    for number, key in enumerate(comparison["by"]):
        values = list(dict.fromkeys(row["by"].get(key) for row in comparison["rows"]))
        if len(values) < 2:
            continue
        options = '<option value="*">all</option>'
        for value in sorted(values, key=_rank_value):
            options += f"<option>{escape(show_setting(value))}</option>"
        selects += f'<label>{escape(key)} <select data-by="{number}">{options}</select></label>'
    return selects


def _rank_value(value: object) -> tuple[bool, bool, float, str]:
    """Sort numbers by size, then texts, then None."""
    if isinstance(value, int | float):
        return False, False, value, str(value)
    return value is None, isinstance(value, str), 0, str(value)


def _write_chips(comparison: ComparisonData) -> str:
    """Return the legend of all figures: a button for each series hides or shows it everywhere."""
    styles = make_styles(comparison)
    if len(styles) < 2:
        return ""
    chips = ""
    for name, style in styles.items():
        shape = SHAPES[style.symbol]
        picture = f'<svg viewBox="0 0 16 16" fill="{style.colour}" aria-hidden="true">{shape}</svg>'
        chips += (
            f'<button type="button" class="chip" aria-pressed="true" data-series="{escape(name)}">'
            f"{picture}{escape(name)}</button>"
        )
    return chips


def _write_figure(figure: Figure) -> str:
    wide = ""
    if figure.key in WIDE_FIGURES or figure.key.startswith("by_"):
        wide = " wide"
    title = escape(figure.title)
    plot = (
        f'<div class="plot" id="plot-{escape(figure.key)}" role="img" aria-label="{title}" '
        f'style="min-height:{figure.layout["height"]}px"></div>'
    )
    caption = escape(figure.caption)
    return f'<figure class="card{wide}"><h3>{title}</h3>{plot}<figcaption>{caption}</figcaption></figure>'


def _write_tests(comparison: ComparisonData) -> str:
    """Return the section with the test of all rows together and a folded list of all pairs."""
    parts = ""
    omnibus = comparison["omnibus"]
    if omnibus and omnibus.get("p") is not None:
        result = "at least two rows differ" if omnibus["p"] < 0.05 else "no difference was found among them"
        name = OMNIBUS.get(omnibus["test"], str(omnibus["test"]))
        text = f"All rows together, {name}: p {show_p(omnibus['p'])}; {result}."
        parts += f"<p>{escape(text)}</p>"
    if comparison["tests"]:
        heads = "".join(f'<th scope="col">{heading}</th>' for heading in PAIR_HEADINGS)
        lines = "".join(_write_pair(comparison["metric"], test) for test in comparison["tests"])
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
        summary = f"{show_count(len(comparison['tests']), 'pair')} of rows, tested"
        parts += f'<details><summary>{summary}</summary><div class="scroll">{table}</div></details>'
    if not parts:
        return ""
    return f'<section aria-labelledby="h-tests"><h2 id="h-tests">Tests</h2>{parts}</section>'


def _write_pair(metric: MetricData, test: Verdict) -> str:
    interval = DASH
    if test["low"] is not None:
        interval = f"{show_difference(metric, test['low'])} to {show_difference(metric, test['high'])}"
    cells = [test["a"], test["b"], show_difference(metric, test["difference"]), interval]
    for p in (test["p"], test["p_holm"]):
        cells.append(DASH if p is None else f"{p:.2g}")
    cells += [test["verdict"], test["test"]]
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _write_notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section aria-labelledby="h-notes"><h2 id="h-notes">Notes</h2><ul>{items}</ul></section>'
