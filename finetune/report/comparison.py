"""Compare runs: group them into rows, test which rows differ, and check that the comparison is fair.

``Comparison.as_dict()`` holds everything that the tables, the HTML report, the plots and W&B are made from.
docs/comparing.md says what each number means and which claim each test supports.
"""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, suggest_nearest
from .analyses import collect_analyses, describe_analyses
from .command import Defaults
from .fairness import check_fairness, list_values, make_finding
from .judge import Judge
from .measure import Measure
from .notes import write_notes
from .readable import show_count
from .row_data import describe_row, find_main_key
from .rows import Row, choose_keys, group_runs, short_name, show_value
from .runs import Run, find_runs, read_runs
from .schema import Finding
from .verdicts import Verdicts, judge_rows

FORMAT = 1
TASKS = {"accuracy": "classification", "bits_per_byte": "causal_lm"}  # by the key of the main metric


@dataclass
class Comparison:
    """Rows, best first, with their verdicts.

    ``keys`` are the compared settings; ``findings`` are those of the fairness check. ``analyses``: what
    ``finetune analyze`` found, by analysis and row.
    """

    measure: Measure
    task: str | None
    keys: list[str]
    rows: list[Row]
    judge: Judge
    verdicts: Verdicts
    findings: list[Finding]
    notes: list[str]
    analyses: list[dict[str, Any]]

    def as_dict(self, curves: bool = True, defaults: Defaults | None = None) -> dict[str, Any]:
        """Return strict JSON.

        ``curves`` includes validation over steps, for which every ``metrics.jsonl`` must be read;
        ``defaults`` is passed to ``make_command``.
        """
        rows = []
        for row in self.rows:
            rows.append(describe_row(row, self.judge, self.verdicts, curves, defaults))
        return {
            "format": FORMAT,
            "metric": {
                "name": self.measure.name,
                "words": self.measure.words,
                "higher_is_better": self.measure.higher_is_better,
                "percent": self.measure.percent,
            },
            "task": self.task,
            "by": list(map(short_name, self.keys)),
            "baseline": self.verdicts.baseline,
            "rows": rows,
            "tests": self.verdicts.tests,
            "omnibus": self.verdicts.omnibus,
            "critical_difference": self.verdicts.critical_difference,
            "fairness": self.findings,
            "notes": self.notes,
            "analyses": self.analyses,
        }


def compare(
    folders: Sequence[Path], by: Sequence[str] = (), metric: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare the runs in ``folders``.

    ``by`` names the settings that make rows, ``metric`` a number of ``result.json``, ``baseline`` a row.
    Raises ``ConfigError`` if there are no runs or several tasks, or for an unknown setting, metric or
    baseline.
    """
    runs = read_runs(find_runs(folders))
    _check_one_task(runs)
    measure = _choose_measure(runs, metric)
    keys = choose_keys(runs, by)
    judge = Judge(measure)
    rows = group_runs(runs, keys)
    ranked = _sort_rows(rows, judge)
    verdicts = judge_rows(judge, rows[:ranked], _find_baseline(rows, baseline))
    findings = check_fairness(rows, keys)
    relabelled = judge.count_relabelled(rows[:ranked])
    if relabelled:
        changed = {label: f"{count:,} other labels" for label, count in relabelled.items()}
        words = (
            "Test examples with the same id have different labels, so the data differ: "
            f"{list_values(changed)}."
        )
        findings.append(make_finding("setting", "test labels", changed, words))
    analyses = collect_analyses(rows)
    notes = [*write_notes(runs, rows, judge, verdicts), *describe_analyses(analyses)]
    return Comparison(measure, _find_task(runs), keys, rows, judge, verdicts, findings, notes, analyses)


def _sort_rows(rows: list[Row], judge: Judge) -> int:
    """Sort ``rows`` in place, best mean first and rows without a mean last; return how many have a mean."""
    sign = -1 if judge.measure.higher_is_better else 1
    means = {}
    for row in rows:
        values = judge.get_values(row)
        if values:
            means[row.label] = sign * plain_statistics.fmean(values.values())
    rows.sort(key=lambda row: (row.label not in means, means.get(row.label, 0.0), row.label))
    return len(means)


def _check_one_task(runs: Sequence[Run]) -> None:
    """Raise ``ConfigError`` if the runs have several data sets or tasks."""
    data_sets: dict[str, list[Run]] = {}
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        data_set, task = _describe_data_set(run), _find_task([run])
        if data_set is not None:
            data_sets.setdefault(data_set, []).append(run)
        if task is not None:
            tasks.setdefault(task, []).append(run)
    for what, groups in (("data sets", data_sets), ("tasks", tasks)):
        if len(groups) > 1:
            members = []
            for value, group in groups.items():
                members.append(f"{value}: {show_count(len(group), 'run')}, such as {group[0].path}")
            raise ConfigError(
                f"These runs have {len(groups)} {what}, which one table cannot compare "
                f"({'; '.join(members)}). Give the folders of one at a time."
            )


def _describe_data_set(run: Run) -> str | None:
    """Return the name, path and configuration of the data set, as far as the run has them."""
    if not run.settings_complete:
        return None
    values = [run.settings.get(f"dataset.{key}") for key in ("name", "path", "config")]
    return " ".join(show_value(value) for value in values if value is not None)


def _find_task(runs: Sequence[Run]) -> str | None:
    return TASKS.get(find_main_key(runs) or "")


def _choose_measure(runs: Sequence[Run], wanted: str | None) -> Measure:
    """Return the wanted measure, or the main metric of the task. Raises ``ConfigError`` if no run has it."""
    if wanted is None:
        return Measure(f"test.{find_main_key(runs) or 'accuracy'}")
    done = [run for run in runs if run.status == "finished"]
    for option in (wanted, f"test.{wanted}", f"cost.{wanted}"):
        if any(run.get_number(option) is not None for run in done):
            return Measure(option)
    if not done:
        return Measure(wanted)
    options = sorted(set(_list_numbers(done[0].result)))
    hint = suggest_nearest(wanted, options)
    raise ConfigError(f"--metric {wanted}: no run has it.{hint} The first run has: {', '.join(options)}.")


def _list_numbers(tree: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all numbers in a result."""
    if isinstance(tree, dict):
        found = []
        for key, value in tree.items():
            found += _list_numbers(value, f"{prefix}.{key}")
        return found
    name = prefix.removeprefix(".")
    if isinstance(tree, int | float) and name not in ("format", "seed"):
        return [name.removeprefix("metrics.")]
    return []


def _find_baseline(rows: Sequence[Row], wanted: str | None) -> Row | None:
    """Return the row that ``wanted`` names by its label or by values of its settings.

    Raises ``ConfigError`` unless that is exactly one row.
    """
    if wanted is None:
        return None
    words = set(wanted.replace(",", " ").split())
    found = [row for row in rows if row.label == wanted or set(row.label.split()) == words]
    if not found and words:
        found = [row for row in rows if words <= _get_words(row)]
    if len(found) == 1:
        return found[0]
    if found:
        fault = f"could be {', '.join(row.label for row in found)}"
    else:
        labels = [row.label for row in rows]
        fault = f"is not a row.{suggest_nearest(wanted, labels)} Rows: {', '.join(labels)}"
    raise ConfigError(f"--baseline {wanted} {fault}. Give one row as the table names it.")


def _get_words(row: Row) -> set[str]:
    """Return the words that may name a row: those of its label, its values, and ``setting=value``."""
    words = set(row.label.split())
    for key, value in row.by.items():
        words |= {show_value(value), f"{key}={show_value(value)}"}
    return words
