"""Sort the words of a command: ``KEY=VALUE`` for the keys that it has, and all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUT = "out=DIR, a folder to write"


@dataclass(frozen=True)
class SortedWords:
    """``given``: the value of each key. ``rest``: the words of no key, in their order."""

    given: dict[str, str]
    rest: list[str]
    faults: list[str]


def sort_words(
    command: str, words: Sequence[str], needed: Mapping[str, str], optional: Sequence[str] = ()
) -> SortedWords:
    """Take the words ``KEY=VALUE`` of a command's keys out of ``words``.

    ``needed``: what is missing, in words, by key, for each key that must be given. Faults are keys that are
    given twice, that have no value, or that are missing.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    faults: list[str] = []
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or (key not in needed and key not in optional):
            rest.append(word)
            continue
        if key in given:
            faults.append(f"{word}: {key} is given twice. Give it once.")
        elif not value and key in optional:
            faults.append(f"{word} has no value. Give one, or leave it out.")
        given[key] = value
    for key, meaning in needed.items():
        if not given.get(key):
            faults.append(f"{command} needs one {meaning}.")
    return SortedWords(given, rest, faults)
