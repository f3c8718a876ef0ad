"""Define the errors of this package and the exit code of each.

FinetuneError          1   base class of every error that this package raises on purpose
├── ConfigError        2   a mistake in the configuration, the data or a checkpoint; lists every fault found
└── RunFailed          1   a run that started and could not continue
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 2000  # characters of a message
PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")  # user and password in an address


class FinetuneError(Exception):
    """Base of every error that is shown as a message and never as a traceback."""

    exit_code = 1


class ConfigError(FinetuneError):
    """Mistakes of the user; each fault names the thing, its value, where it came from and the cure."""

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(map(make_printable, faults))
        super().__init__("\n".join(self.faults))


class RunFailed(FinetuneError):
    """A run stopped because of what happened in it, for example a loss that is not finite."""


def make_printable(text: str) -> str:
    """Return ``text`` as one line that is safe to print in a terminal or a log.

    Control characters are escaped, line breaks and tabs become spaces, user and password are removed from
    addresses, and the middle of a text of more than ``LONGEST`` characters is left out.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"
    text = PASSWORD.sub("***@", text)
    return "".join(map(_escape_char, text))


def _escape_char(char: str) -> str:
    if char.isprintable():
        return char
    if char in "\t\n\r":
        return " "
    return char.encode("unicode_escape").decode()


def suggest_nearest(word: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the option closest to ``word``, or the empty string."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    if not found:
        return ""
    return f" Did you mean {found[0]!r}?"
