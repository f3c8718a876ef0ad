"""Check that files and folders appear whole or not at all, with the user's usual permissions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.storage.atomic import replacing, write_json_atomic, write_yaml_atomic


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    write_json_atomic(
        tmp_path / "a.json",
        {
            "nan": float("nan"),
            "inf": np.inf,
            "n": np.int64(3),
            "x": np.float32(0.5),
            "t": (1, 2),
            "p": Path("q"),
        },
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": None,
        "n": 3,
        "x": 0.5,
        "t": [1, 2],
        "p": "q",
    }


def test_yaml_round_trip_keeps_order_and_values(tmp_path: Path) -> None:
    tree = {"z": 1e-5, "a": {"on": True, "text": "on", "none": None, "list": [1, 2.5]}, "ü": "naïve"}
    write_yaml_atomic(tmp_path / "c.yaml", tree)
    back = yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))
    assert back == tree
    assert list(back) == list(tree)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"new": object()})

    def break_off() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_the_bytes_are_synced_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(handle: int) -> None:
        done.append("sync")
        real_sync(handle)

    def rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write_json_atomic(tmp_path / "a.json", {})
    assert done == ["sync", "rename", "sync"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        with replacing(tmp_path / "state") as temporary:
            temporary.mkdir()
            (temporary / f"part-{step}").write_text("x")
    assert names(tmp_path) == ["state"]
    assert names(tmp_path / "state") == ["part-2"]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_files_are_as_readable_as_any_other_that_the_user_makes(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is a plain file. The umask of the process, which all threads share, is never touched."""
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        with monkeypatch.context() as patch, replacing(tmp_path / "folder") as folder:
            patch.setattr(os, "umask", pytest.fail)
            folder.mkdir()
            (folder / "weights").touch(mode=0o600)
        with replacing(tmp_path / "file") as file:
            file.touch(mode=0o600)
    finally:
        os.umask(before)
    wanted = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder" / "weights").stat().st_mode == wanted
    assert (tmp_path / "file").stat().st_mode == wanted
    assert names(tmp_path) == ["file", "folder", "plain"]
    assert names(tmp_path / "folder") == ["weights"]
