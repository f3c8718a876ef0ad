"""The command that runs a frozen configuration again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .runs import Run

CHOICES = {"method": "method.name", "schedule": "method.schedule.name", "selector": "selector.name", "model": "model.name"}
CHOICES |= {"dataset": "dataset.name", "optimizer": "optimizer.name"}
PLAIN = re.compile(r"[A-Za-z_/][\w./:-]*")
WORDS = {"null", "true", "false", "nan", "inf"}
Defaults = Callable[[Sequence[str]], Mapping[str, Any]]


def command(run: Run, defaults: Defaults | None = None) -> str:
    """``finetune train ...`` with every setting that differs from what ``defaults`` gives for the chosen parts (all, without it)."""
    choices = [f"{group}={_text(run.settings[key])}" for group, key in CHOICES.items() if run.settings.get(key) is not None]
    paths = [key for key in ("model.path", "dataset.path") if not str(run.settings.get(key) or "builtin:").startswith("builtin:")]
    choices += [f"{key}={_text(run.settings[key])}" for key in paths]  # which have no default
    try:
        known = dict(defaults(choices)) if defaults else {}
    except Exception:  # a part of the user's own, which only their folder has
        known = {}
    left = {key: value for key, value in run.settings.items() if key not in (*CHOICES.values(), *paths)}
    rest = [f"{key}={_text(value)}" for key, value in left.items() if key not in known or known[key] != value]
    return shlex.join(["finetune", "train", *choices, *rest, f"seed={run.seed if run.seed is not None else 0}"])


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
