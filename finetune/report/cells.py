"""The table of the HTML report: its columns, and each row with what lies behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import views
from .markup import escape
from .metric import show_bytes
from .runs import LOST
from .score import Score
from .views import Data, Style

DASH, MINUS = "\u2013", "\u2212"
NONE = f'<span class="none">{DASH}</span>'
RANKS = {
    "best": ("best", "better than every other row"),
    "tie": ("top", "no difference to the best mean was shown"),
}


@dataclass(frozen=True)
class Column:
    """A column: its head, what the head means, and of a row the value that sorts it and the HTML that shows it."""

    head: str
    words: str
    value: Callable[[Data], Any]
    cell: Callable[[Data], str]
    numeric: bool = True


def show(metric: Data, value: float | None, sign: bool = False) -> str:
    """A metric's value as text, shares in % without their sign; differences with ``sign``."""
    score = Score(str(metric["name"]))
    if value is None:
        return DASH
    return ("+" if value >= 0 else MINUS) + score.show(abs(value)) if sign else score.show(value)


def show_seconds(value: float) -> str:
    """``0.0213`` as ``21.3 ms``"""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def show_setting(value: object) -> str:
    """The value of a compared setting; a dash for a method that has no such setting."""
    return DASH if value is None else value if isinstance(value, str) else json.dumps(value)


def show_p(p: float | None) -> str:
    """``= 0.021``, ``< 0.001``"""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _cost(key: str, head: str, words: str, text: Callable[[Any], str]) -> Column:
    return Column(
        head,
        words,
        lambda row: row.get(key),
        lambda row: NONE if row.get(key) is None else escape(text(row[key])),
    )


def columns(comparison: Data) -> list[Column]:
    """All columns but the row's name, which stands in front of them."""
    metric = comparison["metric"]
    settings = [
        key
        for key in comparison["by"]
        if any(not row["label"].startswith(show_setting(row["by"].get(key))) for row in comparison["rows"])
    ]
    made = [
        Column(key, f"the setting {key}", _setting_of(key), _setting_cell(key), False) for key in settings
    ]
    unit = ", %" if metric["percent"] else ""
    interval = "mean over seeds, with its 95 % interval (t) over seeds; the bars of all rows share one scale"
    made.append(
        Column(
            f"{views.metric_words(metric)}{unit}",
            interval,
            lambda row: row["mean"],
            _interval_cell(comparison),
        )
    )
    made.append(
        Column(
            "seeds",
            "finished runs of those that were started, and what became of the others",
            _lost,
            _seeds_cell,
        )
    )
    if any(row["versus"] for row in comparison["rows"]):
        against = ", ".join(
            dict.fromkeys(row["versus"]["against"] for row in comparison["rows"] if row["versus"])
        )
        head, words = (
            f"to {against}",
            f"difference to {against} with its 95 % interval, and p after Holm's correction; a tie is not told apart from it",
        )
        made.append(
            Column(
                head,
                words,
                lambda row: (row["versus"] or {}).get("difference"),
                lambda row: _versus_cell(metric, row),
            )
        )
    if any(row["retention"] for row in comparison["rows"]):
        words = "the metric on data that the model should not forget"
        kept = {
            "name": "retention.accuracy"
            if comparison["task"] == "classification"
            else "retention.bits_per_byte"
        }
        head = f"retention{', %' if comparison['task'] == 'classification' else ', bits per byte'}"
        made.append(
            Column(
                head,
                words,
                lambda row: (row["retention"] or {}).get("mean"),
                lambda row: _retention_cell(kept, row),
            )
        )
    made += [
        _cost("trained", "trained", "parameters that the optimizer updates", lambda value: f"{value:,}"),
        _cost("stored_bytes", "stored", "size of the files of the trained change", show_bytes),
        _cost("step_seconds", "time per step", "median over steps and seeds", show_seconds),
        _cost("peak_memory_bytes", "peak memory", "the most that any seed had in use at once", show_bytes),
    ]
    if any(row["trials"] is not None for row in comparison["rows"]):
        made.append(
            _cost(
                "trials",
                "tuning trials",
                "how many values of the tuned setting were tried on validation",
                str,
            )
        )
    return made


def _setting_of(key: str) -> Callable[[Data], Any]:
    return lambda row: row["by"].get(key)


def _setting_cell(key: str) -> Callable[[Data], str]:
    return lambda row: NONE if row["by"].get(key) is None else escape(show_setting(row["by"][key]))


def _interval_cell(comparison: Data) -> Callable[[Data], str]:
    """Mean and interval in numbers, and as a bar on a scale that all rows share."""
    metric, looks = comparison["metric"], views.styles(comparison)
    ends = [
        value
        for row in comparison["rows"]
        for value in (row["mean"], row["low"], row["high"])
        if value is not None
    ]
    low, span = min(ends, default=0.0), (max(ends, default=1.0) - min(ends, default=0.0)) or 1.0

    def cell(row: Data) -> str:
        if row["mean"] is None:
            return NONE
        colour = looks[views.series(row, comparison["by"])].colour
        x = {key: 5 + 90 * (row[key] - low) / span for key in ("mean", "low", "high") if row[key] is not None}
        bar = (
            f'<line x1="{x["low"]:.1f}" x2="{x["high"]:.1f}" y1="6" y2="6"/>'
            if "low" in x and "high" in x
            else ""
        )
        fill = colour if bar else "none"
        dot = f'<circle cx="{x["mean"]:.1f}" cy="6" r="3.2" fill="{fill}"/>'
        words = f"{show(metric, row['low'])} to {show(metric, row['high'])}" if bar else "one seed"
        picture = (
            f'<svg class="range" viewBox="0 0 100 12" aria-hidden="true" stroke="{colour}">{bar}{dot}</svg>'
        )
        return f'<b>{show(metric, row["mean"])}</b>{picture}<span class="interval">{words}</span>'

    return cell


def _versus_cell(metric: Data, row: Data) -> str:
    versus = row["versus"]
    if not versus or versus["difference"] is None:
        return NONE
    ends = (
        ""
        if versus["low"] is None
        else f"{show(metric, versus['low'], sign=True)} to {show(metric, versus['high'], sign=True)}"
    )
    chance = "" if versus["p_holm"] is None else f'<span class="p">p {show_p(versus["p_holm"])}</span>'
    verdict = f'<span class="badge {escape(versus["verdict"])}" title="{escape(versus["test"])}">{escape(versus["verdict"])}</span>'
    return f'{verdict}<b>{show(metric, versus["difference"], sign=True)}</b><span class="interval">{ends} {chance}</span>'


def _retention_cell(metric: Data, row: Data) -> str:
    found = row["retention"]
    if not found or found["mean"] is None:
        return NONE
    before = (
        ""
        if found.get("base") is None
        else f'<span class="interval">{show(metric, found["base"])} before</span>'
    )
    return f"{show(metric, found['mean'])}{before}"


def _lost(row: Data) -> int:
    return int(sum(row[key] for key in LOST))


def _seeds_cell(row: Data) -> str:
    lost = [f"{row[key]} {key}" for key in LOST if row[key]]
    lost += [f"{row['missing']} without the metric"] if row["missing"] else []
    badges = "".join(f'<span class="badge worse">{words}</span>' for words in lost)
    single = '<span class="badge">single seed</span>' if row["single_seed"] else ""
    return f"{row['finished']} of {row['finished'] + _lost(row)}<span class=interval>{badges}{single}</span>"


def table(comparison: Data) -> str:
    """The whole table; each row is a body of its own, so that what lies behind it moves with it."""
    shown, looks = columns(comparison), views.styles(comparison)
    order = "descending" if comparison["metric"]["higher_is_better"] else "ascending"
    heads = [
        _head(
            0,
            "row",
            "the row's name; a mark stands at the best mean and at those not told apart from it",
            "none",
            False,
        )
    ]
    main = next(i for i, column in enumerate(shown, 1) if column.numeric)
    heads += [
        _head(i, column.head, column.words, order if i == main else "none", column.numeric)
        for i, column in enumerate(shown, 1)
    ]
    bodies = [_body(number, row, comparison, shown, looks) for number, row in enumerate(comparison["rows"])]
    return f'<table id="rows"><thead><tr>{"".join(heads)}</tr></thead>{"".join(bodies)}</table>'


def _head(number: int, head: str, words: str, order: str, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    button = f'<button type="button" data-column="{number}">{escape(head)}<span class="arrow" aria-hidden="true"></span></button>'
    return f'<th scope="col"{kind} aria-sort="{order}" title="{escape(words)}">{button}</th>'


def _body(
    number: int, row: Data, comparison: Data, shown: Sequence[Column], looks: Mapping[str, Style]
) -> str:
    colour = looks[views.series(row, comparison["by"])].colour
    by = {key: show_setting(row["by"].get(key)) for key in comparison["by"]}
    words = escape(" ".join([row["label"], *by.values(), *row["errors"]]).lower())
    data = "".join(f' data-by-{i}="{escape(value)}"' for i, value in enumerate(by.values()))
    badge, title = RANKS.get(row["rank"], ("", ""))
    mark = f' <span class="badge best" title="{title}">{badge}</span>' if badge else ""
    says = f'aria-label="copy the command of {escape(row["label"])}"'
    copy = f'<button type="button" class="copy" data-copy="{escape(row["command"])}" {says}>copy command</button>'
    more = f'<button type="button" class="toggle" aria-expanded="false" aria-controls="more-{number}">details</button>'
    name = f'<i class="dot" style="background:{colour}"></i><span class="name">{escape(row["label"])}</span>{mark}'
    head = f'<th scope="row" data-value="{escape(row["label"])}">{name}<span class="does">{more}{copy}</span></th>'
    cells = "".join(_cell(column, row) for column in shown)
    behind = f'<tr class="more" id="more-{number}"><td colspan="{len(shown) + 1}">{_details(row, comparison["metric"])}</td></tr>'
    return f'<tbody data-words="{words}"{data}><tr>{head}{cells}</tr>{behind}</tbody>'


def _cell(column: Column, row: Data) -> str:
    value = column.value(row)
    known = (
        "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else escape(str(value))
    )
    return f'<td{" class=number" if column.numeric else ""} data-value="{known}">{column.cell(row)}</td>'


def _details(row: Data, metric: Data) -> str:
    """The exact command, the value of every seed, what failed, and where the runs lie."""
    parts = [f"<dt class=command>command</dt><dd class=command><code>{escape(row['command'])}</code></dd>"]
    if row["values"]:
        parts.append(
            f"<dt>every seed</dt><dd>{', '.join(show(metric, value) for value in row['values'])}</dd>"
        )
    if row.get("examples"):
        low, high = (show(metric, row["examples"][key]) for key in ("low", "high"))
        parts.append(
            f"<dt>this one model</dt><dd>{low} to {high}, 95 % interval over {row['examples']['count']:,} test examples, not over seeds</dd>"
        )
    if row["base"] is not None:
        parts.append(f"<dt>before training</dt><dd>{show(metric, row['base'])}</dd>")
    if row["train_seconds"] is not None:
        parts.append(f"<dt>training</dt><dd>{show_seconds(row['train_seconds'])} in all</dd>")
    if row["errors"]:
        parts.append("<dt>failed with</dt>" + "".join(f"<dd>{escape(error)}</dd>" for error in row["errors"]))
    parts.append(
        "<dt>runs</dt>" + "".join(f"<dd><code>{escape(str(run))}</code></dd>" for run in row["runs"])
    )
    return f"<dl>{''.join(parts)}</dl>"
