from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from finetune.report.table import RunsTable, runs_table

Make = Callable[..., dict[str, Any]]


def accuracy(value: float) -> dict[str, Any]:
    return {"base": {"accuracy": 0.1}, "test": {"accuracy": value}}


def printed(table: RunsTable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return str(text)


def test_seeds_of_a_setting_share_a_row(result: Make) -> None:
    values = [0.90, 0.94, 0.95]
    runs = [result(seed=seed, metrics=accuracy(value)) for seed, value in enumerate(values)]
    runs.append(result(method="lora", group_hash="bbbbbbbbbb", metrics=accuracy(0.5)))
    first, second = runs_table(runs).rows
    assert (first["label"], first["seeds"], first["rank"]) == ("snell", 3, "best")
    assert first["mean"] == pytest.approx(statistics.mean(values))
    assert first["sd"] == pytest.approx(statistics.stdev(values))
    assert (second["label"], second["seeds"], second["sd"], second["rank"]) == ("lora", 1, None, "")


def test_one_seed_is_said_and_the_best_marked(result: Make) -> None:
    text = printed(runs_table([result(), result(method="lora", group_hash="b", metrics=accuracy(0.5))]))
    assert text.count("one seed") == 2
    assert "96.31 % *" in text
    assert "50.00 % *" not in text
    assert "* best" in text


def test_ties_are_marked_as_ties(result: Make) -> None:
    table = runs_table(
        [result(group_hash=name, method=name, metrics=accuracy(0.96312 + tiny)) for name, tiny in (("a", 0.0), ("b", 1e-6), ("c", -0.1))]
    )
    assert [row["rank"] for row in table.rows] == ["tie", "tie", ""]
    assert printed(table).count("96.31 % =") == 2


def test_fewer_bits_are_better_and_data_sets_do_not_compete(result: Make) -> None:
    bits = [({"test": {"bits_per_byte": value}}, name) for value, name in ((2.0, "a"), (1.5, "b"))]
    runs = [result(metrics=metrics, method=name, group_hash=name, dataset="stdlib") for metrics, name in bits]
    rows = runs_table([*runs, result(group_hash="c")]).rows
    assert [row["rank"] for row in rows] == ["", "best", ""]  # the third has nothing to be better than


def test_failed_runs_stay_as_rows_and_do_not_count(result: Make) -> None:
    failed = {"status": "failed", "method": "snell", "model": "tiny_vit", "dataset": "digits", "error": "out of memory"}
    table = runs_table([result(), result(seed=1), {**failed, "group_hash": "aaaaaaaaaa"}, {**failed, "method": "lora", "group_hash": "z"}])
    assert [(row["seeds"], row["failed"], row["mean"] is None) for row in table.rows] == [(2, 1, False), (0, 1, True)]
    text = printed(table)
    assert "2 (1 failed)" in text
    assert "0 (1 failed)" in text


def test_rows_of_one_method_get_names_that_differ(result: Make) -> None:
    runs = [result(group_hash="1111112222"), result(group_hash="3333334444")]
    assert [row["label"] for row in runs_table(runs).rows] == ["snell 111111", "snell 333333"]
    assert [row["label"] for row in runs_table(runs, ["method.rank=4", "method.rank=8"]).rows] == ["method.rank=4", "method.rank=8"]


def test_no_runs_make_an_empty_table() -> None:
    table = runs_table([])
    assert table.rows == []
    assert "seeds" in printed(table)
