"""What runs said about each test example, aligned, so that two runs can be compared on the very same examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..system import safe
from .runs import Run

COLUMNS = {"accuracy": ("label", "prediction"), "bits_per_byte": ("loss", "bytes")}
Array = NDArray[Any]


class Examples(NamedTuple):
    """Per example, what is summed: right answers and ones, or bits and bytes; the metric is the ratio of the sums."""

    ids: Any
    above: Array
    below: Array
    labels: Array | None


@dataclass
class Predictions:
    """Reads ``predictions.parquet`` of each run once; equal lists of ids are one object, which makes aligning them free."""

    key: str

    def __post_init__(self) -> None:
        self._read: dict[int, Examples | None] = {}
        self._ids: list[Any] = []
        self._places: dict[int, dict[str, int]] = {}

    def of(self, run: Run) -> Examples | None:
        """``None``, with a note on the run, where there are none that belong to its result."""
        if id(run) not in self._read:
            try:
                self._read[id(run)] = self._load(run)
            except Exception as error:  # whatever a torn file makes of Arrow
                words = " ".join(str(error).split())[:200]
                run.notes.append(f"{run.path / 'predictions.parquet'} cannot be used: {words}.")
                self._read[id(run)] = None
        return self._read[id(run)]

    def _load(self, run: Run) -> Examples:
        import pyarrow.parquet as pq

        file = run.path / "predictions.parquet"
        columns = COLUMNS[self.key]
        if not file.is_file():
            raise ValueError("it is no file")  # a pipe would wait for its writer
        opened = pq.ParquetFile(file)
        if opened.metadata.num_rows > safe.ROWS_PER_BYTE * file.stat().st_size:
            raise ValueError(f"it claims {opened.metadata.num_rows:,} rows")
        table = opened.read(columns=["id", *columns], use_threads=False)
        if table.num_rows == 0:
            raise ValueError("it has no rows")
        first, second = (_numbers(table.column(name)) for name in columns)
        if self.key == "accuracy":
            found = Examples(
                self._intern(table), (first == second).astype(np.int8), np.ones(1, np.int8), first
            )
            value = float(found.above.mean())
        else:
            found = Examples(self._intern(table), first / math.log(2), second.astype(float), None)
            value = float(found.above.sum() / found.below.sum())
        told = run.number(f"test.{self.key}")
        if told is None or not math.isclose(value, told, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"its rows give {self.key} {value:.6g}, and result.json says {told}")
        return found

    def _intern(self, table: Any) -> Any:
        ids = table.column("id")
        known = next((other for other in self._ids if other.equals(ids)), None)
        if known is None:
            if len(set(ids.to_pylist())) < len(ids):
                raise ValueError("it holds an id twice")
            self._ids.append(ids)
        return known if known is not None else ids

    def places(self, ids: Any) -> dict[str, int]:
        """Where each id stands."""
        if id(ids) not in self._places:
            self._places[id(ids)] = {name: at for at, name in enumerate(ids.to_pylist())}
        return self._places[id(ids)]

    def align(self, members: list[Examples]) -> list[tuple[Array, Array]]:
        """Sums above and below of the examples that all ``members`` have, in one order; empty arrays where they share none."""
        first = members[0]
        if all(member.ids is first.ids for member in members):
            return [(m.above, _whole(m.below, len(m.above))) for m in members]
        maps = [self.places(member.ids) for member in members]
        common = [name for name in maps[0] if all(name in other for other in maps[1:])]
        found = []
        for member, place in zip(members, maps, strict=True):
            at = np.fromiter((place[name] for name in common), dtype=np.int64, count=len(common))
            found.append((member.above[at], _whole(member.below, len(member.above))[at]))
        return found

    def relabelled(self, one: Examples, other: Examples) -> int:
        """How many shared examples have another true class in ``other``."""
        if one.labels is None or other.labels is None:
            return 0
        if one.ids is other.ids:
            return int((one.labels != other.labels).sum())
        here, there = self.places(one.ids), self.places(other.ids)
        return sum(
            bool(one.labels[here[name]] != other.labels[there[name]]) for name in here.keys() & there.keys()
        )


def _numbers(column: Any) -> Array:
    """A column of numbers, from its bytes: Arrow's own conversion would import pandas, which takes a second."""
    array = column.combine_chunks()
    kind = {"int64": np.int64, "double": np.float64}.get(str(array.type))
    if kind is None or array.null_count:
        raise ValueError(f"a column of {array.type} with {array.null_count} nulls holds no plain numbers")
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array)]


def _whole(below: Array, n: int) -> Array:
    return np.broadcast_to(below, (n,)) if len(below) == 1 else below
