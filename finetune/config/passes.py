"""Read the words of a command that runs a pass: its settings, and those of the data set to calibrate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .load import load
from .named import read_named

PATHS = {"model": "a folder, a hub id or builtin:NAME", "out": "a folder to write"}
NUMBERS = {"calibration": 1, "seed": 0}  # whole numbers of every command, each with its smallest value


@dataclass(frozen=True)
class PassWords:
    """What the words say. ``numbers``: those of ``NUMBERS`` that were given."""

    method: Any
    model: str
    out: Path
    dataset: Any
    numbers: dict[str, int]


def read_words(verb: str, words: Sequence[str], config_dir: Path | None = None) -> PassWords:
    """Return what the words of the command ``verb`` say; raise ``ConfigError`` with every fault."""
    of_dataset: list[str] = []
    of_method: list[str] = []
    given: dict[str, str] = {}
    faults: list[str] = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign and (key in PATHS or key in NUMBERS):
            if key in given:
                faults.append(f"{word}: {key} is given twice. Give it once.")
            given[key] = value
        elif word.startswith(("dataset=", "dataset.")):
            of_dataset.append(word)
        else:
            of_method.append(word)
    for key, meaning in PATHS.items():
        if not given.get(key):
            faults.append(f"{verb} needs one {key}=..., {meaning}.")
    numbers, found = _read_numbers(given)
    faults += found
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
        faults += method.faults(())
        faults += _find_misuse(verb, method, numbers)
    if faults:
        raise ConfigError(*faults)
    return PassWords(method, given["model"], Path(given["out"]), dataset, numbers)


def _read_numbers(given: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
    """Return the whole numbers among the given values, and the faults."""
    numbers: dict[str, int] = {}
    faults = []
    for key, smallest in NUMBERS.items():
        text = given.get(key)
        if text is None:
            continue
        if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= smallest:
            numbers[key] = int(text)
        else:
            faults.append(f"{key}={text} should be a whole number of at least {smallest}.")
    return numbers, faults


def _find_misuse(verb: str, method: Any, numbers: Mapping[str, int]) -> list[str]:
    """Return a fault if another command runs the pass, and for each number that it does not use."""
    if method.verb != verb:
        return [f"method={method.name} is run by `finetune {method.verb}`, not by {verb}."]
    if method.needs:
        return []
    found = []
    for key, number in numbers.items():
        found.append(
            f"{key}={number} has no effect with method={method.name}, which needs no data. Remove it."
        )
    return found
