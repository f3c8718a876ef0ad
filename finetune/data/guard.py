"""What a data file must not be: an archive, or a table that claims far more than its bytes can hold. Looks at a few bytes and at footers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from ..errors import ConfigError
from ..system import safe

PACKED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
TAR = 257, b"ustar"
LINE, DEPTH = 2**26, 64
STRINGS, BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"'), re.compile(rb"[\[\]{}]")
ROWS = 2_000_000  # that a table may always have
BYTES, PACKING = 2**28, 200  # unpacked bytes that a file may always have, and how many times its own size


def check(kind: str, files: Sequence[Path]) -> None:
    """Raise ``ConfigError`` naming every file that would be unpacked, wherever that leads, and every Parquet file that unpacks to absurd size."""
    inside = {"parquet": _claims, "json": _depth}.get(kind, _packed)
    faults = [
        fault for file in files for one in _single(kind, file) if (fault := _packed(one) or inside(one))
    ]
    if faults:
        raise ConfigError(*faults[:5])


def _single(kind: str, file: Path) -> Iterable[Path]:
    """The file; of a folder of images, those that are none."""
    if not file.is_dir():
        return [file]
    from PIL import Image

    known = set(Image.registered_extensions())
    return (
        Path(folder) / name
        for folder, _, names in os.walk(file)
        for name in names
        if Path(name).suffix.lower() not in known
    )


def _packed(file: Path) -> str:
    """The name of what ``file`` is packed by goes by its first bytes, as in the library that would unpack it."""
    if not file.is_file():
        return (
            ""
            if file.is_symlink() or not file.exists()
            else f"{file} is no regular file. Give a file of the data set."
        )
    try:
        with file.open("rb") as opened:
            head = opened.read(TAR[0] + len(TAR[1]))
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}. Give a file that you may read."
    kind = next(
        (name for mark, name in PACKED.items() if head.startswith(mark)),
        "tar" if head[TAR[0] :] == TAR[1] else "",
    )
    return (
        f"{file} is packed ({kind}), and what it unpacks to may be of any size. Unpack it first."
        if kind
        else ""
    )


def _depth(file: Path) -> str:
    """Arrow's JSON parser calls itself for each level, and ends the process where there are too many."""
    level = 0
    with file.open("rb") as lines:
        while line := lines.readline(LINE):
            opened = line.count(b"[") + line.count(b"{")
            if opened < DEPTH and not level and opened == line.count(b"]") + line.count(b"}"):
                continue  # whole in itself: what is in its texts need not be told apart
            levels = list(
                accumulate(
                    (1 if c in b"[{" else -1 for c in BRACKETS.findall(STRINGS.sub(b"", line))), initial=level
                )
            )
            level = levels[-1]
            if max(levels) > DEPTH:
                return f"{file} is nested more than {DEPTH} levels deep. Give a file of plain rows."
    return ""


def _claims(file: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        return f"{file} has no rows or cannot be read as parquet ({' '.join(str(error).split())}). Check its content and format."
    size = file.stat().st_size
    sizes = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
    unpacked = sum(map(abs, sizes))
    if (
        about.num_rows < 0
        or about.num_rows > max(ROWS, safe.ROWS_PER_BYTE * size)
        or unpacked > max(BYTES, PACKING * size)
    ):
        claim = f"{about.num_rows:,} rows of {unpacked:,} bytes"
        return f"{file} has {size:,} bytes and claims {claim}. Write it again with rows that are worth their place."
    return ""
