"""Each limit of the readers of untrusted files by itself; later code would often refuse the file, too."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.data import guard
from finetune.errors import ConfigError
from finetune.system import safe


def written(file: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file of that header, which may be text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_the_header_of_a_whole_file_is_read_as_its_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1, 2]),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    found = safe.read_tensor_header(tmp_path / "t.safetensors")
    assert {name: shape for name, (_, shape) in found.items()} == {
        name: tuple(t.shape) for name, t in load_file(tmp_path / "t.safetensors").items()
    }


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "does not fit its place"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20), "does not fit its place"),
        ({"a": entry([2], 0, 8)}, bytes(9), "hold"),
        ({"a": entry([10**9], 0, 4 * 10**9)}, bytes(8), "hold"),
        ({"a": entry([-2, -1], 0, 8)}, bytes(8), "does not fit its place"),
        ({"a": entry([2], 0, 8, dtype="F33")}, bytes(8), "does not fit its place"),
        ({"a\x1b[2J": entry([2], 0, 8)}, bytes(8), "does not fit its place"),
        ({"a": entry([1] * 9, 0, 4)}, bytes(4), "does not fit its place"),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            bytes(4),
            "twice",
        ),
        ("[" * 10_000, b"", "deep"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "data_offsets"),
    ],
)
def test_a_header_that_claims_what_is_not_there(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        safe.read_tensor_header(written(tmp_path / "t.safetensors", header, data))


def test_a_header_longer_than_its_file_or_than_any_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    for length in (100, 2**40, 2**63):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(safe.Unsafe, match="claims a header"):
            safe.read_tensor_header(file)


def test_a_sparse_file_of_terabytes_is_refused_by_its_size_on_disk(tmp_path: Path) -> None:
    size = 2**36
    file = written(tmp_path / "t.safetensors", {"a": entry([size // 4], 0, size)})
    os.truncate(file, file.stat().st_size + size)
    with pytest.raises(safe.Unsafe, match="on disk"):
        safe.read_tensor_header(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (lambda file: safe.read(file, 10), safe.read_tensor_header, safe.read_json, safe.read_yaml):
        with pytest.raises(safe.Unsafe, match="not a regular file"):
            reader(tmp_path / "pipe")
    assert list(safe.read_lines(tmp_path / "pipe")) == []


def test_json_and_yaml_within_bounds(tmp_path: Path) -> None:
    for depth, good in ((60, True), (70, False), (100_000, False)):
        text = "[" * depth + "]" * depth
        for parse in (safe.parse_json, *([] if depth > 1000 else [safe.check_yaml])):
            if good:
                parse(text)
            else:
                with pytest.raises(safe.Unsafe, match="deep"):
                    parse(text)
    with pytest.raises(safe.Unsafe, match="NaN"):
        safe.parse_json('{"a": NaN}')
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 12)
    )
    with pytest.raises(safe.Unsafe, match="values"):
        safe.check_yaml(laughs)
    (tmp_path / "big.json").write_text("1" * 101)
    with pytest.raises(safe.Unsafe, match="101 bytes"):
        safe.read_json(tmp_path / "big.json", most=100)


@pytest.mark.parametrize(("mark", "kind"), [(mark, kind) for mark, kind in guard.PACKED.items()])
def test_packed_files_are_refused_by_their_first_bytes(tmp_path: Path, mark: bytes, kind: str) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(gzip.compress(b"text,label\n") if kind == "gzip" else mark + bytes(300))
    with pytest.raises(ConfigError, match=rf"data.csv is packed \({kind}\)"):
        guard.check_files("csv", [file])
    file.write_bytes(b"text,label\na,b\n")
    guard.check_files("csv", [file])
