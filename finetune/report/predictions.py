"""Read what runs predicted for each test example, and align two or more runs on the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..system import safe
from .runs import Run

COLUMNS = {"accuracy": ("label", "prediction"), "bits_per_byte": ("loss", "bytes")}  # of each metric
DTYPES = {"int64": np.int64, "double": np.float64}  # Arrow's name of a type, and NumPy's type
Array = NDArray[Any]


class PredictedExamples(NamedTuple):
    """What a run predicted. The metric is ``above.sum() / below.sum()`` over the test examples.

    For accuracy ``above`` is 1 where the prediction is right and ``below`` is ones (stored as a single 1);
    for bits per byte they are bits and bytes. ``ids`` is an Arrow column; ``labels`` the true classes, or
    None.
    """

    ids: Any
    above: Array
    below: Array
    labels: Array | None


@dataclass
class Predictions:
    """Reads ``predictions.parquet`` of each run once, for the metric ``key``.

    Equal columns of ids are shared as one object, so that aligning runs on the same examples costs nothing.
    """

    key: str

    def __post_init__(self) -> None:
        self._by_run: dict[int, PredictedExamples | None] = {}
        self._id_columns: list[Any] = []
        self._positions: dict[int, dict[str, int]] = {}

    def get(self, run: Run) -> PredictedExamples | None:
        """Return the predictions of ``run``.

        Returns None, and adds a note to the run, if the file is missing, damaged or does not belong to its
        result.
        """
        if id(run) not in self._by_run:
            try:
                self._by_run[id(run)] = self._read(run)
            except Exception as error:  # a damaged file can make Arrow raise anything
                reason = " ".join(str(error).split())[:200]
                run.notes.append(f"{run.path / 'predictions.parquet'} cannot be used: {reason}.")
                self._by_run[id(run)] = None
        return self._by_run[id(run)]

    def _read(self, run: Run) -> PredictedExamples:
        import pyarrow.parquet as pq

        file = run.path / "predictions.parquet"
        columns = COLUMNS[self.key]
        if not file.is_file():  # opening a pipe would wait for its writer
            raise ValueError("it is not a file")
        opened = pq.ParquetFile(file)
        if opened.metadata.num_rows > safe.ROWS_PER_BYTE * file.stat().st_size:
            raise ValueError(f"it claims {opened.metadata.num_rows:,} rows")
        table = opened.read(columns=["id", *columns], use_threads=False)
        if table.num_rows == 0:
            raise ValueError("it has no rows")
        first, second = _to_numpy(table.column(columns[0])), _to_numpy(table.column(columns[1]))
        ids = self._share_ids(table.column("id"))
        if self.key == "accuracy":
            found = PredictedExamples(ids, (first == second).astype(np.int8), np.ones(1, np.int8), first)
            value = float(found.above.mean())
        else:
            found = PredictedExamples(ids, first / math.log(2), second.astype(float), None)
            value = float(found.above.sum() / found.below.sum())
        recorded = run.get_number(f"test.{self.key}")
        if recorded is None or not math.isclose(value, recorded, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"its rows give {self.key} {value:.6g}, and result.json says {recorded}")
        return found

    def _share_ids(self, ids: Any) -> Any:
        """Return an equal column of ids read earlier, or ``ids``. Raises ``ValueError`` if an id repeats."""
        for earlier in self._id_columns:
            if earlier.equals(ids):
                return earlier
        if len(set(ids.to_pylist())) < len(ids):
            raise ValueError("it holds an id twice")
        self._id_columns.append(ids)
        return ids

    def _find_positions(self, ids: Any) -> dict[str, int]:
        """Return the position of each id in the column."""
        if id(ids) not in self._positions:
            self._positions[id(ids)] = {name: at for at, name in enumerate(ids.to_pylist())}
        return self._positions[id(ids)]

    def align(self, members: Sequence[PredictedExamples]) -> list[tuple[Array, Array]]:
        """Return ``above`` and ``below`` of each member for the examples that all members have, in one order.

        The arrays are empty if they have no example in common.
        """
        first = members[0]
        found = []
        if all(member.ids is first.ids for member in members):
            for member in members:
                found.append((member.above, _spread_below(member)))
            return found
        positions = [self._find_positions(member.ids) for member in members]
        common = [name for name in positions[0] if all(name in other for other in positions[1:])]
        for member, position in zip(members, positions, strict=True):
            at = np.array([position[name] for name in common], dtype=np.int64)
            found.append((member.above[at], _spread_below(member)[at]))
        return found

    def count_relabelled(self, one: PredictedExamples, other: PredictedExamples) -> int:
        """Count the shared examples whose true class differs."""
        if one.labels is None or other.labels is None:
            return 0
        if one.ids is other.ids:
            return int((one.labels != other.labels).sum())
        here, there = self._find_positions(one.ids), self._find_positions(other.ids)
        count = 0
        for name in here.keys() & there.keys():
            if one.labels[here[name]] != other.labels[there[name]]:
                count += 1
        return count


def _to_numpy(column: Any) -> Array:
    """Return a column of numbers from its bytes.

    Arrow's own conversion imports pandas, which takes a second.
    """
    array = column.combine_chunks()
    dtype = DTYPES.get(str(array.type))
    if dtype is None or array.null_count:
        raise ValueError(
            f"a column of {array.type} with {array.null_count} nulls does not hold plain numbers"
        )
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def _spread_below(examples: PredictedExamples) -> Array:
    """Return ``below`` with one value per example."""
    if len(examples.below) > 1:
        return examples.below
    return np.broadcast_to(examples.below, (len(examples.above),))
