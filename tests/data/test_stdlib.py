import pydoc_data.topics
import sysconfig
from pathlib import Path

import pytest

from finetune.data.stdlib import Stdlib, find_tenth, list_sources, take_bytes
from finetune.errors import ConfigError

SMALL = Stdlib(train_bytes=20_000, val_bytes=3_000, test_bytes=4_000, retention_bytes=2_000)


def test_each_split_has_the_bytes_asked_for_and_the_files_own_text():
    raw = SMALL.read()
    root = Path(sysconfig.get_paths()["stdlib"])
    assert raw.task == "causal_lm"
    assert raw.labels == ()
    for split in ("train", "val", "test"):
        rows = raw.splits[split]
        assert 0 <= getattr(SMALL, f"{split}_bytes") - sum(len(row["text"].encode()) for row in rows) < 4
        for row in rows[:-1]:
            assert row["text"] == (root / row["id"]).read_text(encoding="utf-8")
    retained = raw.splits["retention"]
    assert all(
        pydoc_data.topics.topics[row["id"].removeprefix("topics/")].startswith(row["text"])
        for row in retained
    )


def test_no_file_is_in_two_splits_and_larger_sizes_only_add():
    small = SMALL.read().splits
    large = Stdlib(train_bytes=40_000, val_bytes=6_000, test_bytes=8_000).read().splits
    ids = {split: [row["id"] for row in large[split]] for split in ("train", "val", "test")}
    assert len({name for names in ids.values() for name in names}) == sum(map(len, ids.values()))
    for split, names in ids.items():
        assert names[: len(small[split])] == [row["id"] for row in small[split]]


def test_a_file_keeps_its_split_on_every_python():
    assert {name: find_tenth(name) for name in ("ast.py", "json/decoder.py", "os.py")} == {
        "ast.py": 6,
        "json/decoder.py": 3,
        "os.py": 2,
    }


def test_tests_and_installed_packages_are_not_the_library(tmp_path):
    for name in ("a.py", "sub/b.py", "site-packages/c.py", "test/d.py", "sub/tests/e.py", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert sorted(list_sources(tmp_path)) == ["a.py", "sub/b.py"]


def test_a_cut_through_a_character_drops_it():
    assert take_bytes(iter([("x", "aé"), ("y", "b")]), 2) == [{"id": "x", "text": "a"}]


def test_a_python_without_sources_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigError, match="found 0 files"):
        SMALL.read()


def test_a_request_for_more_text_than_there_is_has_a_note(monkeypatch):
    raw = Stdlib(train_bytes=1000, val_bytes=1000, test_bytes=1000, retention_bytes=10**8).read()
    note = "The standard library has less retention text than dataset.retention_bytes asks for"
    assert raw.notes == [f"{note}; all of it is used."]
