"""Write the command line that runs the frozen configurations of a row again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from .. import registry
from .rows import REPEATS, encode_value
from .runs import Run

PATHS = ("model.path", "dataset.path")  # settings without a default, unless they name something built in
STREAM_NAME, STREAM_PATH = re.compile(r"streams\.[\w-]+\.name"), re.compile(r"streams\.[\w-]+\.path")
UNQUOTED = re.compile(r"[A-Za-z_/][\w./:-]*")  # texts that the grammar of overrides reads as they are
KEYWORDS = {"null", "true", "false", "nan", "inf"}  # texts that need quotes, or they become other values
Defaults = Callable[[Sequence[str]], Mapping[str, Any]]  # from overrides such as method=lora to all settings


def make_command(runs: Sequence[Run], defaults: Defaults | None = None) -> str:
    """Return the shell command that repeats ``runs``.

    It is ``finetune train`` for one run and ``finetune sweep`` over the seeds of several; runs that also
    differ in other settings get several commands joined by ``&&``. A setting is left out if it equals what
    ``defaults`` returns for the chosen configuration files; without ``defaults``, every setting is written.
    """
    commands = []
    for alike in _group_by_settings(runs, REPEATS):
        count = prod(len(values) for values in _find_repeats(alike).values())
        # A sweep runs every seed with every split, so it is one command only if all of these runs are there.
        parts = [alike] if count == len(alike) else _group_by_settings(alike)
        for part in parts:
            commands.append(_make_one(part, defaults))
    return " && ".join(commands)


def _group_by_settings(runs: Sequence[Run], ignored: Sequence[str] = ()) -> list[list[Run]]:
    """Group runs with the same settings; settings in ``ignored`` may differ within a group."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in ignored}
        groups.setdefault(encode_value(settings), []).append(run)
    return list(groups.values())


def _find_repeats(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the different seeds and splits of runs that are alike in all other settings."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for key in REPEATS:
            if key in run.settings:
                found.setdefault(key, {})[encode_value(run.settings[key])] = run.settings[key]
        if run.seed is not None:
            found.setdefault("seed", {})[encode_value(run.seed)] = run.seed
    found.setdefault("seed", {"0": 0})
    return {key: list(values.values()) for key, values in found.items()}


def _make_one(runs: Sequence[Run], defaults: Defaults | None) -> str:
    settings = runs[0].settings | _agreed_threads(runs)
    words, choices = [], registry.choices()
    for key in settings:
        if STREAM_NAME.fullmatch(key):
            choices[key.removesuffix(".name")] = key
    for group, key in choices.items():
        if settings.get(key) is not None:
            words.append(f"{group}={show_override(settings[key])}")
    paths = [key for key in PATHS if not str(settings.get(key) or "builtin:").startswith("builtin:")]
    paths += [key for key in settings if STREAM_PATH.fullmatch(key)]
    for key in paths:
        words.append(f"{key}={show_override(settings[key])}")
    known = _get_defaults(defaults, words)
    values = {}
    for key, value in settings.items():
        if key not in choices.values() and key not in paths:
            values[key] = [value]
    for key, found in (values | _find_repeats(runs)).items():
        if key not in known or [known[key]] != found:
            words.append(f"{key}={','.join(map(show_override, found))}")
    return shlex.join(["finetune", "sweep" if len(runs) > 1 else "train", *words])


def _get_defaults(defaults: Defaults | None, choices: Sequence[str]) -> dict[str, Any]:
    """Return the default of every setting but the seed; empty if the choices cannot be loaded here."""
    if defaults is None:
        return {}
    try:
        known = dict(defaults(choices))
    except Exception:  # a choice may name a configuration file of the user's that is not known here
        return {}
    known.pop("seed", None)
    return known


def _agreed_threads(runs: Sequence[Run]) -> dict[str, Any]:
    """Return ``train.threads`` if the settings leave it open and all runs used the same number.

    Another number of threads would add in another order and change the last bits.
    """
    if runs[0].settings.get("train.threads") is not None:
        return {}
    used = {(run.get_number("processes") or 1, run.get_number("threads")) for run in runs}
    processes, threads = used.pop()
    if used or processes != 1 or not threads:
        return {}
    return {"train.threads": threads}


def show_override(value: Any) -> str:
    """Return a value in the grammar of overrides."""
    if isinstance(value, str):
        return _show_text(value)
    if isinstance(value, list):
        return f"[{','.join(map(show_override, value))}]"
    if isinstance(value, dict):
        items = [f"{show_override(str(key))}:{show_override(item)}" for key, item in value.items()]
        return f"{{{','.join(items)}}}"
    return json.dumps(value)


def _show_text(value: str) -> str:
    if not value:
        return "''"
    if UNQUOTED.fullmatch(value) and value.lower() not in KEYWORDS:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
