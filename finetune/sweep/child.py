"""The start of a sweep's child, ``python -m finetune.sweep.child PARENT train ...``: the command line, ended with its parent."""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with(parent: int) -> None:
    """Have the kernel end this process when ``parent`` ends, however that happens; end now if it already has. Only Linux can."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("The sweep that started this run has ended.")


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    from finetune.cli import main

    main()
