"""Whether two runs ended the same to the bit: the oracle of everything that breaks runs off.

Knows the files, and nothing of how they come about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

TIMES = ("seconds", "spent")


def differences(left: Path, right: Path) -> list[str]:
    """What is not equal in two folders of finished runs.

    Times, peak memory and the names of the runs are left out.
    """
    found = [
        name
        for name in ("delta/delta.safetensors",)
        if (left / name).read_bytes() != (right / name).read_bytes()
    ]
    found += [] if _lines(left) == _lines(right) else ["metrics.jsonl"]
    found += (
        []
        if pq.read_table(left / "predictions.parquet").equals(pq.read_table(right / "predictions.parquet"))
        else ["predictions.parquet"]
    )
    for name, read in (("result.json", _result), ("delta/delta.json", _about)):
        a, b = read(left), read(right)
        found += [
            f"{name}: {key} is {a.get(key)} and {b.get(key)}"
            for key in sorted({*a, *b})
            if a.get(key) != b.get(key)
        ]
    return found + _checkpoints(left, right)


def _lines(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def _result(run: Path) -> dict[str, Any]:
    content = json.loads((run / "result.json").read_text())
    return {
        key: value for key, value in content.items() if key not in ("cost", "stored_bytes", "git_commit")
    } | {"timed steps": len(_lines(run)) and sum("loss" in line for line in _lines(run))}


def _about(run: Path) -> dict[str, Any]:
    content = json.loads((run / "delta" / "delta.json").read_text())
    return content | {
        "config": {
            key: value
            for key, value in content["config"].items()
            if key not in ("name", "run", "logger", "train")
        }
    }


def _checkpoints(left: Path, right: Path) -> list[str]:
    """The state after the last step, where both have it.

    It includes the optimizer and every random generator.
    """
    steps = [
        {file.parent.name for file in run.glob("checkpoints/step-*/state.json")} for run in (left, right)
    ]
    last = f"step-{json.loads((left / 'result.json').read_text())['steps']}"
    if any(last not in there for there in steps):
        return []
    files = [run / "checkpoints" / last for run in (left, right)]
    found = [
        f"checkpoints/{last}/{name}"
        for name in ("state.safetensors", "delta.safetensors")
        if len({(f / name).read_bytes() for f in files}) > 1
    ]
    states = [json.loads((file / "state.json").read_text()) for file in files]
    for state in states:
        assert len(state["extra"].pop("seconds")) == state["number"]
        state["extra"] = {key: value for key, value in state["extra"].items() if key not in TIMES}
        state["extra"]["config"].pop("train")  # workers and when it is saved
    return found + ([] if states[0] == states[1] else [f"checkpoints/{last}/state.json"])
