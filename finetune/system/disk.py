"""Report a full, read-only or vanished disk in one line with the cure. Imports no torch.

Files are written atomically, so everything saved before such an error is complete.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunFailed

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
ERRNO = re.compile(r"(?:os error|code:|errno) (\d+)", re.IGNORECASE)


@contextmanager
def disk_errors_as_run_failed(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` in the block, during the run in ``folder``, into ``RunFailed``."""
    try:
        yield
    except OSError as error:
        raise RunFailed(_describe(folder, error)) from error


def _describe(folder: Path, error: OSError) -> str:
    """Return what happened to the run in ``folder``, and how to resume it."""
    why = error.strerror or str(error) or type(error).__name__
    cure = f"`finetune train --resume {folder}` resumes the run"
    if error.errno == errno.ENOENT and not (folder / "config.yaml").exists():
        return f"{folder} has vanished during its run ({why}). Put it back, and {cure}; or start again."
    of_run = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)
    if of_run or error.errno in WRITING:
        return (
            f"{folder} cannot be written: {why}. Everything saved before is complete; make room or make it "
            f"writable, and {cure}."
        )
    if error.filename:
        why = f"{why} ({error.filename})"
    return f"The run in {folder} stopped: {why}. Everything saved before is complete; {cure}."


@contextmanager
def safetensors_errors_as_os_errors(file: Path) -> Iterator[None]:
    """Turn the error that safetensors raises inside the block into the ``OSError`` behind it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = ERRNO.search(str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error
