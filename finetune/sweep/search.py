"""A search: trials that Optuna chooses one after the other, each a run of the sweep's folder, judged by its validation metric alone.

Optuna's storage is ``search.db`` in that folder, and ``search.json`` says the same for people. The same command goes on with a search that was ended,
and with more ``--trials`` it continues one that was done. With one job the same seed gives the same trials, however often the search was ended.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..launch.start import NO_OPTIONS, StartOptions
from ..report.metric import main_metric
from ..storage.atomic import write_json_atomic
from ..storage.result import make_result
from . import grid
from .grid import Point
from .lines import Lines
from .space import Dimension, fitting, space
from .status import announced, entry
from .watch import Board

FORMAT = 1
SILENT = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
Result = dict[str, Any]


def run(
    overrides: list[str], trials: int, name: str | None = None, jobs: int | None = 1, *, config_dir: Path | None = None,
    config_file: Path | None = None, attempts: int = 1, fail_fast: bool = False, board: Board | None = None, command: str = "",
    options: StartOptions = NO_OPTIONS,
) -> list[tuple[Point, Result]]:  # fmt: skip
    """Search until there are ``trials`` in all, those of earlier calls included, and return runs and results: finished ones first, the best first.

    A pruned trial has the status "pruned"; ``attempts`` and ``fail_fast`` are those of ``Pool``. Raises ``ConfigError`` with all faults before
    anything runs.
    """
    _check_installed()
    board = board or Board()
    default, words = grid.with_preset(overrides, config_dir)
    words = [*words, *([f"name={name}"] if name else [])]
    fixed, dimensions = space(words, config_dir, config_file)
    if not any(text.startswith("name=") for text in fixed):
        fixed.append(f"name={default.replace('sweep-', 'search-')}")
    search = Search(fixed, dimensions, config_dir, config_file)
    from .pool import Pool

    first = search.point([d.ends()[0] for d in dimensions])
    pool = Pool(
        jobs,
        board.say,
        look=board.look,
        attempts=attempts,
        fail_fast=fail_fast,
        options=options,
        gpus=[] if first.config.train.device == "cpu" else None,
    )
    folder = first.folder.path.parent
    with search.alone(folder):
        search.open(words, first.config.seed, pool.places > 1, trials)
        with announced(folder, search.entries(), words, pool.places, command) as search.announce:
            board.show(folder)
            pool.run(search.offered(), search.ended, search.verdict)
        return search.told()


def _check_installed() -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "--search optuna needs a package that is not installed: pip install 'finetune-bench[search]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class _Trial:
    """One trial under way: Optuna's own object, its run, and what of its metrics was looked at."""

    def __init__(self, own: Any, point: Point) -> None:
        self.own, self.point, self.pruned = own, point, ""
        self.lines = Lines(point.folder.metrics)
        self.seen = max(
            own.storage.get_trial(own._trial_id).intermediate_values, default=0
        )  # of an earlier process, which may not have judged it
        self.judged = not self.seen


class Search:
    """The points of a search, one after the other, and what becomes of them. ``open`` comes first."""

    folder: Path
    study: Any
    announce: Callable[[Sequence[Result]], None]

    def __init__(
        self, fixed: list[str], dimensions: list[Dimension], config_dir: Path | None, config_file: Path | None
    ) -> None:
        self.fixed, self.dimensions, self._place = fixed, dimensions, (config_dir, config_file)
        self._running: dict[int, _Trial] = {}  # by id of the point: two trials may be of one run

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Hold the folder, as the only search that works in it."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".search.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written: {error.strerror}. Start from a folder that you may write to."
            ) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{folder} is being searched by another process. Wait for it, or choose another name=."
                ) from None
            yield
        finally:
            os.close(handle)

    def open(self, words: list[str], seed: int, parallel: bool, trials: int) -> None:
        """Begin the study of the folder, or take it up. Raises ``ConfigError`` where it is another one."""
        import optuna

        self._seed, self._parallel, self._trials = seed, parallel, trials
        asked = sorted(text for text in words if not text.startswith("name="))
        file, pruner = self.folder / "search.db", optuna.pruners.MedianPruner()
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
            self.study = optuna.create_study(
                study_name="search", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
            )
            there = self.study.user_attrs.get("asked") if self.study.trials else None
        except Exception as error:  # of Optuna, SQLAlchemy or SQLite
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{file} cannot be read as the storage of a search ({why}). Choose another name=, or remove it."
            ) from None
        if there and there != asked:
            raise ConfigError(
                f"{self.folder} holds another search: {' '.join(there)}. Choose another name=, or give the same settings."
            )
        self.study.set_user_attr("asked", asked)

    def point(self, words: list[str]) -> Point:
        """The run of a trial. Raises ``ConfigError`` where its settings contradict each other."""
        words = fitting(words, self.fixed, self._place[0])
        found = grid.points([*self.fixed, *words], *self._place)
        if not found:
            raise ConfigError("its method cannot meet the budget")
        return replace(found[0], label=" ".join(words))

    def entries(self) -> list[Result]:
        """What ``sweep.json`` says of the trials: those that have a run, and those that are still to be made."""
        there = self.study.get_trials(deepcopy=False)
        made = {
            about["point"]["run"]: about["point"] | {"pruned": trial.state.name == "PRUNED"}
            for trial in there
            if "point" in (about := trial.user_attrs)
        }
        return [
            *made.values(),
            *[{"run": "", "label": "", "seed": self._seed, "steps": 0}] * max(0, self._trials - len(there)),
        ]

    def offered(self) -> Iterator[Point]:
        """The runs of trials that an earlier process left unfinished, then those of new ones."""
        from optuna.trial import Trial, TrialState

        left = [
            Trial(self.study, frozen._trial_id)
            for frozen in self.study.get_trials(states=(TrialState.RUNNING,))
        ]
        while left or len(self.study.trials) < self._trials:
            own = left.pop(0) if left else self._asked()
            self._reseed(own.number)
            words = [dimension.suggest(own) for dimension in self.dimensions]
            try:
                point = self.point(words)
                grid.freeze([point])
            except ConfigError as error:
                self._tell(own, "FAIL", error=" ".join(error.faults))
                continue
            own.set_user_attr("run", point.folder.path.name)
            own.set_user_attr("point", entry(point, self.folder))
            self.announce(self.entries())
            self._running[id(point)] = _Trial(own, point)
            yield point

    def _asked(self) -> Any:
        self._reseed(len(self.study.trials))
        return self.study.ask()

    def _reseed(self, number: int) -> None:
        """Each trial draws from a seed of its own, so that it does not matter how many were made by this process."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
            self.study.sampler = optuna.samplers.TPESampler(
                seed=(self._seed * 1_000_003 + number) % 2**32, constant_liar=self._parallel
            )

    def verdict(self, point: Point) -> str | None:
        """Why the run is to be stopped now, if it is: the median of the earlier trials at one of its validations was better."""
        trial = self._running[id(point)]
        for line in trial.lines.new():
            self._judge(trial, line)
        return trial.pruned or None

    def _judge(self, trial: _Trial, line: dict[str, Any]) -> None:
        """Report a line's validation metric, and see what the pruner says; the last validation is worth knowing in any case."""
        val = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
        metric, step = main_metric(val), int(line["step"])
        if trial.pruned or metric is None or step < trial.seen or (step == trial.seen and trial.judged):
            return
        if step > trial.seen:
            trial.own.report(_gain(metric, val), step)
        trial.seen, trial.judged = step, True
        if step < trial.point.config.train.steps and trial.own.should_prune():
            trial.pruned = f"pruned at step {step}: a validation {metric.words} of {metric.show(val[metric.key])} is worse than the median"

    def ended(self, point: Point, result: Result) -> None:
        """Tell Optuna what became of a run. One that was too quick to be stopped counts as pruned where it would have been."""
        why = self.verdict(point)
        trial = self._running.pop(id(point))
        val = (result.get("metrics") or {}).get("val") or {}
        metric = main_metric(val)
        if why:
            self._tell(trial.own, "PRUNED", error=why, steps=trial.seen)
        elif result["status"] == "finished" and metric:
            self._tell(trial.own, "COMPLETE", _gain(metric, val), val=val, steps=result["steps"])
        else:
            self._tell(
                trial.own,
                "FAIL",
                error=result.get("error") or "it has no validation metric",
                steps=result.get("steps", 0),
            )

    def _tell(self, own: Any, state: str, value: float | None = None, **about: Any) -> None:
        from optuna.trial import TrialState

        for key, item in about.items():
            own.set_user_attr(key, item)
        self.study.tell(own, value, TrialState[state])
        self._write()
        self.announce(self.entries())

    def _write(self) -> None:
        """``search.json``."""
        rows = [self._row(frozen) for frozen in self.study.get_trials(deepcopy=False)]
        best = next((row["number"] for row in sorted(rows, key=_order) if row["status"] == "finished"), None)
        searched = [d.key for d in self.dimensions]
        write_json_atomic(
            self.folder / "search.json",
            {"format": FORMAT, "settings": self.fixed, "searched": searched, "best": best, "trials": rows},
        )

    def _row(self, frozen: Any) -> dict[str, Any]:
        about = frozen.user_attrs
        return {
            "number": frozen.number, "run": about.get("run"), "settings": frozen.params, "status": SILENT.get(frozen.state.name, "unfinished"),
            "val": about.get("val"), "steps": about.get("steps"), "error": about.get("error"),
        }  # fmt: skip

    def told(self) -> list[tuple[Point, Result]]:
        """Every run and its result; of trials with the same settings the first."""
        found: dict[Path, tuple[Point, Result]] = {}
        for row in sorted(map(self._row, self.study.get_trials(deepcopy=False)), key=_order):
            with suppress(ConfigError, KeyError):
                point = self.point(
                    [dimension.word(row["settings"][dimension.key]) for dimension in self.dimensions]
                )
                if point.folder.path not in found:
                    found[point.folder.path] = (
                        point,
                        point.folder.read_result() if point.folder.finished else _unfinished(point, row),
                    )
        return list(found.values())


def _unfinished(point: Point, row: dict[str, Any]) -> Result:
    """What stands for the ``result.json`` of a pruned or failed trial."""
    return make_result(point.config, status="failed", error=row["error"], steps=row["steps"] or 0) | {
        "status": row["status"]
    }


def _gain(metric: Any, values: dict[str, float]) -> float:
    """The metric's value, negative where less is better: Optuna maximizes."""
    return values[metric.key] if metric.higher_is_better else -values[metric.key]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Finished trials first, the best first; of equal metric that of the lower loss, then the earlier."""
    val = row["val"] or {}
    metric = main_metric(val)
    return (metric is None, -_gain(metric, val) if metric else 0.0, val.get("loss") or 0.0, row["number"])
