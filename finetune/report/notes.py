"""What a reader of a comparison must know, in whole sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from . import suspects
from .rows import name
from .runs import Run

if TYPE_CHECKING:
    from .comparison import Comparison

CLAIMS = {
    "seeds and examples": "takes seeds and test examples both as drawn at random, so it speaks of the methods",
    "paired t over seeds": "takes seeds as drawn at random, on this test set only",
    "welch t over seeds": "takes seeds as drawn at random and unpaired, since the rows share none, on this test set only",
    "corrected resampled t": "takes splits as drawn at random and allows for their overlap",
    "5x2cv F": "takes five halvings of the data as drawn at random, each half tested by the other; it has no interval",
    "mcnemar mid-p": "speaks of these two trained models on new examples, not of the methods: only one seed is shared",
    "paired bootstrap": "speaks of these two trained models on new examples, not of the methods: only one seed is shared",
}


def of(found: Comparison, runs: Sequence[Run]) -> list[str]:
    """One sentence or two a note."""
    return [
        *suspects.of(runs),
        *_seeds(found),
        *_tests(found),
        *_data(found),
        *dict.fromkeys(note for run in runs for note in run.notes),
    ]


def _seeds(found: Comparison) -> Iterator[str]:
    values = {row.label: len(found.judge.values(row)) for row in found.rows}
    single = [label for label, count in values.items() if count == 1]
    if single:
        which = (
            "Every row has"
            if len(single) == len(values)
            else f"{_few(single)} {'has' if len(single) == 1 else 'have'}"
        )
        yield f"{which} a single seed, so nothing is known of how another would do."
    if two := [label for label, count in values.items() if count == 2]:
        yield f"{_few(two)}: two seeds say very little of how seeds vary; three or more find differences that two cannot."


def _tests(found: Comparison) -> Iterator[str]:
    if not found.versus:
        return
    if found.baseline is None:
        yield f"Differences are to {found.rows[0].label}, the best here; being chosen by this very number, it flatters itself a little."
    else:
        yield f"Differences are to {found.baseline}."
    names = dict.fromkeys(verdict["test"] for verdict in found.versus.values())
    yield from (f"The test '{test}' {CLAIMS[test]}." for test in names if test in CLAIMS)
    if "none" in names:
        without = [label for label, verdict in found.versus.items() if verdict["test"] == "none"]
        yield f"{_few(without)}: no test, for want of predictions or of seeds in common."
    number = len(found.versus)
    yield f"p-values are Holm's, over the {number} comparison{'s' * (number > 1)} of this table; a tie means that no difference was shown."


def _data(found: Comparison) -> Iterator[str]:
    if found.judge.partly:
        yield f"Runs have not predicted the same test examples; those in common were compared ({', '.join(sorted(found.judge.partly))})."
    missing = {row.label: len(row.finished) - len(found.judge.values(row)) for row in found.rows}
    if lacking := {label: count for label, count in missing.items() if count}:
        told = ", ".join(f"{count} of {label}" for label, count in lacking.items())
        yield f"{sum(lacking.values())} finished run{'s' * (sum(lacking.values()) > 1)} without {found.score.name}: {told}."
    inside = sorted({name(key) for row in found.rows for key in row.inside})
    if inside:
        yield f"Rows pool runs that differ in {', '.join(inside)}; each is paired with its like. Add it to --by to tell them apart."


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
