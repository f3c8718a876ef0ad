"""What a full, a read-only or a vanished disk does to a run: one line with the cure; what was saved before stays whole. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunFailed

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
CODE = re.compile(r"(?:os error|code:|errno) (\d+)", re.IGNORECASE)


@contextmanager
def disk_errors_as_run_failed(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` of a run that goes on in ``folder`` into ``RunFailed``."""
    try:
        yield
    except OSError as error:
        raise RunFailed(words(folder, error)) from error


def words(folder: Path, error: OSError) -> str:
    """What happened, and how to go on."""
    why = error.strerror or str(error) or type(error).__name__
    cure = f"`finetune train --resume {folder}` goes on"
    if error.errno == errno.ENOENT and not (folder / "config.yaml").exists():
        return (
            f"{folder} has vanished while its run went on ({why}). Put it back, and {cure}; or start again."
        )
    ours = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
    if ours or error.errno in WRITING:
        return f"{folder} cannot be written: {why}. What was saved before is whole; make room or make it writable, and {cure}."
    return f"The run in {folder} stopped: {why}{f' ({error.filename})' if error.filename else ''}. What was saved before is whole; {cure}."


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn what safetensors raises where a file cannot be written into the ``OSError`` that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = CODE.search(str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error
