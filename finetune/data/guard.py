"""Refuse data files that could exhaust memory or disk.

These are archives, JSON files with deep nesting, and Parquet files that claim more than their bytes can hold.
Of archives and Parquet files, only the first bytes and the footers are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..system import safe

PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
}  # the first bytes of archives, by which the library that unpacks them recognizes them, too
TAR_PLACE, TAR_MARK = 257, b"ustar"
LINE = 2**26  # bytes of a JSON file that are read at once
DEPTH = 64  # levels of nesting that a JSON file may have
STRINGS, BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"'), re.compile(rb"[\[\]{}]")
ROWS = 2_000_000  # rows that a Parquet file of any size may claim
BYTES = 2**28  # unpacked bytes that a Parquet file of any size may claim
PACKING = 200  # a Parquet file may also claim this many times its own size
LISTED = 5  # number of faults that are shown


def check_files(kind: str, files: Sequence[Path]) -> None:
    """Raise ``ConfigError`` naming every file that is an archive or would unpack to an absurd size.

    ``kind`` is the reader of the files. In a folder of images, only files that are not images are checked.
    """
    faults = []
    for given in files:
        for file in _list_checked(given):
            fault = _find_archive(file)
            if not fault and kind == "parquet":
                fault = _find_false_claim(file)
            elif not fault and kind == "json":
                fault = _find_deep_nesting(file)
            if fault:
                faults.append(fault)
    if faults:
        raise ConfigError(*faults[:LISTED])


def _list_checked(file: Path) -> Iterable[Path]:
    """Yield the file; for a folder of images, the files in it that are not images."""
    if not file.is_dir():
        yield file
        return
    from PIL import Image

    known = set(Image.registered_extensions())
    for folder, _, names in os.walk(file):
        for name in names:
            if Path(name).suffix.lower() not in known:
                yield Path(folder) / name


def _find_archive(file: Path) -> str:
    """Return a fault if the file is an archive or cannot be read, else the empty string."""
    if not file.is_file():
        if file.is_symlink() or not file.exists():
            return ""
        return f"{file} is not a regular file. Give a file of the data set."
    try:
        with file.open("rb") as opened:
            head = opened.read(TAR_PLACE + len(TAR_MARK))
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}. Give a file that you may read."
    kind = "tar" if head[TAR_PLACE:] == TAR_MARK else ""
    for mark, name in PACKED.items():
        if head.startswith(mark):
            kind = name
    if not kind:
        return ""
    return f"{file} is packed ({kind}), and its content may be of any size. Unpack it first."


def _find_deep_nesting(file: Path) -> str:
    """Return a fault if a JSON file is nested deeply: Arrow's parser recurses and would end the process."""
    level = 0
    with file.open("rb") as lines:
        while line := lines.readline(LINE):
            opened = line.count(b"[") + line.count(b"{")
            closed = line.count(b"]") + line.count(b"}")
            if opened < DEPTH and not level and opened == closed:
                continue  # too few brackets to be deep, even with those inside strings
            for bracket in BRACKETS.findall(STRINGS.sub(b"", line)):
                level += 1 if bracket in b"[{" else -1
                if level > DEPTH:
                    return f"{file} is nested more than {DEPTH} levels deep. Give a file of plain rows."
    return ""


def _find_false_claim(file: Path) -> str:
    """Return a fault if the footer of a Parquet file claims more rows or bytes than the file can hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        return f"{file} has no rows or cannot be read as parquet ({reason}). Check its content and format."
    size = file.stat().st_size
    unpacked = 0
    for place in range(about.num_row_groups):
        unpacked += abs(about.row_group(place).total_byte_size)
    most_rows, most_bytes = max(ROWS, safe.ROWS_PER_BYTE * size), max(BYTES, PACKING * size)
    if 0 <= about.num_rows <= most_rows and unpacked <= most_bytes:
        return ""
    return (
        f"{file} has {size:,} bytes and claims {about.num_rows:,} rows of {unpacked:,} bytes, "
        "more than such a file can hold. Write it again, or give another file."
    )
