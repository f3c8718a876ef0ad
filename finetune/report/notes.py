"""Write what a reader of a comparison must know, in whole sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..config import plugin_records
from .judge import Judge
from .readable import show_count, show_some
from .rows import Row, short_name
from .runs import Run
from .suspects import describe_suspects
from .verdicts import Verdicts

CLAIMS = {
    "seeds and examples": (
        "treats both seeds and test examples as drawn at random, so its result holds for the methods"
    ),
    "paired t over seeds": "treats seeds as drawn at random, and its result holds for this test set only",
    "welch t over seeds": (
        "treats seeds as drawn at random and unpaired, because the rows share none, "
        "and its result holds for this test set only"
    ),
    "corrected resampled t": "treats splits as drawn at random and corrects for their overlap",
    "5x2cv F": (
        "treats five halvings of the data as drawn at random and tests on each half in turn; "
        "it gives no interval"
    ),
    "mcnemar mid-p": (
        "is about these two trained models on new examples, not about the methods, "
        "because the rows share only one seed"
    ),
    "paired bootstrap": (
        "is about these two trained models on new examples, not about the methods, "
        "because the rows share only one seed"
    ),
}
LISTED = 4  # the most rows that a note names


def write_notes(runs: Sequence[Run], rows: Sequence[Row], judge: Judge, verdicts: Verdicts) -> list[str]:
    """Return the notes, each of one or two sentences."""
    return [
        *describe_suspects(runs),
        *_describe_seeds(rows, judge),
        *_describe_tests(rows, verdicts),
        *_describe_data(rows, judge),
        *_describe_plugins(rows),
        *dict.fromkeys(note for run in runs for note in run.notes),
    ]


def _describe_seeds(rows: Sequence[Row], judge: Judge) -> Iterator[str]:
    single, two = [], []
    for row in rows:
        count = len(judge.get_values(row))
        if count == 1:
            single.append(row.label)
        elif count == 2:
            two.append(row.label)
    if single:
        which = f"{show_some(single, LISTED)}:"
        if len(single) == len(rows):
            which = "Every row has"
        yield f"{which} a single seed, so the variation between seeds is unknown."
    if two:
        yield (
            f"{show_some(two, LISTED)}: two seeds say very little about the variation between seeds; "
            "with three or more, far smaller differences can be shown."
        )


def _describe_tests(rows: Sequence[Row], verdicts: Verdicts) -> Iterator[str]:
    if not verdicts.versus:
        return
    if verdicts.baseline is not None:
        yield f"Differences are to {verdicts.baseline}."
    else:
        yield (
            f"Differences are to {rows[0].label}, the best row. "
            "It was chosen by the same number that is tested, so its lead is slightly overestimated."
        )
    names = dict.fromkeys(verdict["test"] for verdict in verdicts.versus.values())
    for name in names:
        if name in CLAIMS:
            yield f"The test '{name}' {CLAIMS[name]}."
    if "none" in names:
        untested = [label for label, verdict in verdicts.versus.items() if verdict["test"] == "none"]
        yield f"{show_some(untested, LISTED)}: not tested, because predictions or common seeds are missing."
    yield (
        f"p-values are corrected by Holm's method for the {show_count(len(verdicts.versus), 'comparison')} "
        "of this table; "
        "a tie means that no difference was shown."
    )


def _describe_data(rows: Sequence[Row], judge: Judge) -> Iterator[str]:
    if judge.partial_overlaps:
        yield (
            "Some runs did not predict the same test examples; only common ones were compared "
            f"({', '.join(sorted(judge.partial_overlaps))})."
        )
    missing = {}
    for row in rows:
        count = len(row.finished) - len(judge.get_values(row))
        if count:
            missing[row.label] = count
    if missing:
        total = sum(missing.values())
        parts = ", ".join(f"{count} of {label}" for label, count in missing.items())
        yield f"{show_count(total, 'finished run')} without {judge.measure.name}: {parts}."
    pooled = {short_name(key) for row in rows for key in row.pooled}
    if pooled:
        yield (
            f"Some rows contain runs that differ in {', '.join(sorted(pooled))}; "
            "a run is paired only with a run that has the same value. "
            "Add it to --by to give each value its own row."
        )


def _describe_plugins(rows: Sequence[Row]) -> Iterator[str]:
    """Name the plug-ins that training again needs, and those whose code changed between runs."""
    users: dict[str, list[str]] = {}  # from a plug-in, described with its digest, to the rows that use it
    versions: dict[str, list[str]] = {}  # from a name to the descriptions of the plug-ins of that name
    for row in rows:
        for record in row.plugins:
            described = plugin_records.describe(record)
            if described not in users:
                versions.setdefault(record["name"], []).append(described)
            users.setdefault(described, []).append(row.label)
    for described, labels in users.items():
        yield (
            f"{show_some(labels, LISTED)}: training again needs the plug-in {described}. "
            "Add --plugins DIR with its folder to the command, unless it is an installed package."
        )
    for name, different in versions.items():
        if len(different) > 1:
            yield f"The code of the plug-in {name} changed between these runs: {', '.join(different)}."
