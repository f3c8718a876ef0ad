"""Write files and folders so that each appears whole or not at all, also after a kill or a power cut.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..system import safe
from ..system.version import __version__

STAMP = {
    "format": safe.FORMAT,
    "finetune": __version__,
}  # first keys of every JSON file: what its reader needs
OWNER_ONLY = 0o600


def to_json_value(value: Any) -> Any:
    """Convert ``value`` to what strict JSON can hold.

    Scalars of numpy and torch become Python's, paths become text, and numbers that are not finite become
    ``None``.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder at; rename it to ``path`` at the end of the block.

    After an error ``path`` is as it was. A process that is killed leaves ``.NAME.PID.tmp`` or
    ``.NAME.PID.old`` behind, which the next holder of the run's lock cleans up (``lock.recover``).
    """
    temporary = _hidden_name(path, "tmp")
    previous = _hidden_name(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)
    try:
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            _open_to_others(written)
            sync_to_disk(written)
        if path.is_dir():  # a folder that holds files cannot be replaced by a rename
            path.replace(previous)
        temporary.replace(path)
        sync_to_disk(path.parent)
        _remove(previous)
    finally:
        if previous.exists() and not path.exists():
            previous.replace(path)
        _remove(temporary)


def _hidden_name(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _open_to_others(file: Path) -> None:
    """Give a file that only its owner may read the permissions of any new file.

    safetensors creates its files that way, whatever the umask says. The kernel is asked for the permissions
    of a new file: the umask itself can only be read by changing it, for all threads of the process.
    """
    if not file.is_file() or stat.S_IMODE(file.stat().st_mode) != OWNER_ONLY:
        return
    probe = _hidden_name(file, "tmp")
    _remove(probe)
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        file.chmod(stat.S_IMODE(os.fstat(handle).st_mode))
    finally:
        os.close(handle)
        probe.unlink()


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as strict, indented JSON in UTF-8."""
    text = json.dumps(to_json_value(value), indent=2, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_yaml_atomic(path: Path, value: Mapping[str, Any], comments: Sequence[str] = ()) -> None:
    """Write a mapping of plain values as YAML, in its own order.

    The first line is a comment with the format and the version; ``comments`` are the lines after it.
    """
    text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    lines = [f"# format {safe.FORMAT}, finetune {__version__}", *comments, text]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
