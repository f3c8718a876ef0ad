"""What a folder of tensors must hold: ``manifest.json`` with the bytes and the SHA-256 of each of its files. Imports no torch."""

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
from .run_folder import STAMP, replacing, write_json_atomic

NAME = "manifest.json"
HEADER = {
    **STAMP,
    "manifest": NAME,
}  # in front of the JSON file beside it; folders made before there were manifests lack both
KINDS = (".json", ".safetensors")


def write(folder: Path) -> None:
    """Record the files that lie in ``folder`` now. To be called last, before the folder gets its name."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != NAME
    }
    write_json_atomic(folder / NAME, {**STAMP, "files": files})


@contextmanager
def sealing(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of ``folder``, with its manifest, when the block ends without an error.

    What ``folder`` lies in is not made: where a user has removed it, nothing is written.
    """
    if not folder.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder.parent))
    with replacing(folder) as temporary:
        temporary.mkdir()
        yield temporary
        write(temporary)


def faults(folder: Path) -> list[str]:
    """What is wrong with ``folder``, each naming the file; empty when it is whole. Reads every byte."""
    try:
        content = safe.read_json(folder / NAME)
        if newer := safe.too_new(folder / NAME, content):
            return [newer]
        if fault := safe.differs(content, {"files": {str: {"bytes": int, "sha256": str}}}):
            return [f"{folder / NAME} does not list the files of its folder: {fault}"]
    except FileNotFoundError:
        return _without(folder)
    except (OSError, ValueError) as error:
        return [f"{folder / NAME} cannot be read ({_brief(error)})"]
    there = {file.name for file in folder.iterdir() if file.suffix in KINDS} - {NAME}
    extra = [f"{folder / name} is not in {NAME}" for name in sorted(there - content["files"].keys())]
    found = [_fault(folder, name, entry) for name, entry in content["files"].items()]
    return [words for words in found if words] + extra or (
        [] if content["files"] else [f"{folder / NAME} names no file"]
    )


def check(folder: Path) -> None:
    """Raise ``ConfigError``, naming each file, unless ``folder`` is whole."""
    if found := faults(folder):
        raise ConfigError(
            *(f"{words}. Copy the folder again from where it was made, or train again." for words in found)
        )


def _fault(folder: Path, name: str, entry: dict[str, Any]) -> str:
    file = folder / name
    if Path(name).name != name:
        return f"{folder / NAME} names {name[:80]!r}, which is no file of its folder"
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return (
                f"{file} is damaged or cut short: it has {size:,} bytes, and {NAME} says {entry['bytes']:,}"
            )
        return (
            ""
            if _sha256(file) == entry["sha256"]
            else f"{file} is damaged: its SHA-256 is not that of {NAME}"
        )
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({_brief(error)})"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _without(folder: Path) -> list[str]:
    """Faults of a folder without a manifest. In one made before there were any, JSON and the layout of the tensors are all that can be checked."""
    files = sorted(file for file in folder.iterdir() if file.suffix in KINDS) if folder.is_dir() else []
    if {file.suffix for file in files} != {*KINDS}:
        return [
            f"{folder} has lost files: {', '.join(file.name for file in files) or 'none'} is all that lies there"
        ]
    found = []
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safe.tensors_of(file)
            elif "manifest" in safe.read_json(file, {}):
                found.append(f"{folder / NAME} is missing")
        except (OSError, ValueError) as error:
            found.append(f"{file} is damaged or cut short: {_brief(error)}")
    return found


def _brief(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
