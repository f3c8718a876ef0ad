"""Which runs make a row: the fields that are compared, and what is repeated within them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import ConfigError, near, visible
from .runs import Run

REPEATS = ("dataset.split_seed", "dataset.fold")  # like the seed, repetitions and no settings
FIRST = (
    "method.name",
    "selector.name",
    "model.name",
    "optimizer.name",
    "method.schedule.name",
    "method.sparsity",
)
Block = tuple[Any, ...]


@dataclass
class Row:
    """Runs of one configuration. ``blocks``: its finished runs by what repeats them, so that rows can be paired."""

    label: str
    by: dict[str, Any]
    runs: list[Run]
    inside: tuple[str, ...] = ()
    against: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def finished(self) -> list[Run]:
        """Those that have a result, by seed."""
        done = [run for run in self.runs if run.status == "finished"]
        return sorted(done, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))

    @cached_property
    def blocks(self) -> dict[Block, Run]:
        """The seed, the seed of the split, and whatever else differs inside the row."""
        return {
            (run.seed, *(plain(run.settings.get(key)) for key in (*REPEATS, *self.inside))): run
            for run in self.finished
        }

    def values(self, key: str) -> list[Any]:
        """The different values of a setting in this row, in order."""
        distinct = {id(run.settings): run.settings for run in self.runs if run.known}.values()
        found = {plain(settings.get(key)): settings.get(key) for settings in distinct}
        return [found[name] for name in sorted(found)]


def plain(value: Any) -> str:
    """A setting as text that tells values apart and can be a key."""
    return "null" if value is None else json.dumps(value, sort_keys=True, default=str)


def varying(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that differ between ``settings``, in their order; a key that is absent somewhere differs, too."""
    distinct = list({id(one): one for one in settings}.values())
    keys = dict.fromkeys(key for one in distinct for key in one)
    return [key for key in keys if len({plain(one[key]) if key in one else None for one in distinct}) > 1]


def tuned(runs: Iterable[Run]) -> set[str]:
    """The settings that were tuned on validation for some run."""
    return {str(run.tuning["parameter"]) for run in runs if run.tuning}


def axes(runs: Sequence[Run], wanted: Sequence[str] = ()) -> list[str]:
    """The keys that tell rows apart: ``wanted``, or all that differ but do not follow from others; tuned ones only if some seed would count twice.

    Raises ``ConfigError`` with every word of ``wanted`` that is no setting.
    """
    known = [run.settings for run in runs if run.known] or [run.settings for run in runs]
    if wanted:
        return _wanted(
            wanted,
            list(dict.fromkeys(key for one in {id(one): one for one in known}.values() for key in one)),
        )
    differ = [key for key in varying(known) if key not in REPEATS and key not in tuned(runs)]
    chosen: list[str] = []
    for key in sorted(
        differ,
        key=lambda key: (
            FIRST.index(key) if key in FIRST else len(FIRST),
            not key.endswith(".name"),
            key.split(".")[0],
        ),
    ):
        if not _follows(key, chosen, known):
            chosen.append(key)
    return [*chosen, *retuned(runs, chosen)] or ["method.name"]


def retuned(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    """The tuned settings in which runs of one seed differ though ``keys`` agree: that configuration was tuned more than once, or also run untuned."""
    known = [run.settings | {"seed": run.seed} for run in runs if run.known]
    return [key for key in sorted(tuned(runs)) if not _follows(key, ["seed", *REPEATS, *keys], known)]


def _follows(key: str, chosen: Sequence[str], settings: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the values of ``chosen`` determine that of ``key``."""
    seen: dict[Any, str] = {}
    distinct = {id(one): one for one in settings}.values()
    return all(
        seen.setdefault(tuple(plain(one.get(c)) for c in chosen), plain(one.get(key))) == plain(one.get(key))
        for one in distinct
    )


def _wanted(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    found, faults = dict[str, None](), []
    for word in words:
        options = [key for key in (word, f"{word}.name", f"method.{word}") if key in keys] or [
            key for key in keys if key.endswith(f".{word}")
        ]
        if word == "seed" or word in REPEATS:
            faults.append(
                f"--by {word}: rows are means over it. Give settings, such as --by method,sparsity."
            )
        elif len(options) != 1 and word not in options:
            what = f"could be {', '.join(options)}" if options else "is no setting of these runs."
            faults.append(
                f"--by {word} {what}{near(word, [name(key) for key in keys])} Settings: {', '.join(name(key) for key in keys)}."
            )
        else:
            found[options[0]] = None
    if faults:
        raise ConfigError(*faults)
    return list(found)


def name(key: str) -> str:
    """How people write a setting: ``method`` for ``method.name``, ``sparsity`` for ``method.sparsity``."""
    return "sparsity" if key == "method.sparsity" else key.removesuffix(".name")


def shown(value: Any) -> str:
    """A value of a setting in words."""
    return visible(value if isinstance(value, str) else json.dumps(value, default=str))


def label(by: Mapping[str, Any], keys: Sequence[str]) -> str:
    """``lora rank=8``: choices by their name, values with theirs; what a method lacks is left out."""
    told = {key: shown(by[name(key)]) for key in keys if by[name(key)] is not None}
    words = [
        value if key.endswith(".name") else f"{name(key).removeprefix('method.')}={value}"
        for key, value in told.items()
    ]
    return " ".join(words) or " ".join(f"no {name(key)}" for key in keys)


def labels(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """One for each row. Settings of a method are told only where rows of the same choices differ in them, the sparsity always."""
    choices = [key for key in keys if key.endswith(".name")]
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for by in rows:
        alike.setdefault(plain([by[name(key)] for key in choices]), []).append(by)
    told = {
        which: [
            k
            for k in keys
            if k in choices
            or not k.startswith("method.")
            or k == "method.sparsity"
            or len({plain(by[name(k)]) for by in of}) > 1
        ]
        for which, of in alike.items()
    }
    return [label(by, told[plain([by[name(key)] for key in choices])] or keys) for by in rows]


def group(runs: Sequence[Run], keys: Sequence[str]) -> list[Row]:
    """One row for all runs with the same values of ``keys``, in order of first appearance."""
    rows: dict[tuple[str, ...], Row] = {}
    for run in runs:
        values = {name(key): run.settings.get(key) for key in keys}
        rows.setdefault(tuple(plain(value) for value in values.values()), Row("", values, [])).runs.append(
            run
        )
    for row, words in zip(rows.values(), labels([row.by for row in rows.values()], keys), strict=True):
        row.label = words
    left_out = {*keys, *REPEATS, *tuned(runs)}
    inside = {
        key for row in rows.values() for key in varying(run.settings for run in row.runs if run.known)
    } - left_out
    inside |= set(retuned(runs, [*keys, *inside]))
    for row in rows.values():
        row.inside = tuple(sorted(inside))
    return list(rows.values())
