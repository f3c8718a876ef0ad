"""The same number of trials of one setting for every configuration of a grid, judged on validation alone.

The trials of a configuration run on the first of its seeds, in ``outputs/NAME/trials``; then all its seeds run with the value that did best. Each of
these runs has a ``tuning.json`` that says what was tried. Test results play no part: nothing here reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import strict
from ..config.settings import Config
from ..errors import ConfigError
from ..report.metric import main_metric
from ..storage.atomic import write_json_atomic
from ..storage.run_folder import TRIALS, RunFolder, run_folder
from .grid import Point, freeze

FORMAT = 1
STEP = math.sqrt(10)  # between neighbouring values around the default
Say = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What ``tune=KEY`` or ``tune=KEY:LOW:HIGH`` says; without limits the values lie around each configuration's own."""

    key: str
    low: float | None = None
    high: float | None = None

    def values(self, center: Any, trials: int) -> list[float]:
        """``trials`` values, equally far apart on a logarithmic scale, ascending. Raises ``ConfigError``."""
        whole = isinstance(center, int) and not isinstance(center, bool)
        if self.low is not None and self.high is not None:
            steps = [i / max(1, trials - 1) for i in range(trials)] if trials > 1 else [0.5]
            found = [self.low * (self.high / self.low) ** step for step in steps]
        else:
            if not isinstance(center, int | float) or isinstance(center, bool) or center <= 0:
                raise ConfigError(
                    f"tune={self.key}: its value is {center}, which has no logarithm. Give limits: tune={self.key}:1e-4:1e-2."
                )
            found = [center * STEP ** (i - trials // 2) for i in range(trials)]
        rounded: list[float] = [max(1, round(value)) if whole else float(f"{value:.3g}") for value in found]
        if len(set(rounded)) < trials:
            raise ConfigError(
                f"tune={self.key} takes whole numbers only, too few for {trials} trials here. Give wider limits, or fewer --trials."
            )
        return rounded


def parse(text: str) -> Asked:
    """``KEY`` or ``KEY:LOW:HIGH``. Raises ``ConfigError``."""
    key, *limits = text.split(":")
    example = "Write tune=optimizer.lr or, with limits, tune=optimizer.lr:1e-4:1e-2."
    if not key or len(limits) not in (0, 2):
        raise ConfigError(f"tune={text} cannot be read. {example}")
    try:
        low, high = map(float, limits) if limits else (None, None)
    except ValueError:
        raise ConfigError(f"tune={text}: the limits are not numbers. {example}") from None
    if low is not None and high is not None and not 0 < low < high < math.inf:
        raise ConfigError(f"tune={text}: the limits must be above 0, the lower one first. {example}")
    return Asked(key, low, high)


@dataclass(frozen=True)
class _Group:
    """The points of one configuration, which differ in their seed, and the trials on the first of these."""

    points: list[Point]
    trials: list[tuple[float, Point]]


@dataclass(frozen=True)
class Tuning:
    """What is tuned, by which trials; ``settled`` takes what became of them."""

    points: list[Point]
    asked: Asked
    groups: list[_Group]

    @property
    def tried(self) -> list[Point]:
        """All trials, which are runs like others."""
        return [trial for group in self.groups for _, trial in group.trials]

    def settled(self, results: Mapping[Path, Result], say: Say) -> list[Point]:
        """The points with the value that did best on validation, frozen, each with its ``tuning.json``.

        Where all trials of a configuration failed it keeps its own value.
        """
        final: dict[int, Point] = {}
        for group in self.groups:
            told = self._told(group, results)
            value = told["chosen"]
            say(
                f"{group.points[0].label}: {self.asked.key}={value!r}{' (its own: all trials failed)' if best(told['tried']) is None else ''}"
            )
            for point in group.points:
                final[id(point)] = self._with(point, value)
                freeze([final[id(point)]])
                write_json_atomic(final[id(point)].folder.path / "tuning.json", told)
        return [final[id(point)] for point in self.points]

    def foreseen(self, results: Mapping[Path, Result]) -> tuple[list[Point], list[Point]]:
        """The points whose value is known, since all their trials have results, with that value; and the others, as they are."""
        known: dict[int, Point] = {}
        for group in self.groups:
            if all(trial.folder.path in results for _, trial in group.trials):
                value = self._told(group, results)["chosen"]
                known |= {id(point): self._with(point, value) for point in group.points}
        return [known[id(point)] for point in self.points if id(point) in known], [
            point for point in self.points if id(point) not in known
        ]

    def _told(self, group: _Group, results: Mapping[Path, Result]) -> dict[str, Any]:
        """What ``tuning.json`` says of a configuration."""
        rows = [_row(value, results.get(trial.folder.path, {})) for value, trial in group.trials]
        chosen = best(rows)
        own = _value(group.points[0].config, self.asked.key)
        told = {"format": FORMAT, "parameter": self.asked.key, "trials": len(rows), "tried": rows}
        return told | {"chosen": own if chosen is None else chosen}

    def _with(self, point: Point, value: Any) -> Point:
        return _moved(point, _changed(point.config, self.asked.key, value))


def plan(points: Sequence[Point], parameter: str, trials: int) -> Tuning:
    """The tuning of ``parameter`` (as in ``tune=``) by so many ``trials`` for each configuration of ``points``. Raises ``ConfigError``."""
    asked = parse(parameter)
    return Tuning(list(points), asked, _groups(points, asked, trials))


def best(rows: Sequence[dict[str, Any]]) -> Any:
    """The value whose trial did best on validation, of equal metrics the one of lower loss, then the smaller; ``None`` if none finished."""

    def order(row: dict[str, Any]) -> tuple[float, float]:
        metric = main_metric(row["val"])
        assert metric is not None
        value = row["val"][metric.key]
        return -value if metric.higher_is_better else value, row["val"].get("loss") or 0.0

    able = [row for row in rows if row["status"] == "finished" and main_metric(row["val"])]
    return min(able, key=order)["value"] if able else None


def _row(value: float, result: Result) -> dict[str, Any]:
    """What is told of a trial; of its metrics only those on validation."""
    return {
        "value": value,
        "val": (result.get("metrics") or {}).get("val"),
        "status": result.get("status", "unfinished"),
    }


def _groups(points: Sequence[Point], asked: Asked, trials: int) -> list[_Group]:
    """The points by configuration, with their trials. Raises ``ConfigError`` with the faults of all trials."""
    by_rest: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        value = _value(point.config, asked.key)
        by_rest.setdefault(_rest(point.config, asked.key), {}).setdefault(repr(value), []).append(point)
    if twice := next((values for values in by_rest.values() if len(values) > 1), None):
        raise ConfigError(
            f"tune={asked.key}: the grid has {asked.key}={', '.join(twice)}, too. Leave one of the two out."
        )
    faults: dict[str, None] = {}
    groups = []
    for [(_, members)] in (values.items() for values in by_rest.values()):
        try:
            groups.append(_Group(members, _trials(members[0], asked, trials)))
        except ConfigError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise ConfigError(*faults)
    return groups


def _trials(point: Point, asked: Asked, trials: int) -> list[tuple[float, Point]]:
    """The values to try for ``point``, each with its run."""
    found = []
    for value in asked.values(_value(point.config, asked.key), trials):
        changed = _changed(point.config, asked.key, value)
        trial = _moved(point, replace(changed, name=f"{changed.name}/{TRIALS}"))
        found.append((value, replace(trial, label=f"{point.label} {asked.key}={value!r}")))
    return found


def _moved(point: Point, config: Config) -> Point:
    """``point`` with another configuration, in the folder that this gives it."""
    path = run_folder(replace(config, run=None))
    return replace(point, config=replace(config, run=path.name), folder=RunFolder(path))


def _value(config: Config, key: str) -> Any:
    """The value of a setting. Raises ``ConfigError`` where there is none."""
    value: Any = config.as_dict()
    for step in key.split("."):
        if not isinstance(value, dict) or step not in value:
            raise ConfigError(
                f"tune={key}: method={config.method.name} has no such setting. Write tune=optimizer.lr, for example."
            )
        value = value[step]
    return value


def _changed(config: Config, key: str, value: Any) -> Any:
    """``config`` with another value of a setting. Raises ``ConfigError`` where it is not allowed."""
    tree = config.as_dict()
    _holder(tree, key)[key.rpartition(".")[2]] = value
    return strict.build(strict.Composed(tree, {key: f"tune={key}"}))


def _rest(config: Config, key: str) -> str:
    """Everything that can change the result but the seed and the setting ``key``."""
    tree = {name: part for name, part in config.deciding().items() if name != "seed"}
    _holder(tree, key).pop(key.rpartition(".")[2])
    return json.dumps(tree, sort_keys=True)


def _holder(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping in ``tree`` that has the last step of a dotted ``key``."""
    for step in key.split(".")[:-1]:
        tree = tree[step]
    return tree
