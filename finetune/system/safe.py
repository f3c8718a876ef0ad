"""Read files that a stranger may have made: plain data only, of bounded size and depth. Decodes no pickle.

A run folder, a model or a data set may come from anybody. What is refused here is refused before any value is
built from it. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .version import __version__

FORMAT = 1  # of a run folder
JSON_BYTES = 32 * 2**20
YAML_BYTES = 2**18  # PyYAML reads some 50 kB a second; a frozen configuration has 2 kB
HEADER_BYTES = 32 * 2**20  # of a safetensors file: 100,000 tensors need 15 MiB
LINE_BYTES = 2**20
ROWS_PER_BYTE = 50  # of a Parquet file: a row takes a byte or more, except in columns that repeat one value
LINES_BYTES = 2**28
DEPTH = 64  # levels of nesting
NODES = 10_000  # values of a YAML text, aliases counted as what they stand for
# A tensor file above this size must occupy at least a tenth of it on disk. A compressing file system stores
# less than the whole size, but a sparse file occupies almost nothing.
HOLE = 2**26
DIMENSIONS = 8  # of a tensor
SIZES = {  # bytes of an entry by its type in a safetensors header
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
# Settings that keep W&B from recording the command line, host, user, git remote and installed packages.
PRIVATE: dict[str, Any] = {
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "host": "",
}
Header = dict[str, tuple[str, tuple[int, ...]]]  # of each tensor by name: its type and shape


class Unsafe(ValueError):
    """The reason why a file is not read, in words that follow its name."""


def explain_newer_format(file: Path, content: Any) -> str:
    """Return why this version cannot read the format of ``content``, which ``file`` holds; empty if it can.

    The reason is a sentence without its full stop and names the version to install.
    """
    known = content if isinstance(content, Mapping) else {}
    version = known.get("format", FORMAT)
    if type(version) is int and version <= FORMAT:
        return ""
    maker = known.get("finetune")
    versions = known.get("versions")
    if maker is None and isinstance(versions, Mapping):
        maker = versions.get("finetune")
    need = "a newer finetune-bench"
    if isinstance(maker, str) and re.fullmatch(r"[\w.+]{1,40}", maker):
        need = f"finetune-bench>={maker}"
    return (
        f"{file} has format {str(version)[:20]}, and this version of finetune ({__version__}) reads up to "
        f"{FORMAT}; install {need}"
    )


def first_line(file: Path) -> dict[str, Any]:
    """Return format and version from the first line of a frozen configuration; empty if it states none."""
    try:
        found = re.match(rb"# format (\d{1,9}), finetune ([\w.+]{1,40})\n", read(file, YAML_BYTES))
    except (OSError, ValueError):
        return {}
    if found is None:
        return {}
    return {"format": int(found[1]), "finetune": found[2].decode()}


def _open_regular(file: Path) -> tuple[BufferedReader, os.stat_result]:
    """Open a regular file and return its status too. Raises ``Unsafe`` for anything else, and ``OSError``.

    It is opened without blocking, since a pipe would wait for its writer.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        opened, status = os.fdopen(descriptor, "rb"), os.fstat(descriptor)
    except OSError:  # a folder
        os.close(descriptor)
        raise
    if not stat.S_ISREG(status.st_mode):
        opened.close()
        raise Unsafe("it is not a regular file")
    return opened, status


def read(file: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes. Raises ``Unsafe`` and ``OSError``."""
    opened, status = _open_regular(file)
    with opened:
        if status.st_size > most:
            raise Unsafe(f"it has {status.st_size:,} bytes, and such a file has at most {most:,}")
        return opened.read(most)


def read_json(file: Path, like: Any = object, most: int = JSON_BYTES) -> Any:
    """Return the content of a JSON file of the shape ``like`` (see ``find_mismatch``).

    Raises ``Unsafe`` (a ``ValueError``) and ``OSError``.
    """
    found = parse_json(read(file, most))
    if fault := find_mismatch(found, like):
        raise Unsafe(fault)
    return found


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON of at most 64 levels.

    Raises ``Unsafe``, or another ``ValueError`` that says where the text is not JSON.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise Unsafe(_too_deep()) from None
    level, depth = [found], 0
    while level := _children(level):
        depth += 1
        if depth > DEPTH:
            raise Unsafe(_too_deep())
    return found


def _children(values: list[Any]) -> list[Any]:
    """Return everything that lies directly inside the lists and mappings among ``values``."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, list):
            found += value
    return found


def _refuse_constant(name: str) -> Any:
    raise Unsafe(f"{name} is not JSON")


def _too_deep() -> str:
    return f"it is nested more than {DEPTH} levels deep"


def read_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a growing text file, up to 256 MiB; lines of 1 MiB or more are left out.

    Yields nothing if ``file`` is not a regular file.
    """
    try:
        opened, _ = _open_regular(file)
    except (OSError, Unsafe):
        return
    with opened:
        at_start, taken = True, 0  # whether the next piece begins a line, and how many bytes were read
        while taken < LINES_BYTES and (piece := opened.readline(LINE_BYTES)):
            taken += len(piece)
            ends = piece.endswith(b"\n") or len(piece) < LINE_BYTES
            if at_start and ends:
                yield piece.decode(errors="replace").rstrip("\n")
            at_start = ends


def find_mismatch(value: Any, like: Any, name: str = "it") -> str:
    """Return how ``value``, called ``name``, departs from the shape ``like``; empty if it does not.

    ``like`` is a type, a union of types, ``[like]``, ``{str: like}``, a tuple of alternatives, or a mapping
    of keys. In a mapping, a key that ends in ``?`` may be absent, and other keys are allowed. Numbers must be
    finite and fit 64 bits; a float may be a whole number.
    """
    if isinstance(like, tuple):
        faults = [find_mismatch(value, one, name) for one in like]
        return "" if "" in faults else max(faults, key=len)
    if isinstance(like, list):
        return _list_fault(value, like[0], name)
    if isinstance(like, dict):
        return _mapping_fault(value, like, name)
    return "" if _fits(value, like) else _is_no(name, value, getattr(like, "__name__", str(like)))


def _list_fault(value: Any, like: Any, name: str) -> str:
    if not isinstance(value, list):
        return _is_no(name, value, "list")
    for i, item in enumerate(value):
        if fault := find_mismatch(item, like, f"{name}[{i}]"):
            return fault
    return ""


def _mapping_fault(value: Any, like: Mapping[Any, Any], name: str) -> str:
    if not isinstance(value, dict):
        return _is_no(name, value, "mapping")
    inside = "" if name == "it" else f"{name}."
    if str in like:
        for key, item in value.items():
            if fault := find_mismatch(item, like[str], f"{inside}{key}"):
                return fault
        return ""
    for key in like:
        if not key.endswith("?") and key not in value:
            return f"{name} has no {key}"
    for key, inner in like.items():
        key = key.rstrip("?")
        if key in value and (fault := find_mismatch(value[key], inner, f"{inside}{key}")):
            return fault
    return ""


def _fits(value: Any, like: Any) -> bool:
    """Tell whether ``value`` is of the type or union ``like``; a bool is not a number, numbers are finite."""
    if like is object:
        return True
    if isinstance(value, bool):
        return like is bool or bool in getattr(like, "__args__", ())
    if isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) >= 2**63:
            return False
        return isinstance(value, like) or (isinstance(value, int) and isinstance(0.0, like))
    return isinstance(value, like)


def _is_no(name: str, value: Any, what: str) -> str:
    text = json.dumps(value, default=str)
    if len(text) > 60:
        text = f"{text[:57]}..."
    return f"{name} should be a {what} and is {text}"


def read_yaml(file: Path) -> Any:
    """Return the plain values of a small YAML file. Raises ``Unsafe``, ``yaml.YAMLError`` and ``OSError``."""
    return yaml.load(yaml_text(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def yaml_text(file: Path) -> str:
    """Return the text of a YAML file that is safe to build values from.

    Raises ``Unsafe``, ``yaml.YAMLError`` and ``OSError``.
    """
    text = read(file, YAML_BYTES).decode()
    check_yaml(text)
    return text


def check_yaml(text: str) -> None:
    """Raise ``Unsafe`` for YAML that holds bytes, is too deep, or too large once its aliases are expanded.

    Works on the events of the parser, so no value is built.
    """
    sizes: dict[str, int] = {}  # values under each anchor
    open_: list[tuple[str, int]] = [("", 0)]  # anchor and number of values of each open collection
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor, size = getattr(event, "anchor", None) or "", 0
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise Unsafe(f"its alias *{anchor} stands inside what it repeats")
            anchor, size = "", sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.tag == "tag:yaml.org,2002:binary":
                raise Unsafe("it holds bytes (!!binary), which no setting is")
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((anchor, 1))
            sizes.pop(anchor, None)
            if len(open_) > DEPTH:
                raise Unsafe(_too_deep())
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
        if anchor and not isinstance(event, yaml.CollectionStartEvent):
            sizes[anchor] = size
        open_[-1] = (open_[-1][0], open_[-1][1] + size)
        if open_[-1][1] > NODES:
            raise Unsafe(f"it has more than {NODES:,} values")


def read_tensor_header(file: Path) -> Header:
    """Return type and shape of each tensor of a safetensors file, whose header and length are checked.

    No tensor is read. Raises ``Unsafe`` if the file cannot hold what it claims, and ``OSError``.
    """
    opened, status = _open_regular(file)
    with opened:
        length = int.from_bytes(opened.read(8), "little")
        if status.st_size < 8 or length > min(HEADER_BYTES, status.st_size - 8):
            raise Unsafe(f"it claims a header of {length:,} bytes and has {status.st_size:,}")
        try:
            header = json.loads(
                opened.read(length), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
            )
        except RecursionError:
            raise Unsafe(_too_deep()) from None
    on_disk = status.st_blocks * 512
    if status.st_size > HOLE and on_disk * 10 < status.st_size:
        raise Unsafe(f"it claims {status.st_size:,} bytes and has {on_disk:,} on disk")
    return _checked_header(header, status.st_size - 8 - length)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unsafe("its header names something twice")
    return found


def _checked_header(header: Any, room: int) -> Header:
    """Return the tensors of a header, which must lie one behind the other and fill ``room`` bytes."""
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    like = {str: {"dtype": str, "shape": [int], "data_offsets": [int]}}
    if fault := find_mismatch(header, like, "its header"):
        raise Unsafe(fault)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], entry["shape"]
        size = SIZES.get(dtype, 0) * math.prod(shape[:DIMENSIONS])
        possible = dtype in SIZES and len(shape) <= DIMENSIONS and min(shape, default=0) >= 0
        if not possible or entry["data_offsets"] != [end, end + size] or not name.isprintable():
            raise Unsafe(
                f"its tensor {name[:80]!r} of type {dtype[:20]!r} and shape {str(shape)[:80]} does not fit "
                "its place"
            )
        end += size
    if end != room:
        raise Unsafe(f"its tensors have {end:,} bytes, and it holds {room:,}")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def check_links(root: Path) -> None:
    """Raise ``ConfigError`` naming files and folders inside the run folder ``root`` that are links out of it.

    At most five are named. ``root`` itself may be a link. W&B's folder is left out: nothing here reads it,
    and its links stay inside.
    """
    inside = root.resolve()
    faults = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != "wandb"]
        for name in (*names, *files):
            path = Path(folder) / name
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                faults.append(
                    f"{path} is a link out of the run's folder, which is not followed. Put what it points "
                    "to in its place."
                )
    if faults:
        raise ConfigError(*faults[:5])
