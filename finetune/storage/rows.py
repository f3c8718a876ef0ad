"""Files of rows in a run's folder: metrics by step, and predictions by example. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system import safe
from .atomic import replacing, to_json_value

CLASSIFICATION = {"id": "string", "label": "int64", "prediction": "int64", "score": "float64"}
LANGUAGE = {"loss": "float64", "bytes": "int64"}


class MetricsFile:
    """A file of lines, each a JSON object with its ``step``. It is open only while a line is written.

    ``start``: the step that a resumed run continues from. Lines of later steps and a torn last line are
    dropped; with ``start=0``, all lines are dropped.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        kept = []
        if start and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if _step_of(line) <= start:
                    kept.append(f"{line}\n")
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite become ``null``."""
        line = json.dumps(to_json_value({"step": step, **metrics}), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _step_of(line: str) -> float:
    """Return the step of a line, infinity for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per test example as Parquet, with the columns of the first row.

    The columns are id, label, prediction, score for a classifier, and id, loss, bytes for a language model.
    Raises ``ValueError`` if there are no rows, or if the columns are others or differ between rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {**CLASSIFICATION, **LANGUAGE}
    columns = [name for name in known if rows and name in rows[0]]
    if not columns or any(set(row) != set(columns) for row in rows):
        raise ValueError(
            f"predictions need at least one row; all rows need the same columns, out of {', '.join(known)}"
        )
    arrays = {}
    for name in columns:
        arrays[name] = pa.array([to_json_value(row[name]) for row in rows], known[name])
    table = pa.table(arrays, metadata={"format": str(safe.FORMAT)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
