from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.settings import Config
from finetune.storage import result as module
from finetune.storage.result import group_hash, make_result, peak_memory, versions

PEAK = "from finetune.storage.result import peak_memory; {}; print(peak_memory()[0])"


def test_result_has_the_keys_of_the_contract(some_config: Config) -> None:
    result = make_result(
        some_config, status="finished", metrics={"test": {"accuracy": float("nan"), "loss": 0.5}}
    )
    promised = {
        "status",
        "method",
        "model",
        "dataset",
        "seed",
        "metrics",
        "params",
        "stored_bytes",
        "cost",
        "steps",
        "versions",
        "device",
    }
    assert promised | {"best_step", "git_commit", "config_hash", "format"} <= set(result)
    assert (result["method"], result["model"], result["dataset"], result["seed"]) == (
        "lora",
        "tiny_vit",
        "digits",
        3,
    )
    assert result["metrics"] == {"test": {"accuracy": None, "loss": 0.5}}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_group_hash_ignores_the_seed_and_nothing_else(some_config: Config) -> None:
    assert group_hash(some_config) == group_hash(replace(some_config, seed=8))
    assert group_hash(some_config) != group_hash(
        replace(some_config, train=replace(some_config.train, steps=7))
    )


def test_every_key_is_documented(some_config: Config) -> None:
    text = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    for key in make_result(some_config, status="finished"):
        assert f"`{key}`" in text


@pytest.mark.processes
def test_peak_memory_is_this_process_own() -> None:
    """Half a GiB in the parent process must not count; 200 MB in the process itself must."""
    ballast = bytearray(512 << 20)
    ballast[::4096] = b"x" * (len(ballast) // 4096)
    small, large = (
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK.format(code)], capture_output=True, text=True, check=True
            ).stdout
        )
        for code in ("pass", "b'x' * (200 << 20)")
    )
    del ballast
    assert small < 300 << 20
    assert 190 << 20 < large - small < 230 << 20


def test_peak_memory_takes_what_the_gpu_measured() -> None:
    assert peak_memory(123) == (123, "cuda_allocated")
    assert peak_memory()[1] == "process_rss"


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORDED", ("torch", "no-such-package"))
    assert list(versions()) == ["finetune", "python", "torch"]


@pytest.mark.processes
def test_git_commit_is_of_this_checkout_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "finetune" / "train").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(repo / "finetune" / "storage" / "result.py"))
    git_commit = module.git_commit.__wrapped__  # without its cache
    assert git_commit() is None
    git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit() is None  # no commit yet
    (repo / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = git_commit()
    assert clean is not None
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (repo / "a").write_text("2")
    assert git_commit() == f"{clean}-dirty"
