"""The comparison in W&B's own files, read back from the records that W&B would send."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.report import wandb_report
from finetune.report.comparison import compare

from ..support.run_folders import MakeRun

BLOCK = 32768


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for seed in (0, 1):
        make_run("lora", seed, [1, 1, 1, seed])
        make_run("head", seed, [1, 0, 0, seed])
    return tmp_path / "outputs" / "sweep"


def read_records(folder: Path) -> list[Any]:
    """Return the records of an offline run after W&B's own process has written the last one.

    The file has LevelDB's log format after a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(600):
        found = [Record.FromString(data) for data in join_chunks(file.read_bytes())]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(file)


def join_chunks(log: bytes) -> Iterator[bytes]:
    """Yield the records of the log, joined from chunks: whole (1), first (2), middle (3), last (4)."""
    at, data = 7, b""
    while at + 7 < len(log):
        if BLOCK - at % BLOCK < 7:  # no chunk begins in what is left of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        if at + 7 + length > len(log):
            return
        data += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield data
            data = b""


@pytest.mark.processes
def test_offline_run_holds_the_table_and_the_numbers(sweep: Path) -> None:
    data, lines = compare([sweep]).as_dict(), list[str]()
    wandb_report.log_comparison(data, [sweep], "trial", lines.append)
    assert lines == ["W&B: logged to the project trial, group sweep."]
    found = read_records(sweep)
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.project, run.run_group, run.job_type, run.display_name) == (
        "trial",
        "sweep",
        "comparison",
        "comparison of sweep",
    )
    summary = {}
    for record in found:
        if record.HasField("summary"):
            summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.summary.update
            }
        if record.HasField("history"):
            summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
    for row in data["rows"]:
        assert summary[f"{row['label']}/mean"] == row["mean"]
        assert summary[f"{row['label']}/trained"] == row["trained"]
    assert summary["fairness"] == []
    logged = {
        str(path)
        for value in summary.values()
        for path in (value.values() if isinstance(value, dict) else [value])
    }
    (file,) = sweep.glob("wandb/offline-run-*/files/media/table/*.json")
    assert any(str(file).endswith(path) for path in logged if path.endswith(".table.json"))
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]
    assert [(row["row"], row["mean"], row["p_holm"]) for row in rows] == [
        (row["label"], row["mean"], (row["versus"] or {}).get("p_holm")) for row in data["rows"]
    ]
    images = list(sweep.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert images
    assert all(any(str(image).endswith(path) for path in logged if path.endswith(".png")) for image in images)


@pytest.mark.processes
def test_a_failing_logger_prints_one_line(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: Any) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(wandb, "init", broken)
    lines: list[str] = []
    wandb_report.log_comparison(compare([sweep]).as_dict(), [sweep], "trial", lines.append)
    assert lines == ["Warning: W&B failed (OSError: no space); everything else is done."]
