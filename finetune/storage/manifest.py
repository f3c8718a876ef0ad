"""List the files of a folder of tensors in ``manifest.json``, with size and SHA-256, and check them.

Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import safe
from .atomic import STAMP, replacing, write_json_atomic

NAME = "manifest.json"
HEADER = {
    **STAMP,
    "manifest": NAME,
}  # first keys of the JSON file beside it; folders older than manifests lack both
KINDS = (".json", ".safetensors")


def write(folder: Path) -> None:
    """Record the files that lie in ``folder`` now. Call it last, before the folder gets its final name."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != NAME:
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    write_json_atomic(folder / NAME, {**STAMP, "files": files})


@contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end of the block, add its manifest and move it to ``folder``.

    The parent folder is not made: raises ``FileNotFoundError`` where a user has removed it.
    """
    if not folder.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder.parent))
    with replacing(folder) as temporary:
        temporary.mkdir()
        yield temporary
        write(temporary)


def faults(folder: Path) -> list[str]:
    """Return what is wrong with ``folder``; empty if it is whole. Reads every byte of every file.

    Each fault is a sentence that names the file, without the full stop.
    """
    try:
        content = safe.read_json(folder / NAME)
        if newer := safe.explain_newer_format(folder / NAME, content):
            return [newer]
        if fault := safe.find_mismatch(content, {"files": {str: {"bytes": int, "sha256": str}}}):
            return [f"{folder / NAME} does not list the files of its folder: {fault}"]
    except FileNotFoundError:
        return _faults_without_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{folder / NAME} cannot be read ({_reason(error)})"]
    listed: dict[str, Any] = content["files"]
    found = []
    for name, entry in listed.items():
        if fault := _file_fault(folder, name, entry):
            found.append(fault)
    for file in sorted(folder.iterdir()):
        if file.suffix in KINDS and file.name not in (NAME, *listed):
            found.append(f"{file} is not in {NAME}")
    if not listed and not found:
        found.append(f"{folder / NAME} names no file")
    return found


def check(folder: Path) -> None:
    """Raise ``ConfigError`` with every fault of ``folder`` unless it is whole."""
    cure = "Copy the folder again from where it was made, or train again."
    if found := faults(folder):
        raise ConfigError(*(f"{fault}. {cure}" for fault in found))


def _file_fault(folder: Path, name: str, entry: dict[str, Any]) -> str:
    file = folder / name
    if Path(name).name != name:
        return f"{folder / NAME} names {name[:80]!r}, which is not a file of its folder"
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return (
                f"{file} is damaged or cut short: it has {size:,} bytes, and {NAME} says {entry['bytes']:,}"
            )
        if _sha256(file) != entry["sha256"]:
            return f"{file} is damaged: its SHA-256 is not that of {NAME}"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({_reason(error)})"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _faults_without_manifest(folder: Path) -> list[str]:
    """Check a folder made before there were manifests.

    Only JSON syntax and the layout of the tensors can be checked there.
    """
    files = []
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in KINDS)
    if {file.suffix for file in files} != {*KINDS}:
        names = ", ".join(file.name for file in files) or "none"
        return [f"{folder} has lost files: it only has {names}"]
    found = []
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safe.read_tensor_header(file)
            elif "manifest" in safe.read_json(file, {}):
                found.append(f"{folder / NAME} is missing")
        except (OSError, ValueError) as error:
            found.append(f"{file} is damaged or cut short: {_reason(error)}")
    return found


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
