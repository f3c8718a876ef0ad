"""The command that runs the frozen configurations of a row again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from .rows import REPEATS, plain
from .runs import Run

CHOICES = {
    "method": "method.name",
    "schedule": "method.schedule.name",
    "selector": "selector.name",
    "model": "model.name",
}
CHOICES |= {"dataset": "dataset.name", "optimizer": "optimizer.name"}
PLAIN = re.compile(r"[A-Za-z_/][\w./:-]*")
WORDS = {"null", "true", "false", "nan", "inf"}
Defaults = Callable[[Sequence[str]], Mapping[str, Any]]


def command(runs: Sequence[Run], defaults: Defaults | None = None) -> str:
    """What makes ``runs`` again: ``finetune sweep`` over their seeds, ``finetune train`` for one; several in turn where they differ in settings, too.

    Told is every setting that differs from what ``defaults`` gives for the chosen parts (all, without it).
    """
    found = []
    for alike in _alike(runs, REPEATS):
        whole = prod(map(len, _repeated(alike).values())) == len(alike)  # every seed with every split
        found += [_command(part, defaults) for part in ([alike] if whole else _alike(alike))]
    return " && ".join(found)


def _alike(runs: Sequence[Run], but: Sequence[str] = ()) -> list[list[Run]]:
    """The runs by their settings, but for some of these."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(
            plain({key: value for key, value in run.settings.items() if key not in but}), []
        ).append(run)
    return list(found.values())


def _repeated(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The different seeds and splits of runs that are alike in all else."""
    told: dict[str, list[Any]] = {
        key: [run.settings[key] for run in runs if key in run.settings] for key in REPEATS
    }
    told["seed"] = [run.seed for run in runs if run.seed is not None] or [0]
    return {
        key: list({plain(value): value for value in values}.values())
        for key, values in told.items()
        if values
    }


def _command(runs: Sequence[Run], defaults: Defaults | None) -> str:
    settings = runs[0].settings | _threads(runs)
    choices = [
        f"{group}={_text(settings[key])}" for group, key in CHOICES.items() if settings.get(key) is not None
    ]
    paths = [
        key
        for key in ("model.path", "dataset.path")
        if not str(settings.get(key) or "builtin:").startswith("builtin:")
    ]
    choices += [f"{key}={_text(settings[key])}" for key in paths]  # which have no default
    try:
        known = dict(defaults(choices)) if defaults else {}
    except Exception:  # a part of the user's own, which only their folder has
        known = {}
    values = {
        key: [value] for key, value in settings.items() if key not in (*CHOICES.values(), *paths)
    } | _repeated(runs)
    known.pop("seed", None)
    rest = [
        f"{key}={','.join(map(_text, found))}"
        for key, found in values.items()
        if key not in known or [known[key]] != found
    ]
    return shlex.join(["finetune", "sweep" if len(runs) > 1 else "train", *choices, *rest])


def _threads(runs: Sequence[Run]) -> dict[str, Any]:
    """As many as all of these runs had, where their settings leave that open: another number gives other last bits."""
    (processes, threads), *others = {(run.number("processes") or 1, run.number("threads")) for run in runs}
    agreed = not others and processes == 1 and threads
    return {"train.threads": threads} if agreed and runs[0].settings.get("train.threads") is None else {}


def _text(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in WORDS:
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if value else "''"
    if isinstance(value, list):
        return f"[{','.join(_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(str(key))}:{_text(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
