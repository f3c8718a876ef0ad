"""Tune one setting by the same number of trials for every configuration of a grid, on validation alone.

The trials of a configuration run on the first of its seeds, in ``outputs/NAME/trials``; then all its seeds
run with the value that did best. Each of these runs has a ``tuning.json`` that lists the trials. Test
results are never read.
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
STEP = math.sqrt(10)  # factor between neighbouring values around the default
Say = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What ``tune=KEY`` or ``tune=KEY:LOW:HIGH`` asks for.

    Without limits the values lie around each configuration's own value.
    """

    key: str
    low: float | None = None
    high: float | None = None

    def values(self, center: Any, trials: int) -> list[float]:
        """Return ``trials`` ascending values, equally far apart on a log scale. Raises ``ConfigError``."""
        is_number = isinstance(center, int | float) and not isinstance(center, bool)
        whole = is_number and isinstance(center, int)
        if self.low is None or self.high is None:
            if not is_number or center <= 0:
                raise ConfigError(
                    f"tune={self.key}: its value is {center}, which has no logarithm. Give limits: "
                    f"tune={self.key}:1e-4:1e-2."
                )
            exact = [center * STEP ** (i - trials // 2) for i in range(trials)]
        else:
            parts = [i / (trials - 1) for i in range(trials)] if trials > 1 else [0.5]
            exact = [self.low * (self.high / self.low) ** part for part in parts]
        found: list[float] = []
        for value in exact:
            found.append(max(1, round(value)) if whole else float(f"{value:.3g}"))
        if len(set(found)) < trials:
            raise ConfigError(
                f"tune={self.key} takes whole numbers only, too few for {trials} trials here. Give wider "
                "limits, or fewer --trials."
            )
        return found


def parse(text: str) -> Request:
    """Parse ``KEY`` or ``KEY:LOW:HIGH``. Raises ``ConfigError``."""
    key, *limits = text.split(":")
    example = "Write tune=optimizer.lr or, with limits, tune=optimizer.lr:1e-4:1e-2."
    if not key or len(limits) not in (0, 2):
        raise ConfigError(f"tune={text} cannot be read. {example}")
    if not limits:
        return Request(key)
    try:
        low, high = float(limits[0]), float(limits[1])
    except ValueError:
        raise ConfigError(f"tune={text}: the limits are not numbers. {example}") from None
    if not 0 < low < high < math.inf:
        raise ConfigError(f"tune={text}: the limits must be above 0, the lower one first. {example}")
    return Request(key, low, high)


@dataclass(frozen=True)
class Group:
    """The points of one configuration, which differ in their seed, and the trials, each with its value.

    The trials run on the seed of the first point.
    """

    points: list[Point]
    trials: list[tuple[float, Point]]


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and by which trials. ``settle`` takes their results."""

    points: list[Point]
    request: Request
    groups: list[Group]

    @property
    def trials(self) -> list[Point]:
        """All trials; they run like other points."""
        found = []
        for group in self.groups:
            found += [trial for _, trial in group.trials]
        return found

    def settle(self, results: Mapping[Path, Result], say: Say) -> list[Point]:
        """Return the points with the best value on validation, frozen, each with its ``tuning.json``.

        A configuration whose trials all failed keeps its own value.
        """
        tuned: dict[int, Point] = {}
        for group in self.groups:
            content = self._content(group, results)
            value = content["chosen"]
            note = "" if best(content["tried"]) is not None else " (its own: all trials failed)"
            say(f"{group.points[0].label}: {self.request.key}={value!r}{note}")
            for point in group.points:
                changed = self._with_value(point, value)
                freeze([changed])
                write_json_atomic(changed.folder.path / "tuning.json", content)
                tuned[id(point)] = changed
        return [tuned[id(point)] for point in self.points]

    def foresee(self, results: Mapping[Path, Result]) -> tuple[list[Point], list[Point]]:
        """Return the points whose value is known, with that value, and the others as they are.

        A value is known when all its trials have results.
        """
        known: dict[int, Point] = {}
        for group in self.groups:
            if all(trial.folder.path in results for _, trial in group.trials):
                value = self._content(group, results)["chosen"]
                for point in group.points:
                    known[id(point)] = self._with_value(point, value)
        settled = [known[id(point)] for point in self.points if id(point) in known]
        return settled, [point for point in self.points if id(point) not in known]

    def _content(self, group: Group, results: Mapping[Path, Result]) -> dict[str, Any]:
        """Return the content of the ``tuning.json`` of a configuration."""
        tried = [_trial_row(value, results.get(trial.folder.path, {})) for value, trial in group.trials]
        chosen = best(tried)
        if chosen is None:
            chosen = _value(group.points[0].config, self.request.key)
        return {
            "format": FORMAT,
            "parameter": self.request.key,
            "trials": len(tried),
            "tried": tried,
            "chosen": chosen,
        }

    def _with_value(self, point: Point, value: Any) -> Point:
        return _with_config(point, _changed(point.config, self.request.key, value))


def plan(points: Sequence[Point], parameter: str, trials: int) -> Tuning:
    """Plan to tune ``parameter`` (as in ``tune=``) by ``trials`` for each configuration of ``points``.

    Raises ``ConfigError``.
    """
    request = parse(parameter)
    return Tuning(list(points), request, _groups(points, request, trials))


def best(rows: Sequence[dict[str, Any]]) -> Any:
    """Return the value whose trial did best on validation; ``None`` if no trial finished.

    If metrics are equal, the lower loss wins, then the smaller value.
    """
    finished = [row for row in rows if row["status"] == "finished" and main_metric(row["val"])]
    return min(finished, key=_order)["value"] if finished else None


def _order(row: dict[str, Any]) -> tuple[float, float]:
    """Return the sort key of a finished trial: the best comes first."""
    metric = main_metric(row["val"])
    assert metric is not None
    value = row["val"][metric.key]
    return -value if metric.higher_is_better else value, row["val"].get("loss") or 0.0


def _trial_row(value: float, result: Result) -> dict[str, Any]:
    """Return what ``tuning.json`` says of a trial; it has only the metrics on validation."""
    return {
        "value": value,
        "val": (result.get("metrics") or {}).get("val"),
        "status": result.get("status", "unfinished"),
    }


def _groups(points: Sequence[Point], request: Request, trials: int) -> list[Group]:
    """Group the points by configuration, and add the trials.

    Raises ``ConfigError`` with the faults of all trials.
    """
    by_rest: dict[str, dict[str, list[Point]]] = {}  # by all other settings, then by the value to tune
    for point in points:
        value = repr(_value(point.config, request.key))
        by_rest.setdefault(_rest(point.config, request.key), {}).setdefault(value, []).append(point)
    for values in by_rest.values():
        if len(values) > 1:
            raise ConfigError(
                f"tune={request.key}: the grid sets {request.key}={', '.join(values)}, too. "
                "Leave one of the two out."
            )
    faults: dict[str, None] = {}
    groups = []
    for values in by_rest.values():
        [members] = values.values()
        try:
            groups.append(Group(members, _trials(members[0], request, trials)))
        except ConfigError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise ConfigError(*faults)
    return groups


def _trials(point: Point, request: Request, trials: int) -> list[tuple[float, Point]]:
    """Return the values to try for ``point``, each with its run."""
    found = []
    for value in request.values(_value(point.config, request.key), trials):
        changed = _changed(point.config, request.key, value)
        trial = _with_config(point, replace(changed, name=f"{changed.name}/{TRIALS}"))
        found.append((value, replace(trial, label=f"{point.label} {request.key}={value!r}")))
    return found


def _with_config(point: Point, config: Config) -> Point:
    """Return ``point`` with another configuration, in the folder of that configuration."""
    path = run_folder(replace(config, run=None))
    return replace(point, config=replace(config, run=path.name), folder=RunFolder(path))


def _value(config: Config, key: str) -> Any:
    """Return the value of a setting. Raises ``ConfigError`` if there is none."""
    value: Any = config.as_dict()
    for step in key.split("."):
        if not isinstance(value, dict) or step not in value:
            raise ConfigError(
                f"tune={key}: method={config.method.name} has no such setting. Write tune=optimizer.lr, for "
                "example."
            )
        value = value[step]
    return value


def _changed(config: Config, key: str, value: Any) -> Config:
    """Return ``config`` with another value of a setting. Raises ``ConfigError`` if it is not allowed."""
    tree = config.as_dict()
    _parent(tree, key)[key.rpartition(".")[2]] = value
    return strict.build(strict.Composed(tree, {key: f"tune={key}"}))


def _rest(config: Config, key: str) -> str:
    """Return, as text, all settings that can change the result, except the seed and ``key``."""
    tree = {name: part for name, part in config.deciding().items() if name != "seed"}
    _parent(tree, key).pop(key.rpartition(".")[2])
    return json.dumps(tree, sort_keys=True)


def _parent(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping in ``tree`` that holds the last component of a dotted ``key``."""
    for step in key.split(".")[:-1]:
        tree = tree[step]
    return tree
