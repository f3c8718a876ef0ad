"""Test whether one row is better than another, by the strongest test that their common repetitions allow.

Seeds are not examples. If two rows share several seeds, the test takes both seeds and test examples as drawn
at random, so its result holds for the methods. If they share a single seed, the test is about those two
trained models only, and the verdict names such a test (``FIXED``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import statistics
from .measure import Measure
from .predictions import COLUMNS, Array, PredictedExamples, Predictions
from .rows import Block, Row
from .runs import Run
from .schema import Verdict

LEVEL = 0.05
FIXED = ("mcnemar mid-p", "paired bootstrap")  # tests about two trained models, not about two methods
UNTESTED: Verdict = {"low": None, "high": None, "p": None, "test": "none"}


@dataclass
class Judge:
    """Compares rows by ``measure``.

    ``partial_overlaps`` collects texts such as ``150 of 200``: how many test examples were compared because
    not all runs had predicted the same ones.
    """

    measure: Measure

    def __post_init__(self) -> None:
        self.predictions = Predictions(self.measure.key)
        self.by_example = self.measure.split == "test" and self.measure.key in COLUMNS
        self.partial_overlaps: set[str] = set()
        self._values: dict[str, dict[Block, float]] = {}

    def get_values(self, row: Row) -> dict[Block, float]:
        """Return the measure of each finished run that has it."""
        if row.label not in self._values:
            found = {}
            for block, run in row.blocks.items():
                value = run.get_number(self.measure.name)
                if value is not None:
                    found[block] = value
            self._values[row.label] = found
        return self._values[row.label]

    def compare_rows(self, a: Row, b: Row) -> Verdict:
        """Test the difference ``a`` minus ``b``, before any correction for several tests."""
        first, second = self.get_values(a), self.get_values(b)
        verdict: Verdict = {"against": b.label, "difference": None, **UNTESTED}
        if not first or not second:
            return verdict
        name, found = self._test(a, b)
        if found is None:
            verdict["difference"] = float(np.mean(list(first.values())) - np.mean(list(second.values())))
            return verdict
        return {**verdict, **found._asdict(), "test": name}

    def _test(self, a: Row, b: Row) -> tuple[str, statistics.Estimate | None]:
        """Choose and do the test; the estimate is None if the data allow no test."""
        first, second = self.get_values(a), self.get_values(b)
        common = [block for block in first if block in second]
        if len({_get_split(block) for block in common}) > 1:
            test_ratio = _get_test_ratio(a)
            if test_ratio is not None:
                return _test_over_splits(a, first, second, common, test_ratio)
        if len(common) > 1:
            return self._test_over_seeds(a, b, common)
        if common:
            return self._test_two_models(a.blocks[common[0]], b.blocks[common[0]])
        if len(first) > 1 and len(second) > 1:
            return "welch t over seeds", statistics.welch(list(first.values()), list(second.values()))
        return self._test_two_models(a.blocks[next(iter(first))], b.blocks[next(iter(second))])

    def _test_over_seeds(self, a: Row, b: Row, common: Sequence[Block]) -> tuple[str, statistics.Estimate]:
        """Pair the runs by seed, and their predictions by example if both have them."""
        runs_a, runs_b = [], []
        for block in common:
            runs_a.append(a.blocks[block])
            runs_b.append(b.blocks[block])
        examples = self._align_examples(runs_a + runs_b)
        if examples is None:
            first, second = self.get_values(a), self.get_values(b)
            differences = [first[block] - second[block] for block in common]
            return "paired t over seeds", statistics.corrected_t(differences, 0.0)
        values = [self._to_example_values(above, below) for above, below in examples]
        by_example = np.stack(values[: len(common)]) - np.stack(values[len(common) :])
        return "seeds and examples", statistics.crossed(by_example)

    def _to_example_values(self, above: Array, below: Array) -> Array:
        """Return values by example whose mean is the measure."""
        if self.measure.key == "accuracy":
            return np.asarray(above, dtype=float)
        return statistics.linearised(above, below)

    def _test_two_models(self, a: Run, b: Run) -> tuple[str, statistics.Estimate | None]:
        """Compare two trained models on the examples that both predicted."""
        examples = self._align_examples([a, b])
        if examples is None:
            return "none", None
        first, second = examples
        if self.measure.key != "accuracy":
            return "paired bootstrap", statistics.paired_bootstrap(first, second)
        right, other = np.asarray(first[0], dtype=bool), np.asarray(second[0], dtype=bool)
        only_a, only_b = int((right & ~other).sum()), int((~right & other).sum())
        estimate = statistics.bootstrap_counts(only_a, only_b, len(right))
        return "mcnemar mid-p", estimate._replace(p=statistics.mcnemar_midp(only_a, only_b))

    def _align_examples(self, runs: Sequence[Run]) -> list[tuple[Array, Array]] | None:
        """Return ``above`` and ``below`` of the examples that all ``runs`` predicted.

        Returns None if the measure is not a mean over examples, a run has no predictions, or there are fewer
        than two common examples.
        """
        if not self.by_example:
            return None
        members: list[PredictedExamples] = []
        for run in runs:
            found = self.predictions.get(run)
            if found is None:
                return None
            members.append(found)
        aligned = self.predictions.align(members)
        count, most = len(aligned[0][0]), max(len(member.above) for member in members)
        if count < most:
            self.partial_overlaps.add(f"{count:,} of {most:,}")
        return aligned if count > 1 else None

    def make_matrix(self, rows: Sequence[Row]) -> Array | None:
        """Return 1 for right and 0 for wrong [examples, rows], of the first repetition that all rows have.

        Returns None if the measure is no accuracy, or if there is no such repetition with predictions.
        """
        if self.measure.key != "accuracy":
            return None
        for block in rows[0].blocks:
            if all(block in row.blocks for row in rows):
                aligned = self._align_examples([row.blocks[block] for row in rows])
                if aligned is None:
                    return None
                return np.stack([above for above, _ in aligned], axis=1)
        return None

    def count_relabelled(self, rows: Sequence[Row]) -> dict[str, int]:
        """Count, for each row, the test examples whose true class is not the one in the first row.

        Returns an empty dictionary if there are none.
        """
        counts: dict[str, int] = {}
        first = None
        for row in rows:
            if not self.by_example or not row.finished:
                continue
            predicted = self.predictions.get(row.finished[0])
            if predicted is None:
                continue
            first = first or predicted
            counts[row.label] = self.predictions.count_relabelled(first, predicted)
        return counts if any(counts.values()) else {}


def _get_split(block: Block) -> Block:
    """Return ``dataset.split_seed`` and ``dataset.fold`` of a repetition."""
    return block[1:3]


def _test_over_splits(
    row: Row,
    first: Mapping[Block, float],
    second: Mapping[Block, float],
    common: Sequence[Block],
    test_ratio: float,
) -> tuple[str, statistics.Estimate]:
    """Test the mean difference over splits that draw the test set anew."""
    by_split: dict[Block, list[float]] = {}
    for block in common:
        by_split.setdefault(_get_split(block), []).append(first[block] - second[block])
    splits = sorted(by_split)
    differences = [float(np.mean(by_split[split])) for split in splits]
    if row.finished[0].settings.get("dataset.test_share") == 0.5 and _is_five_by_two(splits):
        return "5x2cv F", _test_halvings(np.reshape(differences, (5, 2)))
    return "corrected resampled t", statistics.corrected_t(differences, test_ratio)


def _test_halvings(differences: Array) -> statistics.Estimate:
    """Return the mean of ``differences`` [5, 2] with the p-value of the combined F, which has no interval."""
    mean = float(np.mean(differences))
    try:
        return statistics.Estimate(mean, None, None, statistics.five_by_two(differences).f_p)
    except ValueError:  # no variance
        return statistics.Estimate(mean, None, None, None)


def _is_five_by_two(splits: Sequence[Block]) -> bool:
    """Tell whether ``splits`` are both folds of five halvings."""
    seeds, folds = map(set, zip(*splits, strict=True))
    return len(seeds) == 5 and len(splits) == 10 and folds == {"0", "1"}


def _get_test_ratio(row: Row) -> float | None:
    """Return test examples per training example, if each split seed draws the test set anew; else None."""
    settings = row.finished[0].settings
    test, val = settings.get("dataset.test_share"), settings.get("dataset.val_share")
    if settings.get("dataset.test_path") or not isinstance(test, float) or not isinstance(val, float):
        return None
    return test / (1 - test - val)


def correct(verdicts: Sequence[Verdict], higher_is_better: bool) -> None:
    """Add Holm's corrected p-value and the resulting verdict to each of ``verdicts``."""
    corrected = statistics.holm([verdict["p"] for verdict in verdicts])
    for verdict, p in zip(verdicts, corrected, strict=True):
        verdict["p_holm"] = p
        verdict["verdict"] = _decide(p, verdict["difference"], higher_is_better)


def _decide(p: float | None, difference: float | None, higher_is_better: bool) -> str:
    if p is None:
        return "tie" if difference == 0 else "untested"
    if p > LEVEL or not difference:
        return "tie"
    return "better" if (difference > 0) == higher_is_better else "worse"
