"""Read, overwrite and put together tensors of safetensors files without more than one of them in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..system import safe
from .atomic import replacing


def create_file(
    path: Path, dtype: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of tensors of one type, which ``read`` gives one by one.

    ``dtype``: the type as the format names it, such as ``U8``.
    """
    header: dict[str, Any] = {}
    end, width = 0, safe.SIZES[dtype]
    for name in sorted(shapes):
        start, end = end, end + width * math.prod(shapes[name])
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            file.write(raw_bytes(read(name)))


class TensorFile:
    """A safetensors file whose header has been checked. ``names``: of its tensors, in their order on disk.

    Raises ``Unsafe`` if the file cannot hold what its header claims.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._described = safe.read_tensor_header(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = file.read(length)
        entries = json.loads(self.header)
        entries.pop("__metadata__", None)
        self._places: dict[str, tuple[int, int]] = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            self._places[name] = (8 + length + start, end - start)
        self.names = list(self._places)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the type of a tensor, as the format names it (``F32``), and its shape."""
        return self._described[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Replace the values of one tensor by others of the same dtype and shape, and flush them to disk."""
        start, size = self._places[name]
        content = raw_bytes(tensor)
        if len(content) != size:
            raise ValueError(f"{name} has {size} bytes in {self.path}, not {len(content)}")
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sha256(self, name: str) -> str:
        """Return the SHA-256 (hex) of a tensor's bytes on disk, read piece by piece."""
        total = hashlib.sha256()
        for piece in self.pieces(name):
            total.update(piece)
        return total.hexdigest()

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes on disk in pieces of at most 1 MiB."""
        start, left = self._places[name]
        with self.path.open("rb") as file:
            file.seek(start)
            while left:
                piece = file.read(min(left, 2**20))
                if not piece:
                    return
                left -= len(piece)
                yield piece

    def metadata(self) -> dict[str, str]:
        """Return the texts that the header has beside the tensors."""
        found: dict[str, str] = json.loads(self.header).get("__metadata__") or {}
        return found

    def size(self, name: str) -> int:
        """Return the number of bytes of a tensor."""
        return self._places[name][1]


@dataclass(frozen=True)
class Part:
    """A tensor of a new file: its name there, and the file and the name under which it is stored now."""

    name: str
    file: TensorFile
    stored: str


def write_tensor_file(path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of tensors that are stored elsewhere, in their order, piece by piece."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for part in parts:
        dtype, shape = part.file.describe(part.stored)
        start, end = end, end + part.file.size(part.stored)
        header[part.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for piece in part.file.pieces(part.stored):
                file.write(piece)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a safetensors file stores them."""
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)
