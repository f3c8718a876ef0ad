"""Whether one row is better than another, by the strongest test that what they have in common allows.

Seeds are not examples. Where two rows share seeds, the test takes seeds and test examples both as drawn at random, so that what it says is about the
methods. Where there is one seed only, the test is about those two trained models, and is marked as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import statistics
from .predictions import COLUMNS, Examples, Predictions
from .rows import Block, Row
from .score import Score

LEVEL = 0.05
FIXED = ("mcnemar mid-p", "paired bootstrap")  # about two trained models, not about two methods
Verdict = dict[str, Any]


@dataclass
class Judge:
    """Compares rows by ``score``. ``examples`` holds how many test examples were compared, by how many a run has."""

    score: Score

    def __post_init__(self) -> None:
        self.predictions = Predictions(self.score.key)
        self.by_example = self.score.split == "test" and self.score.key in COLUMNS
        self.partly: set[str] = set()
        self._values: dict[str, dict[Block, float]] = {}

    def values(self, row: Row) -> dict[Block, float]:
        """The score of each finished run that has it."""
        if row.label not in self._values:
            found = {block: run.number(self.score.name) for block, run in row.blocks.items()}
            self._values[row.label] = {block: value for block, value in found.items() if value is not None}
        return self._values[row.label]

    def versus(self, a: Row, b: Row) -> Verdict:
        """``a`` less ``b``, before any correction for many tests."""
        first, second = self.values(a), self.values(b)
        common = [block for block in first if block in second]
        name, found = self._test(a, b, common) if first and second else ("none", None)
        if found is None:
            difference = (
                float(np.mean(list(first.values())) - np.mean(list(second.values())))
                if first and second
                else None
            )
            return {
                "against": b.label,
                "difference": difference,
                "low": None,
                "high": None,
                "p": None,
                "test": "none",
            }
        return {"against": b.label, **found._asdict(), "test": name}

    def _test(self, a: Row, b: Row, common: list[Block]) -> tuple[str, statistics.Estimate | None]:
        first, second = self.values(a), self.values(b)
        splits = sorted({block[1:3] for block in common})  # dataset.split_seed and dataset.fold
        if len(splits) > 1 and (ratio := _ratio(a)) is not None:
            by_split = [
                float(np.mean([first[block] - second[block] for block in common if block[1:3] == split]))
                for split in splits
            ]
            if a.finished[0].settings.get("dataset.test_share") == 0.5 and _five_by_two(splits):
                return "5x2cv F", _halvings(np.reshape(by_split, (5, 2)))
            return "corrected resampled t", statistics.corrected_t(by_split, ratio)
        if len(common) > 1:
            found = self._examples(
                [a.blocks[block] for block in common] + [b.blocks[block] for block in common]
            )
            if found is not None:
                values = [self._each(above, below) for above, below in found]
                return "seeds and examples", statistics.crossed(
                    np.stack(values[: len(common)]) - np.stack(values[len(common) :])
                )
            return "paired t over seeds", statistics.corrected_t(
                [first[block] - second[block] for block in common], 0.0
            )
        if len(first) > 1 and len(second) > 1 and not common:
            return "welch t over seeds", statistics.welch(list(first.values()), list(second.values()))
        pair = (common[0], common[0]) if common else (next(iter(first)), next(iter(second)))
        found = self._examples([a.blocks[pair[0]], b.blocks[pair[1]]])
        return self._fixed(found) if found is not None else ("none", None)

    def _fixed(self, found: Sequence[tuple[Any, Any]]) -> tuple[str, statistics.Estimate]:
        """Two trained models on the same examples."""
        if self.score.key != "accuracy":
            return "paired bootstrap", statistics.paired_bootstrap(found[0], found[1])
        right, other = (np.asarray(above, dtype=bool) for above, _ in found)
        b, c = int((right & ~other).sum()), int((~right & other).sum())
        return "mcnemar mid-p", statistics.bootstrap_counts(b, c, len(right))._replace(
            p=statistics.mcnemar_midp(b, c)
        )

    def _each(self, above: Any, below: Any) -> Any:
        return (
            np.asarray(above, dtype=float)
            if self.score.key == "accuracy"
            else statistics.linearised(above, below)
        )

    def _examples(self, runs: Sequence[Any]) -> list[tuple[Any, Any]] | None:
        """Sums above and below of the examples that all ``runs`` predicted; ``None`` where that is fewer than two."""
        if not self.by_example:
            return None
        members: list[Examples] = []
        for run in runs:
            one = self.predictions.of(run)
            if one is None:
                return None
            members.append(one)
        found = self.predictions.align(members)
        count, most = len(found[0][0]), max(len(member.above) for member in members)
        if count < most:
            self.partly.add(f"{count:,} of {most:,}")
        return found if count > 1 else None

    def matrix(self, rows: Sequence[Row]) -> Any:
        """Right or wrong [examples, rows], of the first block that all rows have; ``None`` where there is none or it is no accuracy."""
        shared = [block for block in rows[0].blocks if all(block in row.blocks for row in rows)]
        found = (
            self._examples([row.blocks[shared[0]] for row in rows])
            if shared and self.score.key == "accuracy"
            else None
        )
        return None if found is None else np.stack([above for above, _ in found], axis=1)

    def relabelled(self, rows: Sequence[Row]) -> dict[str, int]:
        """By row, how many test examples have another true class than in the first one."""
        firsts = [
            (row.label, found)
            for row in rows
            if self.by_example and row.finished and (found := self.predictions.of(row.finished[0]))
        ]
        counts = {label: self.predictions.relabelled(firsts[0][1], found) for label, found in firsts}
        return counts if any(counts.values()) else {}


def _halvings(differences: Any) -> statistics.Estimate:
    """The mean of ``differences`` [5, 2] with the p-value of the combined F, which has no interval."""
    mean = float(np.mean(differences))
    try:
        return statistics.Estimate(mean, None, None, statistics.five_by_two(differences).f_p)
    except ValueError:  # no variance
        return statistics.Estimate(mean, None, None, None)


def _five_by_two(splits: Sequence[Block]) -> bool:
    """Whether ``splits``, sorted, are both folds of five halvings."""
    seeds = {seed for seed, _ in splits}
    return len(seeds) == 5 and len(splits) == 10 and {fold for _, fold in splits} == {"0", "1"}


def _ratio(row: Row) -> float | None:
    """Test examples per training example where the test set is drawn anew by each split seed."""
    settings = row.finished[0].settings
    shares = [settings.get(f"dataset.{key}") for key in ("test_share", "val_share")]
    if settings.get("dataset.test_path") or not all(isinstance(share, float) for share in shares):
        return None
    test, val = (float(share) for share in shares if isinstance(share, float))
    return test / (1 - test - val)


def correct(verdicts: Sequence[Verdict], higher_is_better: bool) -> None:
    """Holm's correction over all of ``verdicts``, and what each says then."""
    for verdict, p in zip(verdicts, statistics.holm([verdict["p"] for verdict in verdicts]), strict=True):
        verdict["p_holm"] = p
        if p is None:
            verdict["verdict"] = "tie" if verdict["difference"] == 0 else "untested"
        elif p <= LEVEL and verdict["difference"]:
            verdict["verdict"] = "better" if (verdict["difference"] > 0) == higher_is_better else "worse"
        else:
            verdict["verdict"] = "tie"
