"""Record how far a run has come, as a checkpoint stores it beside the session's state. Imports no torch.

The dataclasses are the schema: ``to_json`` writes their fields, and ``read_progress`` checks a stored record
against their types.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ..config.plugin_records import PluginRecord
from ..errors import ConfigError
from ..system import safe
from ..system.hints import read_hints

Metrics = dict[str, Any]  # numbers by name; ``None`` for one that was not finite
# Keys that the first checkpoints lack.
ABSENT_AT_FIRST = {
    "spent",
    "over",
    "watch",
    "memory",
    "threads",
    "processes",
    "config",
    "plugins",
    "references",
}
LIMITS = {"threads": 2**10, "processes": 2**20}
LIMIT_OF_BATCH = 2**31
# One halving of the micro-batch: the step (from 1), and the sizes in examples before and after.
Halving = TypedDict("Halving", {"step": int, "from": int, "to": int})


@dataclass
class BatchRecord:
    """Sizes of the batches, in examples, and each time that the micro-batch was halved for lack of memory.

    ``micro_batch_size``: ``None`` for the whole batch in one pass.
    """

    batch_size: int
    micro_batch_size: int | None = None
    out_of_memory: list[Halving] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values, for checkpoints and for ``batch`` in ``result.json``."""
        return dataclasses.asdict(self)


@dataclass
class WatchRecord:
    """Observations of the watchdog that it needs after a resume; see ``training/watchdog.py``.

    ``seen``: steps since the phase began. ``losses``, ``norms``: logarithms of the last values. ``first``:
    the loss near the start. ``dead``: steps in a row with a gradient of 0. ``still``: a checksum of each part
    that has not moved yet. ``said``: kinds of warnings given so far; ``warnings``: their texts.
    """

    phase: int | None = None
    seen: int = 0
    first: float | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    dead: int = 0
    still: dict[str, int] | None = None
    said: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class ProgressRecord:
    """Progress of a run up to its last step.

    ``best``: the sort key of the best validation so far, ``best_step`` its step, ``best_stage`` its phase and
    whether the phase's target was met, ``val`` its metrics. ``base``, ``base_retention``: metrics of the
    model before training. ``seconds``: the duration of each step; ``spent``: of the whole loop. ``over``:
    whether the run ended before ``train.steps``. ``config``: the settings that decide the result.
    ``plugins``: the plug-ins that the last steps were made with.
    ``references``: the fingerprint of each model that the objective compares with, by its path.
    """

    best: list[float] | None = None
    best_step: int | None = None
    best_stage: list[int] | None = None
    val: Metrics | None = None
    base: Metrics | None = field(default_factory=dict)
    base_retention: Metrics | None = None
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0
    over: bool = False
    watch: WatchRecord = field(default_factory=WatchRecord)
    memory: BatchRecord | None = None
    threads: int = 1
    processes: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    plugins: list[PluginRecord] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values, without ``plugins`` and ``references`` if the run has none.

        ``best`` becomes text, since JSON has no NaN and no infinity.
        """
        plain = dataclasses.asdict(self)
        for name in ("plugins", "references"):
            if not plain[name]:
                del plain[name]
        if self.best is not None:
            plain["best"] = [repr(number) for number in self.best]
        return plain


def read_progress(
    folder: Path, stored: dict[str, Any], current: ProgressRecord | None = None
) -> ProgressRecord:
    """Decode the record in the checkpoint ``folder``; what an old one lacks is taken from ``current``.

    Raises ``ConfigError`` if ``stored`` is not such a record.
    """
    values = vars(current or ProgressRecord()).copy()
    try:
        _check(stored)
        for name in values.keys() & stored.keys():
            values[name] = stored[name]
        if stored["best"] is not None:
            values["best"] = [float(number) for number in stored["best"]]
        if "watch" in stored:
            values["watch"] = _build(WatchRecord, stored["watch"])
        if stored.get("memory") is not None:
            values["memory"] = _build(BatchRecord, stored["memory"])
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'state.json'} is not a state of a run ({error}). "
            "Resume from another checkpoint, or train again."
        ) from error
    return ProgressRecord(**values)


def _check(stored: dict[str, Any]) -> None:
    """Raise ``Unsafe`` where ``stored`` does not fit the schema, or holds a number out of range."""
    schema = _schema(ProgressRecord, ABSENT_AT_FIRST)
    schema["best"] = ([str | float], type(None))
    if fault := safe.find_mismatch(stored, schema):
        raise safe.Unsafe(fault)
    for name, most in LIMITS.items():
        _check_count(name, stored.get(name), most)
    for name in ("batch_size", "micro_batch_size"):
        _check_count(name, (stored.get("memory") or {}).get(name), LIMIT_OF_BATCH)
    missing = [stored[name] is None for name in ("best", "best_step", "best_stage")]
    if any(missing) and not all(missing):
        raise safe.Unsafe("of best, best_step and best_stage some are null and some are not")


def _check_count(name: str, count: int | None, most: int) -> None:
    if count is not None and not 1 <= count <= most:
        raise safe.Unsafe(f"{name} is {count}")


def _build(kind: type[Any], stored: dict[str, Any]) -> Any:
    known = {}
    for one in dataclasses.fields(kind):
        known[one.name] = stored[one.name]
    return kind(**known)


def _schema(kind: type, optional: set[str] | None = None) -> dict[str, Any]:
    """Describe a dataclass or ``TypedDict`` for ``safe.find_mismatch``; ``optional`` keys may be absent."""
    schema = {}
    for name, hint in read_hints(kind).items():
        key = f"{name}?" if optional and name in optional else name
        schema[key] = _form(hint)
    return schema


def _form(hint: Any) -> Any:
    """Describe a type for ``safe.find_mismatch``: a container by its items, a dataclass by its fields."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _schema(typing.cast(type, hint))
    if hint is Any:
        return object
    if origin is list:
        return [_form(arguments[0])]
    if origin is dict:
        return {str: _form(arguments[1])}
    if origin in (types.UnionType, typing.Union):
        forms = tuple(_form(argument) for argument in arguments)
        simple = all(isinstance(form, type) for form in forms)
        return hint if simple else forms
    return hint
