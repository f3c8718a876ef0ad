"""The runs of a grid from the first to the last, the trials of ``tune=`` before them; announced to others, and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launch.start import NO_OPTIONS, StartOptions
from . import launch
from .check import check
from .grid import Point, freeze
from .pool import Pool, interruptible
from .status import announced, entry
from .tune import Tuning
from .watch import Board

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """How points are run; ``where`` is ``None`` for this machine. ``settings`` and ``command`` are told to others, as what was typed."""

    where: launch.Launcher | None
    jobs: int | None
    board: Board
    settings: Sequence[str]
    command: str
    retry: bool = False
    attempts: int = 1
    fail_fast: bool = False
    options: StartOptions = NO_OPTIONS

    def run(
        self, runs: Sequence[Point], tuning: Tuning | None = None
    ) -> tuple[list[Point], dict[Path, Result]]:
        """The runs, with ``tuning`` those with the values that it chose, and all results by folder. No run follows trials that did not all end."""
        tried, folder = tuning.tried if tuning else [], runs[0].folder.path.parent
        if self.where is None:  # a cluster's machines may see what this one does not
            check(tried or runs, self.retry, self.options)
        freeze(tried or runs)
        if tuning:
            self.board.say(
                f"Tuning {tuning.asked.key} by {len(tried)} trials of {len(tuning.groups)} configurations, on validation."
            )
        trials = [entry(point, folder) for point in tried]
        listed = [entry(point, folder) | ({"run": ""} if tuning else {}) for point in runs]
        with announced(
            folder, [*trials, *listed], self.settings, self._pool(runs).places, self.command
        ) as announce:
            self.board.show(folder)
            if not tuning:
                return list(runs), self._run(runs)[0]
            found, failed = self._run(tried)
            if (self.fail_fast and failed) or any(
                point.folder.path not in found for point in tried
            ):  # a cluster may leave some
                return [], found
            runs = tuning.settled(found, self.board.say)
            announce([*trials, *(entry(point, folder) for point in runs)])
            return list(runs), found | self._run(runs)[0]

    def _pool(self, runs: Sequence[Point]) -> Pool:
        gpus: list[str] | None = [] if all(point.config.train.device == "cpu" for point in runs) else None
        about: Mapping[str, Any] = {
            "retry": self.retry,
            "attempts": self.attempts,
            "fail_fast": self.fail_fast,
            "options": self.options,
        }
        return Pool(self.jobs, self.board.say, look=self.board.look, gpus=gpus, **about)

    def _run(self, runs: Sequence[Point]) -> tuple[dict[Path, Result], bool]:
        """The results by folder, and whether a run failed now."""
        if self.where is None:
            pool = self._pool(runs)
            return pool.run(runs), pool.failed
        with interruptible():
            return launch.run_all(
                runs, self.where, self.jobs, self.retry, self.board.say, self.options
            ), False
