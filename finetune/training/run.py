"""Train one run to its end, with all its files."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import plugin_records
from ..config.settings import Config
from ..core.attach import base
from ..core.collective import any_process, barrier
from ..core.zeros import share_of_zeros
from ..errors import RunFailed
from ..storage.atomic import STAMP, write_json_atomic
from ..storage.delta import load_delta
from ..storage.lock import holding_lock, refuse_if_locked
from ..storage.progress import ProgressRecord
from ..storage.result import Cost, make_result, peak_memory
from ..storage.rows import write_predictions
from ..storage.run_folder import RunFolder
from ..system.disk import disk_errors_as_run_failed
from ..system.environment import rank
from ..system.signals import Interrupted, Signals
from ..system.version import __version__
from . import watchdog
from .batch_size import find_batch_size
from .checkpoints import Checkpoints
from .evaluate import Evaluation
from .prepare import Setup, count_parameters, measure_changed, prepare
from .run_log import RunLog, Say
from .selection import keep_if_best, patience_is_over
from .session import NotFinite, Step
from .suspicions import FrozenState, find_suspicions
from .tracker import NullTracker, Tracker, make_tracker

ShowProgress = Callable[[int, int, str], None]  # steps done, steps in all, a few words
IDS_SHOWN = 8


class Training:
    """One run: its session, its files and its progress."""

    def __init__(self, setup: Setup, files: RunFolder, log: RunLog, signals: Signals) -> None:
        self.setup, self.session, self.files = setup, setup.session, files
        self.log, self.signals = log, signals
        self.settings = setup.config.train
        self.is_main = self.session.accelerator.is_main_process
        self.checkpoints = Checkpoints(setup, files, log)
        self.record = ProgressRecord(
            threads=torch.get_num_threads(),
            processes=self.session.accelerator.num_processes,
            config=setup.config.deciding(),
            plugins=plugin_records.used_by(setup.config),
            references=self.session.references.fingerprints(),
        )
        self.session.memory.say = log

    def run(self, show: ShowProgress, begun: bool) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the beginning; return the content of ``result.json``.

        ``begun``: the run was started before. Raises ``RunFailed`` and ``Interrupted`` as ``train`` does.
        """
        resumed = self.checkpoints.resume(self.record, begun)
        if resumed is not None:
            self.record = resumed
        else:
            if self.settings.batch_size == "auto":
                find_batch_size(self.session)
            self.evaluate_base()
        tracker: Tracker = NullTracker()
        if self.is_main:
            tracker = make_tracker(self.setup.config, self.files, self.log, self.session.number)
        try:
            frozen = FrozenState(self.setup)
            self._loop(tracker, show)
            result = self._finish(frozen)
            with self.signals.deferring():
                if self.is_main:
                    write_json_atomic(self.files.result, result)
                tracker.finish(result)
            return result
        except NotFinite as error:
            failure = self._fail(error)
            tracker.finish({"status": "failed", "error": str(failure), "steps": self.session.number})
            raise failure from None
        except Interrupted as stop:
            self._interrupt(stop)
            tracker.finish({"status": "interrupted", "steps": self.session.number})
            raise

    def evaluate_base(self) -> None:
        """Evaluate the model before training; parts that do not start neutral are switched off for it."""
        neutral = self.setup.config.method.neutral_start
        with base(nn.Module() if neutral else self.session.states):
            self.record.base = self.setup.evaluate("test").metrics
            if "retention" in self.setup.splits:
                self.record.base_retention = self.setup.evaluate("retention").metrics

    def _loop(self, tracker: Tracker, show: ShowProgress) -> None:
        """Train until the last step, ``train.max_seconds`` or ``train.patience``.

        Raises ``Interrupted`` after a step that was saved when a signal came.
        """
        record, total = self.record, self.settings.steps
        began, validated = time.monotonic() - record.spent, ""
        show(self.session.number, total, validated)
        with self.signals.deferring(), closing(self.session.steps()) as steps:
            if record.over:
                return
            for step in steps:
                self._note(step, tracker)
                record.spent = time.monotonic() - began
                most = self.settings.max_seconds
                late = any_process(bool(most) and record.spent > (most or 0))
                if late or step.number == total or _is_due(step, self.settings.eval_every):
                    metrics = keep_if_best(self.setup, self.files, record)
                    tracker.log(step.number, **{f"val_{name}": value for name, value in metrics.items()})
                    shown = [f"val {name} {value:.3f}" for name, value in metrics.items() if name != "loss"]
                    validated = "".join(f", {text}" for text in shown)
                record.over = step.number < total and (late or patience_is_over(self.setup, record))
                if any_process(bool(self.signals.name)):
                    self.checkpoints.save(record)
                    raise Interrupted(self.signals.name or "a signal to another process")
                show(step.number, total, f"loss {step.loss:.3f}{validated}")
                if _is_due(step, self.settings.save_every):
                    self.checkpoints.save(record)
                if record.over:
                    self._tell_early_end(late)
                    return

    def _note(self, step: Step, tracker: Tracker) -> None:
        """Record a step's time and metrics, and warn of what the watchdog notices."""
        self.record.seconds.append(step.seconds)
        tracker.log(step.number, loss=step.loss, lr=step.lr, seconds=step.seconds, **step.metrics)
        for warning in watchdog.observe(self.record.watch, self.session, step):
            self.log(f"Warning: {warning}")

    def _tell_early_end(self, late: bool) -> None:
        reason = f"train.max_seconds={self.settings.max_seconds} is spent"
        if not late:
            best = f"the best validation was at step {self.record.best_step}"
            reason = f"train.patience={self.settings.patience}, {best}"
        self.log(f"Stopped after {self.session.number} of {self.settings.steps} steps: {reason}.")

    def _finish(self, frozen: FrozenState) -> dict[str, Any]:
        """Evaluate the chosen state and write the test predictions; return the content of ``result.json``."""
        record, session, accelerator = self.record, self.session, self.session.accelerator
        on_gpu = accelerator.device.type == "cuda"
        peak, kind = peak_memory(torch.cuda.max_memory_allocated() if on_gpu else None)
        counts = count_parameters(self.setup)  # the stored state, loaded below, may have fewer entries
        suspect = find_suspicions(record.watch, self.setup, frozen, self.files.delta, record.best_step)
        for reason in suspect:
            self.log(f"Warning: this run is suspect: {reason}.")
        self.signals.check()
        if record.best_step != session.number:
            self.checkpoints.take_snapshot()
            load_delta(self.files.delta, session.states)
        test = self.setup.evaluate("test")
        if self.is_main:
            write_predictions(self.files.predictions, _prediction_rows(test))
        metrics = {"base": record.base or {}, "val": record.val or {}, "test": test.metrics}
        if "retention" in self.setup.splits:
            metrics["base_retention"] = record.base_retention or {}
            metrics["retention"] = self.setup.evaluate("retention").metrics
        changed = measure_changed(self.setup) if self.is_main else None  # of the stored state
        cost: Cost = {
            "step_seconds_median": statistics.median(record.seconds) if record.seconds else None,
            "train_seconds": sum(record.seconds),
            "peak_memory_bytes": peak,
            "peak_memory_kind": kind,
        }
        return make_result(
            self.setup.config,
            status="finished",
            metrics=metrics,
            params=counts,
            changed=changed,
            zeros=share_of_zeros(session.model),
            stored_bytes=sum(file.stat().st_size for file in self.files.delta.glob("delta.*")),
            cost=cost,
            steps=session.number,
            best_step=record.best_step,
            device=str(accelerator.device),
            suspect=suspect,
            warnings=record.watch.warnings,
            batch=session.memory.record().to_json(),
            processes=accelerator.num_processes,
            threads=torch.get_num_threads(),
            references=record.references,
            selected_steps=session.selector.count_selected(session.states["selector"]),
        )

    def _fail(self, error: NotFinite) -> RunFailed:
        """Save the state before the failed step, and write a failed result; return the error to raise."""
        folder = self.checkpoints.save(self.record)
        examples = ", ".join(error.ids[:IDS_SHOWN])
        if len(error.ids) > IDS_SHOWN:
            examples += f" and {len(error.ids) - IDS_SHOWN} more"
        message = (
            f"{error} Examples of that step: {examples}. The state before it is in {folder}. "
            "Try a smaller optimizer.lr, or train.precision=fp32."
        )
        if self.is_main:
            failure = {**STAMP, "step": error.step, "ids": error.ids, "checkpoint": folder.name}
            write_json_atomic(self.files.path / "failure.json", failure)
            result = make_result(
                self.setup.config,
                status="failed",
                error=message,
                steps=self.session.number,
                warnings=self.record.watch.warnings,
            )
            write_json_atomic(self.files.result, result)
        barrier()  # no rank exits before rank 0 has written the result
        return RunFailed(message)

    def _interrupt(self, stop: Interrupted) -> None:
        """Save the state after the last step, and say so in the error and in the log."""
        if self.session.number:
            folder = self.checkpoints.save(self.record)
            done = f"step {self.session.number} of {self.settings.steps}"
            stop.saved = f" after {done}, which is saved in {folder}"
        self.log.write(f"Stopped by {stop.name}{stop.saved}.")


def _is_due(step: Step, every: int | None) -> bool:
    return every is not None and step.number % every == 0


def _prediction_rows(test: Evaluation) -> list[dict[str, Any]]:
    """Return the rows of an evaluation with the stored columns: those of a classifier without the loss."""
    rows = []
    for row in test.rows:
        stored = dict(row)
        if "bytes" not in row:
            del stored["loss"]
        rows.append(stored)
    return rows


def train(
    config: Config, folder: Path, say: Say, show: ShowProgress, signals: Signals | None = None
) -> dict[str, Any]:
    """Train the run of ``config`` in ``folder``; return the content of its ``result.json``.

    An unfinished run of the same configuration resumes from its newest complete checkpoint. A finished one is
    left as it is. Raises ``ConfigError``, with nothing written, where the configuration is wrong or another
    process works on the run; ``RunFailed`` when the loss is not finite or the folder cannot be written;
    ``Interrupted`` when one of ``signals`` came.
    """
    files = RunFolder(folder)
    files.check(config)
    if rank() == 0:
        refuse_if_locked(folder)
    setup = prepare(config)
    accelerator = setup.session.accelerator
    is_main = accelerator.is_main_process
    with disk_errors_as_run_failed(folder), holding_lock(folder) if is_main else nullcontext():
        begun = files.log.exists()
        if is_main and not files.finished:
            files.open_or_check(config)
        accelerator.wait_for_everyone()
        if files.finished:
            return files.read_result()
        log = RunLog(files.log if is_main else None, say)
        log.write(f"finetune {__version__}, process {os.getpid()} on {socket.gethostname()}")
        for note in setup.notes:
            log(note)
        return Training(setup, files, log, signals or Signals()).run(show, begun)
