"""Turn the errors of a command into messages on standard error and an exit code. Imports no torch.

The command line and every child process end this way: 0 for success, 1 for a failed run, 2 for a mistake of
the user, 130 after SIGINT, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable

from ..errors import ConfigError, FinetuneError, make_printable
from .environment import rank

INTERRUPTED = 130


def exit_code_of(action: Callable[[], int]) -> int:
    """Call ``action`` and return its exit code; if it raises, print the error and return the error's code.

    An unexpected error is printed as one line, and its traceback goes to a temporary file. With
    ``FINETUNE_DEBUG=1`` it is raised instead.
    """
    try:
        return action()
    except ConfigError as error:
        for fault in error.faults:
            print_line(f"Error: {fault}")
        return error.exit_code
    except FinetuneError as error:
        failed_disk = isinstance(error.__cause__, OSError)  # ranks may write to different disks
        print_line(f"Error: {make_printable(str(error))}", every_rank=failed_disk)
        return error.exit_code
    except Exception as error:
        if os.environ.get("FINETUNE_DEBUG") == "1":
            raise
        return _report_unexpected(error)


def _report_unexpected(error: Exception) -> int:
    """Print ``error``, which is being handled, and return the exit code."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = make_printable(str(error.filename))[:60]
        print_line(f"Error: {name}... is too long for the name of a file or folder. Give a shorter one.")
        return ConfigError.exit_code
    with tempfile.NamedTemporaryFile("w", prefix="finetune-", suffix=".log", delete=False) as log:
        log.write(traceback.format_exc())
    what = make_printable(f"{type(error).__name__}: {error}")
    where = f"(details in {log.name}; FINETUNE_DEBUG=1 shows them)"
    print_line(f"Error: finetune failed unexpectedly: {what} {where}", every_rank=True)
    return FinetuneError.exit_code


def print_line(line: str, every_rank: bool = False) -> None:
    """Print a line on standard error.

    Only rank 0 prints, unless ``every_rank`` is set: some faults, such as a full disk, are seen by one rank.
    """
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)
    elif every_rank:
        print(f"Process {rank()}: {line}", file=sys.stderr, flush=True)
