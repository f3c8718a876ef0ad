"""Check that all damage to a folder is named, and that a kill while it is replaced loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.storage import lock, manifest
from finetune.storage.atomic import replacing

TENSOR = b'{"w":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}'


def fill(folder: Path, byte: bytes = b"a", told: bool = True) -> None:
    """Write the files of a folder of tensors; ``told``: as now, not as before there were manifests."""
    header = TENSOR.ljust(-(-len(TENSOR) // 8) * 8)
    (folder / "delta.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + byte * 16)
    (folder / "delta.json").write_text(
        json.dumps({**(manifest.HEADER if told else {"format": 1}), "step": 3})
    )


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    with manifest.sealed_folder(tmp_path / "delta") as temporary:
        fill(temporary)
    return tmp_path / "delta"


def test_a_manifest_has_the_names_sizes_and_hashes(whole: Path) -> None:
    content = json.loads((whole / "manifest.json").read_text())
    assert content["format"] == 1
    assert content["files"].keys() == {"delta.safetensors", "delta.json"}
    for name, entry in content["files"].items():
        data = (whole / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest.faults(whole) == []
    manifest.check(whole)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def edit(**changes: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes)) and None


ENTRY = {"bytes": 3, "sha256": "0" * 64}
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("delta.safetensors", flip, r"delta\.safetensors is damaged: its SHA-256"),
    (
        "delta.safetensors",
        cut,
        r"delta\.safetensors is damaged or cut short: it has \d+ bytes, and manifest\.json says \d+",
    ),
    ("delta.safetensors", Path.unlink, r"delta\.safetensors is missing"),
    ("delta.json", flip, r"delta\.json is damaged: its SHA-256"),
    ("delta.json", Path.unlink, r"delta\.json is missing"),
    ("manifest.json", Path.unlink, r"manifest\.json is missing"),
    ("manifest.json", cut, r"manifest\.json cannot be read"),
    ("manifest.json", lambda file: file.write_text("[" * 100_000), r"manifest\.json cannot be read"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe"), r"manifest\.json cannot be read"),
    ("manifest.json", lambda file: file.write_text("[]"), r"does not list the files"),
    ("manifest.json", edit(files={}), r"is not in manifest\.json"),
    ("manifest.json", edit(files={"delta.json": [1, 2]}), r"does not list the files"),
    ("manifest.json", edit(files={"../delta/delta.json": ENTRY}), r"names '\.\./delta/delta\.json'"),
    (
        "manifest.json",
        edit(format=7, finetune="8.1"),
        r"has format 7, and this version of finetune \(.*\) reads up to 1; .*>=8\.1",
    ),
    (
        "other.safetensors",
        lambda file: file.write_bytes(b"x"),
        r"other\.safetensors is not in manifest\.json",
    ),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_damage_is_named(whole: Path, name: str, damage: Callable[[Path], object], words: str) -> None:
    damage(whole / name)
    with pytest.raises(ConfigError, match=words):
        manifest.check(whole)


def test_files_that_are_not_ours_may_lie_there(whole: Path) -> None:
    (whole / ".DS_Store").write_bytes(b"x")
    (whole / "notes.txt").write_text("mine")
    assert manifest.faults(whole) == []


def test_a_folder_made_before_there_were_manifests_counts_by_its_layout(tmp_path: Path) -> None:
    fill(tmp_path, told=False)
    assert manifest.faults(tmp_path) == []
    flip(tmp_path / "delta.safetensors")  # nothing tells
    assert manifest.faults(tmp_path) == []
    cut(tmp_path / "delta.safetensors")
    assert "delta.safetensors is damaged or cut short" in manifest.faults(tmp_path)[0]
    (tmp_path / "delta.safetensors").unlink()
    assert "has lost files" in manifest.faults(tmp_path)[0]
    fill(tmp_path, told=False)
    cut(tmp_path / "delta.json")
    assert "delta.json is damaged or cut short" in manifest.faults(tmp_path)[0]
    assert "has lost files" in manifest.faults(tmp_path / "nowhere")[0]


def test_nothing_is_made_where_the_parent_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), manifest.sealed_folder(tmp_path / "run" / "delta"):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_folder_that_was_there(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp") and path.is_dir():
            raise OSError(28, "No space left on device")
        return real(path, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", fail_on_the_new_one)
    with pytest.raises(OSError, match="No space"), manifest.sealed_folder(whole) as temporary:
        fill(temporary, b"b")
    assert [path.name for path in whole.parent.iterdir()] == ["delta"]
    assert manifest.faults(whole) == []
    assert (whole / "delta.safetensors").read_bytes().endswith(b"a" * 16)


def killed_at(moment: int, folder: Path) -> bool:
    """Replace ``folder`` in a child process that is killed before its ``moment``-th call to the disk.

    Return whether it came that far.
    """
    child = os.fork()
    if child == 0:
        left = moment
        real = {
            (owner, name): getattr(owner, name)
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"))
        }

        def counted(act: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return act(*args, **named)

            return call

        for (owner, name), act in real.items():
            setattr(owner, name, counted(act))
        try:
            with manifest.sealed_folder(folder) as temporary:
                fill(temporary, b"b")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.processes
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new_folder_whole(whole: Path) -> None:
    moment, seen, missing = 0, list[str](), 0
    while killed_at(moment, whole):
        missing += not whole.exists()
        lock.recover(whole.parent)
        assert [path.name for path in whole.parent.iterdir()] == ["delta"]
        assert manifest.faults(whole) == []
        seen.append((whole / "delta.safetensors").read_bytes()[-16:].decode())
        shutil.rmtree(whole)
        with manifest.sealed_folder(whole) as temporary:
            fill(temporary)
        moment += 1
    assert moment > 8
    assert missing == 1  # between the two renames
    assert seen == sorted(seen)
    assert {*seen} == {"a" * 16, "b" * 16}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    living = tmp_path / f".result.json.{os.getppid()}.tmp"
    ours, dead = (
        tmp_path / f".delta.{os.getpid()}.tmp",
        tmp_path / ".delta.4194305.old",
    )  # above the largest number of a process
    living.write_text("half")
    for folder in (ours, dead, tmp_path / "delta"):
        folder.mkdir()
        (folder / "part").write_text("x")
    mine = tmp_path / ".mine.tmp"
    mine.write_text("x")
    lock.recover(tmp_path)
    assert {*tmp_path.iterdir()} == {living, tmp_path / "delta", mine}
    lock.recover(tmp_path / "nowhere")


@pytest.mark.processes
def test_a_file_is_replaced_whole_by_a_process_killed_at_any_time(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")
    child = os.fork()
    if child == 0:
        with replacing(file) as temporary:
            temporary.write_text("ne")
            os._exit(9)
    os.waitpid(child, 0)
    assert file.read_text() == "old"
    lock.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
