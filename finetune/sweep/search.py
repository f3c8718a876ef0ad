"""A search: trials that Optuna chooses one after the other, each a run in the sweep's folder.

Trials are judged by their validation metric alone. Optuna's storage is ``search.db`` in the folder;
``search.json`` has the same content in readable form. The same command continues an interrupted search, and
with more ``--trials`` it extends a finished one. With one job, the same seed gives the same trials, however
often the search was interrupted.
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
from ..report.metric import main_metric
from ..storage.atomic import write_json_atomic
from ..storage.result import make_result
from . import grid
from .grid import Point
from .lines import Lines
from .space import Dimension, fitting, space
from .status import Entry, announced, entry
from .work import Work

FORMAT = 1
STATUS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}  # of a trial, by Optuna's state
SEED_DISTANCE = 1_000_003  # between the sampler seeds of searches whose own seeds differ by 1
Result = dict[str, Any]


def run(
    work: Work, trials: int, config_dir: Path | None = None, config_file: Path | None = None
) -> list[tuple[Point, Result]]:
    """Search ``work.settings`` until there are ``trials`` in all, those of earlier calls included.

    Returns points and results: finished runs come first, the best at the top. A pruned trial has the status
    "pruned". Raises ``ConfigError`` with all faults before anything runs.
    """
    _check_installed()
    default, words = grid.with_preset(list(work.settings), config_dir)
    fixed, dimensions = space(words, config_dir, config_file)
    if not any(text.startswith("name=") for text in fixed):
        fixed.append(f"name={default.replace('sweep-', 'search-')}")
    search = Search(fixed, dimensions, config_dir, config_file)
    first = search.point([dimension.ends()[0] for dimension in dimensions])
    pool = work.make_pool([first])
    folder = first.folder.path.parent
    with search.exclusive(folder):
        search.open_study(words, first.config.seed, pool.places > 1, trials)
        with announced(folder, search.entries(), words, pool.places, work.command) as search.announce:
            work.board.show(folder)
            pool.run(search.yield_points(), search.record, search.verdict)
        return search.results()


def _check_installed() -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "--search optuna needs a package that is not installed: pip install 'finetune-bench[search]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class _Trial:
    """A trial that is running: Optuna's own object, its point, and the last validation that was judged."""

    def __init__(self, own: Any, point: Point) -> None:
        self.own, self.point = own, point
        self.pruned = ""  # why it was pruned
        self.lines = Lines(point.folder.metrics)
        # An earlier process may have reported its last step to Optuna without judging it.
        self.reported = max(own.storage.get_trial(own._trial_id).intermediate_values, default=0)
        self.judged = not self.reported


class Search:
    """The points of a search, one after the other, and their results. Call ``open_study`` first."""

    folder: Path
    study: Any
    announce: Callable[[Sequence[Entry]], None]

    def __init__(
        self, fixed: list[str], dimensions: list[Dimension], config_dir: Path | None, config_file: Path | None
    ) -> None:
        self.fixed, self.dimensions = fixed, dimensions
        self._config_dir, self._config_file = config_dir, config_file
        self._running: dict[int, _Trial] = {}  # by id of the point: two trials may be of one run

    @contextmanager
    def exclusive(self, folder: Path) -> Iterator[None]:
        """Lock ``folder``, so that no other search works in it. Raises ``ConfigError`` if one does."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".search.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written: {error.strerror}. Run the command where you may write."
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

    def open_study(self, words: list[str], seed: int, parallel: bool, trials: int) -> None:
        """Create or reopen the study. Raises ``ConfigError`` if it belongs to another search."""
        import optuna

        self._seed, self._parallel, self._total = seed, parallel, trials
        settings = sorted(text for text in words if not text.startswith("name="))
        file, pruner = self.folder / "search.db", optuna.pruners.MedianPruner()
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
            self.study = optuna.create_study(
                study_name="search", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
            )
            before = self.study.user_attrs.get("asked") if self.study.trials else None
        except Exception as error:  # of Optuna, SQLAlchemy or SQLite
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{file} cannot be read as the storage of a search ({why}). Choose another name=, or remove "
                "it."
            ) from None
        if before and before != settings:
            raise ConfigError(
                f"{self.folder} holds another search: {' '.join(before)}. Choose another name=, or give the "
                "same settings."
            )
        self.study.set_user_attr("asked", settings)

    def point(self, words: list[str]) -> Point:
        """Return the point of a trial. Raises ``ConfigError`` if its settings contradict each other."""
        words = fitting(words, self.fixed, self._config_dir)
        found = grid.list_points([*self.fixed, *words], self._config_dir, self._config_file)
        if not found:
            raise ConfigError("its method cannot meet the budget")
        return replace(found[0], label=" ".join(words))

    def entries(self) -> list[Entry]:
        """Return the entries of ``sweep.json``: one for each run, and one for each trial still to be made."""
        trials = self.study.get_trials(deepcopy=False)
        made: dict[str, Entry] = {}
        for trial in trials:
            if about := trial.user_attrs.get("point"):
                made[about["run"]] = about | {"pruned": trial.state.name == "PRUNED"}
        to_come = {"run": "", "label": "", "seed": self._seed, "steps": 0}
        return [*made.values(), *[to_come] * max(0, self._total - len(trials))]

    def yield_points(self) -> Iterator[Point]:
        """Yield the points of trials that an earlier process left unfinished, then those of new trials."""
        from optuna.trial import Trial, TrialState

        unfinished = self.study.get_trials(states=(TrialState.RUNNING,))
        left = [Trial(self.study, frozen._trial_id) for frozen in unfinished]
        while left or len(self.study.trials) < self._total:
            own = left.pop(0) if left else self._new_trial()
            self._seed_sampler(own.number)
            words = [dimension.suggest(own) for dimension in self.dimensions]
            try:
                point = self.point(words)
                grid.freeze([point])
            except ConfigError as error:
                self._finish(own, "FAIL", error=" ".join(error.faults))
                continue
            own.set_user_attr("run", point.folder.path.name)
            own.set_user_attr("point", entry(point, self.folder))
            self.announce(self.entries())
            self._running[id(point)] = _Trial(own, point)
            yield point

    def _new_trial(self) -> Any:
        self._seed_sampler(len(self.study.trials))
        return self.study.ask()

    def _seed_sampler(self, number: int) -> None:
        """Give the trial ``number`` a seed of its own, so that interruptions do not change what it draws."""
        import optuna

        seed = (self._seed * SEED_DISTANCE + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self._parallel)

    def verdict(self, point: Point) -> str | None:
        """Return why the run should be stopped now; ``None`` if it should go on.

        A run is stopped if its metric at a validation is worse than the median of the earlier trials there.
        """
        trial = self._running[id(point)]
        for line in trial.lines.new():
            self._judge(trial, line)
        return trial.pruned or None

    def _judge(self, trial: _Trial, line: dict[str, Any]) -> None:
        """Report the validation metric in a line of metrics to Optuna, and ask its pruner.

        The last validation is not judged, because the run is over by then.
        """
        val = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
        metric, step = main_metric(val), int(line["step"])
        if trial.pruned or metric is None:
            return
        if step < trial.reported or (step == trial.reported and trial.judged):
            return
        if step > trial.reported:
            trial.own.report(_gain(metric, val), step)
        trial.reported, trial.judged = step, True
        if step < trial.point.config.train.steps and trial.own.should_prune():
            shown = metric.show(val[metric.key])
            trial.pruned = (
                f"pruned at step {step}: a validation {metric.words} of {shown} is worse than the median"
            )

    def record(self, point: Point, result: Result) -> None:
        """Tell Optuna the result of a run.

        A run that should have been pruned but ended first counts as pruned.
        """
        why = self.verdict(point)
        trial = self._running.pop(id(point))
        val = (result.get("metrics") or {}).get("val") or {}
        metric = main_metric(val)
        if why:
            self._finish(trial.own, "PRUNED", error=why, steps=trial.reported)
        elif result["status"] == "finished" and metric:
            self._finish(trial.own, "COMPLETE", _gain(metric, val), val=val, steps=result["steps"])
        else:
            error = result.get("error") or "it has no validation metric"
            self._finish(trial.own, "FAIL", error=error, steps=result.get("steps", 0))

    def _finish(self, own: Any, state: str, value: float | None = None, **about: Any) -> None:
        """Store the end of a trial in ``search.db``, ``search.json`` and ``sweep.json``."""
        from optuna.trial import TrialState

        for key, item in about.items():
            own.set_user_attr(key, item)
        self.study.tell(own, value, TrialState[state])
        self._write()
        self.announce(self.entries())

    def _write(self) -> None:
        """Write ``search.json``."""
        trials = self._trials()
        finished = sorted((trial for trial in trials if trial["status"] == "finished"), key=_order)
        content = {
            "format": FORMAT,
            "settings": self.fixed,
            "searched": [dimension.key for dimension in self.dimensions],
            "best": finished[0]["number"] if finished else None,
            "trials": trials,
        }
        write_json_atomic(self.folder / "search.json", content)

    def _trials(self) -> list[dict[str, Any]]:
        """Return what ``search.json`` says of each trial."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            about = trial.user_attrs
            found.append(
                {
                    "number": trial.number,
                    "run": about.get("run"),
                    "settings": trial.params,
                    "status": STATUS.get(trial.state.name, "unfinished"),
                    "val": about.get("val"),
                    "steps": about.get("steps"),
                    "error": about.get("error"),
                }
            )
        return found

    def results(self) -> list[tuple[Point, Result]]:
        """Return every run and its result; for trials with the same settings, the first."""
        found: dict[Path, tuple[Point, Result]] = {}
        for trial in sorted(self._trials(), key=_order):
            with suppress(ConfigError, KeyError):  # trials that failed before they had a run
                words = [dimension.word(trial["settings"][dimension.key]) for dimension in self.dimensions]
                point = self.point(words)
                result = point.folder.read_result() if point.folder.finished else _unfinished(point, trial)
                found.setdefault(point.folder.path, (point, result))
        return list(found.values())


def _unfinished(point: Point, trial: dict[str, Any]) -> Result:
    """Return what takes the place of the ``result.json`` of a pruned or failed trial."""
    result = make_result(point.config, status="failed", error=trial["error"], steps=trial["steps"] or 0)
    return result | {"status": trial["status"]}


def _gain(metric: Any, values: dict[str, float]) -> float:
    """Return the metric's value, negated where less is better: Optuna maximizes."""
    return values[metric.key] if metric.higher_is_better else -values[metric.key]


def _order(trial: dict[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of a trial: finished first, then better metric, lower loss, earlier trial."""
    val = trial["val"] or {}
    metric = main_metric(val)
    if metric is None:
        return (True, 0.0, val.get("loss") or 0.0, trial["number"])
    return (False, -_gain(metric, val), val.get("loss") or 0.0, trial["number"])
