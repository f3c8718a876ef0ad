"""Read the words of a command that runs a pass: its settings, and those of the data set to calibrate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .load import load
from .named import read_named
from .words import OUT, sort_words

NEEDED = {"model": "model=PATH, a folder, a hub id or builtin:NAME", "out": OUT}
SEVERAL = {"runs": "RUN1,RUN2", "head": "RUN"}  # for passes over several models
NUMBERS = {"calibration": 1, "seed": 0}  # whole numbers of every command, each with its smallest value


@dataclass(frozen=True)
class PassWords:
    """What the words say, and what is wrong with them.

    ``method`` and ``dataset`` are None if they are not named or wrong; ``model`` and ``out`` are "" if they
    are not named. ``names_dataset``: a word is about a data set, right or wrong. ``numbers``: those of
    ``NUMBERS`` that were given.
    """

    method: Any
    model: str
    out: str
    dataset: Any
    names_dataset: bool
    numbers: dict[str, int]
    runs: tuple[Path, ...]
    head: Path | None
    faults: list[str]


def read_words(verb: str, words: Sequence[str], config_dir: Path | None = None) -> PassWords:
    """Return what the words of the command ``verb`` say, and every fault."""
    found = sort_words(verb, words, NEEDED, (*NUMBERS, *SEVERAL))
    faults = list(found.faults)
    of_dataset: list[str] = []
    of_method: list[str] = []
    for word in found.rest:
        if word.startswith("model."):
            faults.append(f"{word}: {verb} takes the model as model=PATH. Leave this word out.")
            continue
        kind = of_dataset if word.startswith(("dataset=", "dataset.")) else of_method
        kind.append(word)
    numbers, wrong = _read_numbers(found.given)
    faults += wrong
    method, dataset = None, None
    try:
        method = read_named("pass", "method", of_method, config_dir)
    except ConfigError as error:
        faults += error.faults
    try:
        if of_dataset:
            dataset = load(of_dataset, config_dir).dataset
    except ConfigError as error:
        faults += error.faults
    if method:
        faults += method.faults(()) + _find_misuse(verb, method, numbers, found.given)
    model, out = found.given.get("model", ""), found.given.get("out", "")
    runs, head = _read_paths(found.given.get("runs", "")), found.given.get("head")
    return PassWords(
        method, model, out, dataset, bool(of_dataset), numbers, runs, Path(head) if head else None, faults
    )


def _read_paths(text: str) -> tuple[Path, ...]:
    """Return the paths of a list ``a,b``; a path with a comma stands alone."""
    if not text:
        return ()
    if Path(text).exists():
        return (Path(text),)
    return tuple(Path(path) for path in text.split(",") if path)


def _read_numbers(given: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
    """Return the whole numbers among the given values, and the faults."""
    numbers: dict[str, int] = {}
    faults = []
    for key, smallest in NUMBERS.items():
        text = given.get(key)
        if not text:
            continue
        if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= smallest:
            numbers[key] = int(text)
        else:
            faults.append(f"{key}={text} should be a whole number of at least {smallest}.")
    return numbers, faults


def _find_misuse(verb: str, method: Any, numbers: Mapping[str, int], given: Mapping[str, str]) -> list[str]:
    """Return a fault if another command runs the pass, and for each word that it does not use."""
    if method.verb != verb:
        return [f"method={method.name} is run by `finetune {method.verb}`, not by {verb}."]
    found = []
    for key in SEVERAL:
        if method.models == "one" and given.get(key):
            found.append(
                f"{key}={given[key]} has no effect with method={method.name}, which works on one model. "
                "Remove it."
            )
    if method.needs:
        return found
    for key, number in numbers.items():
        found.append(
            f"{key}={number} has no effect with method={method.name}, which needs no data. Remove it."
        )
    return found
