"""One run, trained to its end with its files."""

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

from .. import __version__
from ..config import plugins
from ..config.settings import Config
from ..core.collective import anyone, meet
from ..core.part import base
from ..errors import RunFailed, visible
from ..storage import checkpoint
from ..storage import delta as stored
from ..storage.lock import held, look
from ..storage.result import Cost, make_result, peak_memory
from ..storage.run_folder import STAMP, RunFolder, write_json_atomic, write_predictions
from ..system.disk import told
from ..system.environment import rank
from ..system.signals import Interrupted, Signals
from . import tracker
from . import watchdog as watch
from .evaluate import better
from .prepare import Setup, params, prepare
from .session import NotFinite, Session

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]


class Log:
    """Says a line to the user and keeps it in the run's ``log.txt``; without a file, does neither."""

    def __init__(self, file: Path | None, say: Say) -> None:
        self.file, self.to = file, say

    def __call__(self, line: str) -> None:
        if self.file:
            self.keep(line)
            self.to(line)

    def keep(self, line: str) -> None:
        """Only write the line down."""
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(line)}\n")


class Kept:
    """A session's state as it was, with the trained values copied: what a checkpoint needs when the session has gone another way."""

    def __init__(self, session: Session) -> None:
        self._state = session.state_dict()
        self._state["states"] = {name: t.detach().cpu().clone() for name, t in self._state["states"].items()}

    def state_dict(self) -> dict[str, Any]:
        """As the session's was."""
        return self._state


class Training:
    """One run of ``train``: a session with its files, its best state so far and its clock."""

    def __init__(self, setup: Setup, files: RunFolder, say: Log, signals: Signals) -> None:
        self.setup, self.session, self.files, self.say, self.signals = (
            setup,
            setup.session,
            files,
            say,
            signals,
        )
        self.settings, self.main = setup.config.train, setup.session.accelerator.is_main_process
        self.saved = 0  # the step of the last checkpoint; at step 0 there is nothing to save
        self.last: Kept | None = None  # the state after the last step, once another one was loaded
        self.progress: dict[str, Any] = {
            "best": None,
            "best_step": None,
            "best_stage": None,
            "val": None,
            "base": {},
            "base_retention": None,
            "seconds": [],
            "spent": 0.0,  # seconds in ``loop``, up to the last step
            "over": False,  # whether the run has ended before train.steps
            "watch": watch.fresh(),
            "memory": None,
            "threads": torch.get_num_threads(),
            "processes": setup.session.accelerator.num_processes,
            "config": setup.config.deciding(),
        }
        self.session.memory.say = say

    def evaluate_base(self) -> None:
        """The model before training. A neutral start is the base; otherwise the parts are switched off."""
        with base(self.session.states if not self.setup.config.method.neutral_start else nn.Module()):
            self.progress["base"] = self.setup.evaluate("test").metrics
            if "retention" in self.setup.splits:
                self.progress["base_retention"] = self.setup.evaluate("retention").metrics

    def resume(self, begun: bool) -> bool:
        """Go on from the newest whole checkpoint, if there is one. ``begun``: somebody has worked on this run before."""
        found = checkpoint.newest(self.files, self.say)
        if found is None:
            if begun:
                self.say(
                    "This run was broken off before its first checkpoint (or has no whole one), so it starts from the beginning."
                )
            return False
        before = checkpoint.progress(found, checkpoint.load(found, self.session))
        self.files.check_unaltered(before.pop("config", self.progress["config"]), found)
        processes = before.pop("processes", self.progress["processes"])
        self.progress |= before
        self.session.memory.restore(self.progress["memory"])
        self._use_threads(self.progress["threads"])
        if self.main:
            checkpoint.put_back(found, self.files.delta)
        self.saved = self.session.number
        self.say(f"Going on from step {self.session.number}, the newest checkpoint of this run.")
        if processes != self.progress["processes"]:
            changed = f"steps up to {self.session.number} were made by {processes} processes and later ones by {self.progress['processes']}"
            self.progress["watch"]["warnings"].append(
                f"{changed}: the last bits, and what dropout draws, are not those of an undisturbed run"
            )
            self.say(f"Warning: {self.progress['watch']['warnings'][-1]}.")
        return True

    def _use_threads(self, count: int) -> None:
        """Another number of threads adds up in another order, which changes the last bits."""
        if count != torch.get_num_threads():
            self.say(
                f"Using {count} thread{'s' * (count > 1)} instead of {torch.get_num_threads()}, as the steps before did."
            )
            torch.set_num_threads(count)

    def save_checkpoint(self) -> Path:
        """Save the state after the last step, unless that was done."""
        folder = self.files.checkpoint(self.session.number)
        if self.main and self.saved != self.session.number:
            self.files.sync()
            best = self.progress["best"] and [
                repr(number) for number in self.progress["best"]
            ]  # JSON knows no NaN
            delta = self.files.delta if best else None
            checkpoint.save(
                folder,
                self.last or self.session,
                {**self.progress, "best": best, "memory": self.session.memory.state()},
                delta,
            )
            checkpoint.prune(self.files, self.settings.keep_last, self.session.number)
        self.saved = self.session.number
        return folder

    def keep_if_best(self) -> dict[str, float]:
        """Evaluate on validation, and store the change if it is the best so far (or if the last one is wanted)."""
        found = self.setup.evaluate("val").metrics
        key = list(better(found))
        stage = self.session.stage  # what an earlier one reached was only a means
        later = self.progress["best_stage"] != stage
        if self.settings.select == "last" or later or key > self.progress["best"]:
            self.progress |= {
                "best": key,
                "best_step": self.session.number,
                "best_stage": stage,
                "val": found,
            }
            if self.main:
                stored.save(self.files.delta, self.session.states, self.about())
        return found

    def about(self) -> dict[str, Any]:
        """What the stored change belongs to."""
        config, model = self.setup.config, self.setup.base
        return {
            "method": config.method.name, "config": config.as_dict(), "task": model.task, "labels": list(self.setup.labels), "head": list(model.head),
            "step": self.session.number, "phase": self.session.phase, "base_fingerprint": self.setup.fingerprint,
            **plugins.record_of(config),
        }  # fmt: skip

    def stale(self) -> bool:
        """Whether the last ``patience`` validations were no better. Before the asked sparsity is reached, no validation decides anything."""
        patience, every, at = self.settings.patience, self.settings.eval_every, self.session.stage
        if not (
            patience and every and at == self.progress["best_stage"] == [len(self.session.phases) - 1, 1]
        ):
            return False
        return bool(self.session.number // every - self.progress["best_step"] // every >= patience)

    def loop(self, log: tracker.Tracker, progress: Progress) -> None:
        """Train to the end, or until ``max_seconds`` or ``patience`` end it. Raises ``Interrupted`` after a saved step when a signal came."""
        settings, words, began = self.settings, "", time.monotonic() - self.progress["spent"]
        progress(self.session.number, settings.steps, words)
        self.frozen = watch.Frozen(self.setup)
        with self.signals.patient(), closing(self.session.steps()) as steps:
            for step in () if self.progress["over"] else steps:
                self.progress["seconds"].append(step.seconds)
                log.log(step.number, loss=step.loss, lr=step.lr, seconds=step.seconds, **step.metrics)
                for line in watch.see(self.progress["watch"], self.session, step):
                    self.say(f"Warning: {line}")
                self.progress["spent"] = time.monotonic() - began
                late = anyone(
                    bool(settings.max_seconds) and self.progress["spent"] > (settings.max_seconds or 0)
                )
                if (
                    late
                    or step.number == settings.steps
                    or (settings.eval_every and step.number % settings.eval_every == 0)
                ):
                    found = self.keep_if_best()
                    log.log(step.number, **{f"val_{k}": v for k, v in found.items()})
                    words = ", ".join(f"val {k} {v:.3f}" for k, v in found.items() if k != "loss")
                self.progress["over"] = step.number < settings.steps and (late or self.stale())
                if anyone(bool(self.signals.name)):
                    self.save_checkpoint()
                    raise Interrupted(self.signals.name or "a signal to another process")
                progress(step.number, settings.steps, f"loss {step.loss:.3f}{words and ', ' + words}")
                if settings.save_every and step.number % settings.save_every == 0:
                    self.save_checkpoint()
                if self.progress["over"]:
                    best = f"train.patience={settings.patience}, the best validation was at step {self.progress['best_step']}"
                    why = f"train.max_seconds={settings.max_seconds} is spent" if late else best
                    self.say(f"Stopped after {step.number} of {settings.steps} steps: {why}.")
                    return

    def result(self) -> dict[str, Any]:
        """Evaluate the chosen state, and put together what ``result.json`` holds. Writes the test predictions."""
        cuda = torch.cuda.max_memory_allocated() if self.session.accelerator.device.type == "cuda" else None
        peak, kind = peak_memory(cuda)
        counts = params(
            self.setup
        )  # before anything is loaded: what is stored may be less than what was trained
        suspect = watch.suspicions(
            self.progress["watch"], self.setup, self.frozen, self.files.delta, self.progress["best_step"]
        )
        for reason in suspect:
            self.say(f"Warning: this run is suspect: {reason}.")
        self.signals.check()
        if self.progress["best_step"] != self.session.number:
            self.last = Kept(self.session)
            stored.load(self.files.delta, self.session.states)
        metrics = {"base": self.progress["base"], "val": self.progress["val"]}
        test = self.setup.evaluate("test")
        if self.main:
            write_predictions(
                self.files.predictions,
                [{k: v for k, v in row.items() if k != "loss" or "bytes" in row} for row in test.rows],
            )
        metrics["test"] = test.metrics
        if "retention" in self.setup.splits:
            metrics |= {
                "base_retention": self.progress["base_retention"],
                "retention": self.setup.evaluate("retention").metrics,
            }
        seconds = self.progress["seconds"]
        cost: Cost = {
            "step_seconds_median": statistics.median(seconds) if seconds else None, "train_seconds": sum(seconds),
            "peak_memory_bytes": peak, "peak_memory_kind": kind,
        }  # fmt: skip
        size = sum(f.stat().st_size for f in self.files.delta.glob("delta.*"))
        return make_result(
            self.setup.config, status="finished", metrics=metrics, params=counts, stored_bytes=size, cost=cost,
            steps=self.session.number, best_step=self.progress["best_step"], device=str(self.session.accelerator.device),
            suspect=suspect, warnings=self.progress["watch"]["warnings"], batch=self.session.memory.state(),
            processes=self.session.accelerator.num_processes, threads=torch.get_num_threads(),
        )  # fmt: skip

    def failed(self, error: NotFinite) -> RunFailed:
        """Keep the state before the step that failed, and say where."""
        folder = self.save_checkpoint()
        shown = ", ".join(error.ids[:8]) + (f" and {len(error.ids) - 8} more" if len(error.ids) > 8 else "")
        message = f"{error} Examples of that step: {shown}. The state before it is in {folder}. Try a smaller optimizer.lr, or train.precision=fp32."
        if self.main:
            write_json_atomic(
                self.files.path / "failure.json",
                {**STAMP, "step": error.step, "ids": error.ids, "checkpoint": folder.name},
            )
            warnings = self.progress["watch"]["warnings"]
            result = make_result(
                self.setup.config,
                status="failed",
                error=message,
                steps=self.session.number,
                warnings=warnings,
            )
            write_json_atomic(self.files.result, result)
        meet()  # who has nothing to write does not end before who has
        return RunFailed(message)

    def interrupted(self, error: Interrupted) -> None:
        """Save what is not saved yet, and say so."""
        if self.session.number:
            folder = self.save_checkpoint()
            error.saved = (
                f" after step {self.session.number} of {self.settings.steps}, which is saved in {folder}"
            )
        self.say.keep(f"Stopped by {error.name}{error.saved}.")

    def run(self, progress: Progress, begun: bool) -> dict[str, Any]:
        """All of it, from the newest checkpoint or the beginning to ``result.json``, whose content it returns."""
        if not self.resume(begun):
            if self.settings.batch_size == "auto":
                self.session.memory.find()
            self.evaluate_base()
        lines = (
            tracker.make(self.setup.config, self.files, self.say, self.session.number)
            if self.main
            else tracker.Nowhere()
        )
        try:
            self.loop(lines, progress)
            result = self.result()
            with self.signals.patient():
                if self.main:
                    write_json_atomic(self.files.result, result)
                lines.finish(result)
            return result
        except NotFinite as error:
            failure = self.failed(error)
            lines.finish({"status": "failed", "error": str(failure), "steps": self.session.number})
            raise failure from None
        except Interrupted as stop:
            self.interrupted(stop)
            lines.finish({"status": "interrupted", "steps": self.session.number})
            raise


def train(
    config: Config, folder: Path, say: Say, progress: Progress, signals: Signals | None = None
) -> dict[str, Any]:
    """Run ``config`` in ``folder`` and return the content of its ``result.json``.

    An unfinished run of the same configuration goes on from its newest whole checkpoint, a finished one is left as it is. Raises ``ConfigError``
    before anything is written, also where another process works on the run; ``RunFailed`` when the loss is not finite or the folder cannot be
    written; ``Interrupted`` when one of ``signals`` came.
    """
    files = RunFolder(folder)
    files.check(config)
    if not rank():
        look(folder)
    setup = prepare(config)
    accelerator = setup.session.accelerator
    with told(folder), held(folder) if accelerator.is_main_process else nullcontext():
        begun = files.log.exists()
        if accelerator.is_main_process and not files.finished:
            files.open_or_check(config)
        accelerator.wait_for_everyone()
        if files.finished:
            return files.read_result()
        log = Log(files.log if accelerator.is_main_process else None, say)
        log.keep(f"finetune {__version__}, process {os.getpid()} on {socket.gethostname()}")
        for note in setup.notes:
            log(note)
        return Training(setup, files, log, signals or Signals()).run(progress, begun)
