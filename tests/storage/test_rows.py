"""Metrics by step and predictions by example, as other programs read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.storage.rows import MetricsFile, write_predictions


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_predictions_have_the_types_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_predictions(
        path,
        [
            {"id": "a", "label": np.int32(1), "prediction": 2, "score": np.float32(0.25)},
            {"id": "b", "label": 0, "prediction": 0, "score": 1},
        ],
    )
    table = pq.read_table(path)
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "string",
        "label": "int64",
        "prediction": "int64",
        "score": "double",
    }
    assert table.to_pylist()[0] == {"id": "a", "label": 1, "prediction": 2, "score": 0.25}
    write_predictions(path, [{"id": "w", "loss": 12.5, "bytes": 40}])
    assert pq.read_table(path).to_pylist() == [{"id": "w", "loss": 12.5, "bytes": 40}]


@pytest.mark.parametrize("rows", [[], [{"id": "a", "extra": 1}], [{"id": "a", "label": 1}, {"id": "b"}]])
def test_predictions_refuse_what_the_contract_does_not_know(
    tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    with pytest.raises(ValueError, match="predictions need"):
        write_predictions(tmp_path / "p.parquet", rows)
    assert names(tmp_path) == []


def test_metrics_grow_by_lines_and_resume_drops_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (0, 5, 10, 15):
        first.append(step, {"loss": 1 / (step + 1)})
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # a process that was killed
    again = MetricsFile(path, start=10)
    again.append(11, {"loss": float("inf")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10, 11]
    assert lines[-1]["loss"] is None
    MetricsFile(path)
    assert path.read_text() == ""


def test_metrics_that_a_power_cut_left_are_dropped_where_they_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\x00{"step": 2}\n{"step": 2, "loss": 1}\n\x00\x00\x00')
    MetricsFile(path, start=2)
    assert path.read_text() == '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
