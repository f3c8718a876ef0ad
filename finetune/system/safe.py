"""Reading files that a stranger may have made: plain data only, of bounded size and depth. Imports nothing heavy, and decodes no pickle.

A run folder, a model or a data set may come from anybody. What is refused here is refused before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..errors import ConfigError

FORMAT = 1  # of a run folder
JSON_BYTES = 32 * 2**20
YAML_BYTES = 2**18  # PyYAML reads some 50 kB a second; a frozen configuration has 2 kB
HEADER_BYTES = 32 * 2**20  # of a safetensors file: 100,000 tensors need 15
LINE_BYTES = 2**20
ROWS_PER_BYTE = 50  # of a Parquet file: a row takes a byte or more, but for columns that repeat one value
LINES_BYTES = 2**28
DEPTH = 64
NODES = 10_000  # of a YAML text, aliases counted as what they stand for
HOLE = (
    2**26
)  # bytes above which a tensor file must have a tenth of what it claims on disk: file systems that compress keep less than all
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
    "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
PRIVATE: dict[str, Any] = {  # settings of W&B, which by itself records the command line, host, user, git remote and installed packages
    "disable_git": True, "disable_code": True, "save_code": False, "disable_job_creation": True, "x_disable_meta": True,
    "x_disable_machine_info": True, "x_save_requirements": False, "host": "",
}  # fmt: skip
Header = dict[str, tuple[str, tuple[int, ...]]]


class Unsafe(ValueError):
    """Why a file is not read, in words that follow its name."""


def too_new(file: Path, content: Any) -> str:
    """Why this version cannot read what ``file`` holds, in a sentence without its stop; empty where the format is one that it knows."""
    known = content if isinstance(content, Mapping) else {}
    version = known.get("format", FORMAT)
    if type(version) is int and version <= FORMAT:
        return ""
    maker = known.get(
        "finetune",
        (known.get("versions") or {}).get("finetune") if isinstance(known.get("versions"), Mapping) else None,
    )
    need = (
        f"finetune-bench>={maker}"
        if isinstance(maker, str) and re.fullmatch(r"[\w.+]{1,40}", maker)
        else "a newer finetune-bench"
    )
    return f"{file} has format {str(version)[:20]}, and this version of finetune ({__version__}) reads up to {FORMAT}; install {need}"


def first_line(file: Path) -> dict[str, Any]:
    """What the first line of a frozen configuration says of its format; nothing where it has no such line."""
    try:
        found = re.match(rb"# format (\d{1,9}), finetune ([\w.+]{1,40})\n", read(file, YAML_BYTES))
    except (OSError, ValueError):
        return {}
    return {"format": int(found[1]), "finetune": found[2].decode()} if found else {}


def read(file: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises ``Unsafe`` for anything else, and ``OSError``."""
    with os.fdopen(
        os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"
    ) as opened:  # a pipe would wait for its writer
        about = os.fstat(opened.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Unsafe("it is no regular file")
        if about.st_size > most:
            raise Unsafe(f"it has {about.st_size:,} bytes, and such a file has at most {most:,}")
        return opened.read(most)


def read_json(file: Path, like: Any = object, most: int = JSON_BYTES) -> Any:
    """What a JSON file holds, if it is as ``differs`` wants it. Raises ``Unsafe`` (a ``ValueError``) and ``OSError``."""
    found = parse_json(read(file, most))
    if fault := differs(found, like):
        raise Unsafe(fault)
    return found


def parse_json(text: str | bytes) -> Any:
    """Strict JSON, at most 64 levels deep. Raises ``Unsafe``, or another ``ValueError`` that says where it is not JSON."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Unsafe(_too_deep()) from None
    level, depth = [found], 0
    while level := [
        inner
        for item in level
        if isinstance(item, dict | list)
        for inner in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
        if depth > DEPTH:
            raise Unsafe(_too_deep())
    return found


def _no_constant(name: str) -> Any:
    raise Unsafe(f"{name} is no JSON")


def _too_deep() -> str:
    return f"it is nested more than {DEPTH} levels deep"


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a text file that grows, one that is too long left out, up to 256 MiB; none where there is no regular file."""
    try:
        opened = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError:
        return
    with opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            return
        whole, taken = True, 0
        while taken < LINES_BYTES and (line := opened.readline(LINE_BYTES)):
            taken += len(line)
            ends = line.endswith(b"\n") or len(line) < LINE_BYTES
            if whole and ends:
                yield line.decode(errors="replace").rstrip("\n")
            whole = ends


def differs(value: Any, like: Any, name: str = "it") -> str:
    """In what ``value`` is not as ``like``, or "". ``like``: a type, a union of types, ``[like]``, ``{str: like}``, a tuple of alternatives, or a
    mapping of keys, optional where they end in ``?``; other keys may be there. Numbers must be finite and fit 64 bits; a float may be a whole number.
    """
    if isinstance(like, tuple):
        faults = [differs(value, one, name) for one in like]
        return "" if "" in faults else max(faults, key=len)
    if isinstance(like, list):
        return (
            _first((item, like[0], f"{name}[{i}]") for i, item in enumerate(value))
            if isinstance(value, list)
            else _is_no(name, value, "list")
        )
    if isinstance(like, dict):
        if not isinstance(value, dict):
            return _is_no(name, value, "mapping")
        if str in like:
            return _first((item, like[str], f"{name}.{key}") for key, item in value.items())
        if lacking := [key for key in like if not key.endswith("?") and key not in value]:
            return f"{name} has no {lacking[0]}"
        return _first(
            (value[key.rstrip("?")], inner, f"{name}.{key.rstrip('?')}")
            for key, inner in like.items()
            if key.rstrip("?") in value
        )
    return "" if _fits(value, like) else _is_no(name, value, getattr(like, "__name__", str(like)))


def _first(items: Iterator[tuple[Any, Any, str]]) -> str:
    return next(
        (fault for value, like, name in items if (fault := differs(value, like, name.removeprefix("it.")))),
        "",
    )


def _fits(value: Any, like: Any) -> bool:
    if like is object:
        return True
    if isinstance(value, bool):
        return isinstance(True, like) and like not in (int, float) and not _only_numbers(like)
    if isinstance(value, int | float):
        good = math.isfinite(value) and abs(value) < 2**63
        return good and (isinstance(value, like) or (isinstance(value, int) and isinstance(0.0, like)))
    return isinstance(value, like)


def _only_numbers(like: Any) -> bool:
    return bool not in getattr(like, "__args__", (like,))


def _is_no(name: str, value: Any, what: str) -> str:
    shown = json.dumps(value, default=str)
    return f"{name} should be a {what} and is {shown if len(shown) <= 60 else shown[:57] + '...'}"


def read_yaml(file: Path) -> Any:
    """What a small YAML file of plain values holds. Raises ``Unsafe``, ``yaml.YAMLError`` and ``OSError``."""
    return yaml.load(yaml_text(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def yaml_text(file: Path) -> str:
    """The text of a YAML file that is safe to build values from. Raises ``Unsafe``, ``yaml.YAMLError`` and ``OSError``."""
    text = read(file, YAML_BYTES).decode()
    check_yaml(text)
    return text


def check_yaml(text: str) -> None:
    """Raise ``Unsafe`` where YAML holds bytes, is too deep, or too large once its aliases stand for what they repeat. Builds nothing."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str, int]] = [("", 0)]
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


def tensors_of(file: Path) -> Header:
    """Type and shape of each tensor of a safetensors file, whose header and length are checked; no tensor is read.

    Raises ``Unsafe`` where the file cannot hold what it claims, and ``OSError``.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        about = os.fstat(opened.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Unsafe("it is no regular file")
        start = int.from_bytes(opened.read(8), "little")
        if about.st_size < 8 or start > min(HEADER_BYTES, about.st_size - 8):
            raise Unsafe(f"it claims a header of {start:,} bytes and has {about.st_size:,}")
        try:
            header = json.loads(opened.read(start), object_pairs_hook=_once, parse_constant=_no_constant)
        except RecursionError:
            raise Unsafe(_too_deep()) from None
    if about.st_size > HOLE and about.st_blocks * 512 * 10 < about.st_size:
        raise Unsafe(f"it claims {about.st_size:,} bytes and has {about.st_blocks * 512:,} on disk")
    return _checked(header, about.st_size - 8 - start)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unsafe("its header names something twice")
    return found


def _checked(header: Any, room: int) -> Header:
    """The tensors of a header that lie one behind the other and fill ``room`` bytes."""
    like = {str: {"dtype": str, "shape": [int], "data_offsets": [int]}}
    tensors = (
        {name: entry for name, entry in header.items() if name != "__metadata__"}
        if isinstance(header, dict)
        else header
    )
    if fault := differs(tensors, like, "its header"):
        raise Unsafe(fault)
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        shape, places = entry["shape"], entry["data_offsets"]
        size = SIZES.get(entry["dtype"], 0) * math.prod(shape[:8])
        if (
            entry["dtype"] not in SIZES
            or len(shape) > 8
            or min(shape, default=0) < 0
            or places != [end, end + size]
            or not name.isprintable()
        ):
            raise Unsafe(
                f"its tensor {name[:80]!r} of type {entry['dtype'][:20]!r} and shape {str(shape)[:80]} does not fit its place"
            )
        end += size
    if end != room:
        raise Unsafe(f"its tensors have {end:,} bytes, and it holds {room:,}")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}


def check_links(root: Path) -> None:
    """Raise ``ConfigError`` naming every file or folder of a run that is a link out of it. The run's own folder may be reached by one.

    W&B's folder is left out: nothing here reads it, and its links stay inside.
    """
    inside = root.resolve()
    faults = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != "wandb"]
        for path in (Path(folder) / name for name in (*names, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                faults.append(
                    f"{path} is a link out of the run's folder, which is not followed. Put what it points to in its place."
                )
    if faults:
        raise ConfigError(*faults[:5])
