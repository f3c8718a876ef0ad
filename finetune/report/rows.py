"""Group runs into the rows of a comparison: choose the settings that tell rows apart, and name the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config.plugin_records import PluginRecord
from ..errors import ConfigError, make_printable, suggest_nearest
from .runs import Run

REPEATS = ("dataset.split_seed", "dataset.fold")  # like the seed, they repeat an experiment
FIRST = (
    "method.name",
    "selector.name",
    "model.name",
    "optimizer.name",
    "method.schedule.name",
    "method.sparsity",
)  # settings that come first, in this order, in the labels of rows
Block = tuple[Any, ...]  # identifies one repetition: seed, split seed, fold, settings that the row pools


@dataclass
class Row:
    """Runs of one configuration.

    ``by`` holds the compared settings. ``pooled`` names the other settings in which runs of a row differ.
    """

    label: str
    by: dict[str, Any]
    runs: list[Run]
    pooled: tuple[str, ...] = ()

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that have a result, sorted by seed."""
        done = [run for run in self.runs if run.status == "finished"]
        return sorted(done, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))

    @cached_property
    def blocks(self) -> dict[Block, Run]:
        """The finished runs by ``Block``, so that equal repetitions of two rows can be paired."""
        found: dict[Block, Run] = {}
        for run in self.finished:
            block: list[Any] = [run.seed]
            for key in (*REPEATS, *self.pooled):
                block.append(encode_value(run.settings.get(key)))
            found[tuple(block)] = run
        return found

    @cached_property
    def known_settings(self) -> list[Mapping[str, Any]]:
        """The different settings of the runs whose configuration could be read."""
        return list_settings(self.runs)

    @cached_property
    def plugins(self) -> list[PluginRecord]:
        """The different plug-ins that the runs use; one whose code changed between runs is there twice."""
        return list({record["sha256"]: record for run in self.runs for record in run.plugins}.values())

    def show_values(self, key: str) -> list[str]:
        """Return the different values of a setting in this row as text, in order."""
        found = {}
        for settings in self.known_settings:
            value = settings.get(key)
            found[encode_value(value)] = show_value(value)
        return [found[text] for text in sorted(found)]


def encode_value(value: Any) -> str:
    """Return a setting's value as text that differs for different values and can be a dictionary key."""
    return "null" if value is None else json.dumps(value, sort_keys=True, default=str)


def encode_values(settings: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    """Return the values of several settings as a dictionary key; a missing setting counts as null."""
    return tuple(encode_value(settings.get(key)) for key in keys)


def list_settings(runs: Iterable[Run]) -> list[Mapping[str, Any]]:
    """Return the settings of the runs whose configuration could be read.

    Runs of one group share a settings object. It is returned once, which makes comparing 1,000 runs quick.
    """
    return list({id(run.settings): run.settings for run in runs if run.settings_complete}.values())


def find_varying(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between ``settings``; a key that only some have differs, too."""
    counts: dict[str, int] = {}
    values: dict[str, set[str]] = {}
    total = 0
    for one in settings:
        total += 1
        for key, value in one.items():
            counts[key] = counts.get(key, 0) + 1
            values.setdefault(key, set()).add(encode_value(value))
    return [key for key, found in values.items() if len(found) > 1 or counts[key] < total]


def find_tuned(runs: Iterable[Run]) -> set[str]:
    """Return the settings that were tuned on validation for at least one run."""
    return {str(run.tuning["parameter"]) for run in runs if run.tuning}


def choose_keys(runs: Sequence[Run], wanted: Sequence[str] = ()) -> list[str]:
    """Return the settings that tell rows apart.

    These are the ``wanted`` ones, or all that differ between the runs and are not determined by others. A
    tuned setting is among them only if a configuration has several runs with the same seed.

    Raises ``ConfigError`` naming every word of ``wanted`` that is not a setting.
    """
    known = list_settings(runs) or [run.settings for run in runs]
    if wanted:
        keys: dict[str, None] = {}
        for settings in known:
            keys |= dict.fromkeys(settings)
        return _find_wanted(wanted, list(keys))
    left_out = {*REPEATS, *find_tuned(runs)}
    chosen: list[str] = []
    for key in sorted(find_varying(known), key=_rank_key):
        if key not in left_out and not _is_determined(key, chosen, known):
            chosen.append(key)
    return [*chosen, *find_retuned(runs, chosen)] or ["method.name"]


def _rank_key(key: str) -> tuple[int, bool, str]:
    """Sort ``FIRST`` to the front, then names before other settings, then by group."""
    place = FIRST.index(key) if key in FIRST else len(FIRST)
    return place, not key.endswith(".name"), key.split(".")[0]


def find_retuned(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    """Return the tuned settings in which runs differ although their seed and ``keys`` agree.

    Such a configuration was tuned more than once, or was also run untuned.
    """
    known = [run.settings | {"seed": run.seed} for run in runs if run.settings_complete]
    given = ["seed", *REPEATS, *keys]
    return [key for key in sorted(find_tuned(runs)) if not _is_determined(key, given, known)]


def _is_determined(key: str, by: Sequence[str], settings: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether the values of ``by`` determine the value of ``key``."""
    seen: dict[tuple[str, ...], str] = {}
    for one in settings:
        value = encode_value(one.get(key))
        if seen.setdefault(encode_values(one, by), value) != value:
            return False
    return True


def _find_wanted(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the setting that each word of ``--by`` means."""
    found: dict[str, None] = {}
    faults = []
    for word in words:
        options = [key for key in (word, f"{word}.name", f"method.{word}") if key in keys]
        if not options:
            options = [key for key in keys if key.endswith(f".{word}")]
        if word == "seed" or word in REPEATS:
            faults.append(
                f"--by {word}: a row is the mean over its repetitions, so {word} cannot tell rows apart. "
                "Give settings, such as --by method,sparsity."
            )
        elif word in options or len(options) == 1:
            found[options[0]] = None
        elif options:
            faults.append(f"--by {word} could mean {', '.join(options)}. Give one of them.")
        else:
            names = list(map(short_name, keys))
            hint = suggest_nearest(word, names)
            faults.append(f"--by {word} is not a setting of these runs.{hint} Settings: {', '.join(names)}.")
    if faults:
        raise ConfigError(*faults)
    return list(found)


def short_name(key: str) -> str:
    """Return a setting as people write it: ``method`` for ``method.name``, ``sparsity``."""
    if key == "method.sparsity":
        return "sparsity"
    return key.removesuffix(".name")


def show_value(value: Any) -> str:
    """Return the value of a setting as one printable line."""
    if isinstance(value, str):
        return make_printable(value)
    return make_printable(json.dumps(value, default=str))


def make_label(by: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return a label such as ``lora rank=8``.

    Choices stand as their name, other settings as ``setting=value``; a setting that the method lacks is left
    out.
    """
    words = []
    for key in keys:
        value = by[short_name(key)]
        if value is None:
            continue
        if key.endswith(".name"):
            words.append(show_value(value))
        else:
            words.append(f"{short_name(key).removeprefix('method.')}={show_value(value)}")
    if not words:
        words = [f"no {short_name(key)}" for key in keys]
    return " ".join(words)


def _name_rows(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Give each row its label.

    A setting of a method, other than its sparsity, is part of a label only if rows with the same choices
    differ in it.
    """
    choices = [short_name(key) for key in keys if key.endswith(".name")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(encode_values(row.by, choices), []).append(row)
    for group in groups.values():
        named = [key for key in keys if _is_named(key, group)]
        for row in group:
            row.label = make_label(row.by, named or keys)


def _is_named(key: str, rows: Sequence[Row]) -> bool:
    """Tell whether the labels of rows with the same choices name ``key``."""
    if key.endswith(".name") or not key.startswith("method.") or key == "method.sparsity":
        return True
    return len({encode_value(row.by[short_name(key)]) for row in rows}) > 1


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> list[Row]:
    """Return one row for all runs with the same values of ``keys``, in order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for run in runs:
        values = {short_name(key): run.settings.get(key) for key in keys}
        row = found.setdefault(encode_values(run.settings, keys), Row("", values, []))
        row.runs.append(run)
    rows = list(found.values())
    _name_rows(rows, keys)
    pooled: set[str] = set()
    for row in rows:
        pooled.update(find_varying(row.known_settings))
    pooled -= {*keys, *REPEATS, *find_tuned(runs)}
    pooled.update(find_retuned(runs, [*keys, *pooled]))
    for row in rows:
        row.pooled = tuple(sorted(pooled))
    return rows
