"""What can go wrong, and the exit code of each kind.

FinetuneError          1   anything this package raises on purpose
├── ConfigError        2   the user's mistake: configuration, data, checkpoint; carries all faults found
└── RunFailed          1   a run that started and could not go on
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 2000  # characters of a message
PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")  # of an address


class FinetuneError(Exception):
    """Base of every error that is shown as a message and never as a traceback."""

    exit_code = 1


class ConfigError(FinetuneError):
    """One or more faults of what the user asked for; each names the thing, the value, its origin and the cure."""

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(map(visible, faults))
        super().__init__("\n".join(self.faults))


class RunFailed(FinetuneError):
    """A run stopped for a reason that lies in the run: a loss that is not finite, for example."""


def visible(text: str) -> str:
    """``text`` as one line that a terminal or a log shows as it is: control characters escaped, passwords in addresses gone, the middle of a long one
    left out."""
    text = PASSWORD.sub(
        "***@", text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"
    )
    return "".join(
        c if c.isprintable() else " " if c in "\t\n\r" else c.encode("unicode_escape").decode() for c in text
    )


def near(word: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``options``, or the empty string."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
