"""The start of a sweep's child, ``python -m finetune.launch.child PARENT train ...``: the command line, ended with its parent."""

from __future__ import annotations

import sys

from .ranks import end_with as end_with

if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    from ..cli.app import main

    main()
