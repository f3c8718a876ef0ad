"""Run the points of a grid, after the trials of ``tune=``; announce them to other shells, and show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..launch.start import NO_OPTIONS, StartOptions
from . import cluster
from .check import check
from .grid import Point, freeze
from .pool import Pool, interruptible
from .status import announced, entry
from .tune import Tuning
from .watch import Board

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What was typed, and how its points are run.

    ``settings`` are the words that choose the points, and ``command`` is the whole command; both are recorded
    for other shells. ``launcher`` hands the points to a cluster; ``None`` runs them on this machine. The rest
    is as in ``Pool``.
    """

    settings: Sequence[str]
    command: str = ""
    jobs: int | None = 1
    launcher: cluster.Launcher | None = None
    board: Board = field(default_factory=Board)
    retry: bool = False
    attempts: int = 1
    fail_fast: bool = False
    options: StartOptions = NO_OPTIONS

    def run(
        self, runs: Sequence[Point], tuning: Tuning | None = None
    ) -> tuple[list[Point], dict[Path, Result]]:
        """Run the points, and return them with all results by folder.

        With ``tuning``, its trials run first, and the points run with the values that the trials chose. If
        not all trials ended, or one failed and ``fail_fast`` is set, no point runs and none is returned.
        """
        trials = tuning.trials if tuning else []
        folder = runs[0].folder.path.parent
        if self.launcher is None:  # a cluster's machines may have data and models that this one lacks
            check(trials or runs, self.retry, self.options)
        freeze(trials or runs)
        entries = [entry(point, folder) for point in (*trials, *runs)]
        if tuning:
            for each in entries[len(trials) :]:
                each["run"] = ""  # its name depends on the value that the trials choose
            self.board.say(
                f"Tuning {tuning.request.key} by {len(trials)} trials of {len(tuning.groups)} "
                "configurations, on validation."
            )
        places = self.make_pool(runs).places
        with announced(folder, entries, self.settings, places, self.command) as announce:
            self.board.show(folder)
            if not tuning:
                return list(runs), self._run(runs)[0]
            found, failed = self._run(trials)
            all_ended = all(trial.folder.path in found for trial in trials)  # a cluster may leave some
            if not all_ended or (failed and self.fail_fast):
                return [], found
            tuned = tuning.settle(found, self.board.say)
            announce([entry(point, folder) for point in (*trials, *tuned)])
            return tuned, found | self._run(tuned)[0]

    def make_pool(self, runs: Sequence[Point]) -> Pool:
        """Return the pool that runs points like ``runs``; runs on the CPU take no GPU."""
        on_cpu = all(point.config.train.device == "cpu" for point in runs)
        return Pool(
            self.jobs,
            self.board.say,
            update=self.board.update,
            gpus=[] if on_cpu else None,
            retry=self.retry,
            attempts=self.attempts,
            fail_fast=self.fail_fast,
            options=self.options,
        )

    def _run(self, runs: Sequence[Point]) -> tuple[dict[Path, Result], bool]:
        """Run the points; return the results by folder, and whether a run failed in this call."""
        if self.launcher is None:
            pool = self.make_pool(runs)
            return pool.run(runs), pool.failed
        with interruptible():
            found = cluster.run_all(runs, self.launcher, self.jobs, self.retry, self.board.say, self.options)
            return found, False
