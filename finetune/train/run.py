"""One run: trained to its end with its files, or only planned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.inplace import InPlace
from ..core.part import base, patched
from ..errors import RunFailed
from ..settings import Config
from . import checkpoint, stored, tracker
from .evaluate import better
from .files import RunFolder, write_json_atomic, write_predictions
from .loop import NotFinite, Session
from .result import Cost, make_result, peak_memory
from .setup import Setup, params, prepare

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]


class Log:
    """Says a line to the user and keeps it in the run's ``log.txt``."""

    def __init__(self, file: Path, say: Say) -> None:
        self.file, self.to = file, say

    def __call__(self, line: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.to(line)


class Training:
    """One run of ``train``: a session with its files, its best state so far and its clock."""

    def __init__(self, setup: Setup, files: RunFolder, say: Say) -> None:
        self.setup, self.session, self.files, self.say = setup, setup.session, files, say
        self.settings = setup.config.train
        self.progress: dict[str, Any] = {
            "best": None,
            "best_step": None,
            "best_stage": None,
            "val": None,
            "base": {},
            "base_retention": None,
            "seconds": [],
        }

    def evaluate_base(self) -> None:
        """The model before training. A neutral start is the base; otherwise the parts are switched off."""
        with base(self.session.states if not self.setup.config.method.neutral_start else nn.Module()):
            self.progress["base"] = self.setup.evaluate("test").metrics
            if "retention" in self.setup.splits:
                self.progress["base_retention"] = self.setup.evaluate("retention").metrics

    def resume(self) -> bool:
        """Go on from the newest checkpoint of an unfinished run, if there is one."""
        found = checkpoint.newest(self.files)
        if found is None:
            return False
        self.progress = checkpoint.load(found, self.session)
        self.say(f"Going on from step {self.session.number}, the newest checkpoint of this run.")
        return True

    def save_checkpoint(self) -> Path:
        folder = self.files.checkpoint(self.session.number)
        checkpoint.save(folder, self.session, self.progress)
        return folder

    def keep_if_best(self) -> dict[str, float]:
        """Evaluate on validation, and store the change if it is the best so far (or if the last one is wanted)."""
        found = self.setup.evaluate("val").metrics
        key = list(better(found))
        stage = self.session.stage  # what an earlier one reached was only a means
        later = self.progress["best_stage"] != stage
        if self.settings.select == "last" or later or key > self.progress["best"]:
            self.progress |= {"best": key, "best_step": self.session.number, "best_stage": stage, "val": found}
            stored.save(self.files.delta, self.session.states, self.about())
        return found

    def about(self) -> dict[str, Any]:
        """What the stored change belongs to."""
        config, model = self.setup.config, self.setup.base
        return {
            "method": config.method.name, "config": config.as_dict(), "task": model.task, "labels": list(self.setup.labels), "head": list(model.head),
            "step": self.session.number, "phase": self.session.phase, "base_fingerprint": self.setup.fingerprint,
        }  # fmt: skip

    def loop(self, log: tracker.Tracker, progress: Progress) -> None:
        """Train to the end, or until ``max_seconds`` are spent."""
        settings, began, words = self.settings, time.monotonic(), ""
        progress(self.session.number, settings.steps, words)
        for step in self.session.steps():
            self.progress["seconds"].append(step.seconds)
            log.log(step.number, loss=step.loss, lr=step.lr, seconds=step.seconds, **step.metrics)
            over = bool(settings.max_seconds) and time.monotonic() - began > (settings.max_seconds or 0)
            if over or step.number == settings.steps or (settings.eval_every and step.number % settings.eval_every == 0):
                found = self.keep_if_best()
                log.log(step.number, **{f"val_{k}": v for k, v in found.items()})
                words = ", ".join(f"val {k} {v:.3f}" for k, v in found.items() if k != "loss")
            progress(step.number, settings.steps, f"loss {step.loss:.3f}{words and ', ' + words}")
            if settings.save_every and step.number % settings.save_every == 0:
                self.save_checkpoint()
            if over:
                self.say(f"Stopped after {step.number} of {settings.steps} steps: train.max_seconds={settings.max_seconds} is spent.")
                return

    def result(self) -> dict[str, Any]:
        """Evaluate the chosen state, and put together what ``result.json`` holds. Writes the test predictions."""
        cuda = torch.cuda.max_memory_allocated() if self.session.accelerator.device.type == "cuda" else None
        peak, kind = peak_memory(cuda)
        counts = params(self.setup)  # before anything is loaded: what is stored may be less than what was trained
        if self.progress["best_step"] != self.session.number:
            stored.load(self.files.delta, self.session.states)
        metrics = {"base": self.progress["base"], "val": self.progress["val"]}
        test = self.setup.evaluate("test")
        write_predictions(self.files.predictions, [{k: v for k, v in row.items() if k != "loss" or "bytes" in row} for row in test.rows])
        metrics["test"] = test.metrics
        if "retention" in self.setup.splits:
            metrics |= {"base_retention": self.progress["base_retention"], "retention": self.setup.evaluate("retention").metrics}
        seconds = self.progress["seconds"]
        cost: Cost = {
            "step_seconds_median": statistics.median(seconds) if seconds else None, "train_seconds": sum(seconds),
            "peak_memory_bytes": peak, "peak_memory_kind": kind,
        }  # fmt: skip
        size = sum(f.stat().st_size for f in self.files.delta.iterdir())
        return make_result(
            self.setup.config, status="finished", metrics=metrics, params=counts, stored_bytes=size, cost=cost,
            steps=self.session.number, best_step=self.progress["best_step"], device=str(self.session.accelerator.device),
        )  # fmt: skip

    def failed(self, error: NotFinite) -> RunFailed:
        """Keep the state before the step that failed, and say where."""
        folder = self.save_checkpoint()
        shown = ", ".join(error.ids[:8]) + (f" and {len(error.ids) - 8} more" if len(error.ids) > 8 else "")
        message = f"{error} Examples of that step: {shown}. The state before it is in {folder}. Try a smaller optimizer.lr, or train.precision=fp32."
        write_json_atomic(self.files.path / "failure.json", {"step": error.step, "ids": error.ids, "checkpoint": folder.name})
        result = make_result(self.setup.config, status="failed", error=message, steps=self.session.number)
        write_json_atomic(self.files.result, result)
        return RunFailed(message)


def train(config: Config, folder: Path, say: Say, progress: Progress) -> dict[str, Any]:
    """Run ``config`` in ``folder`` and return the content of its ``result.json``.

    An unfinished run of the same configuration goes on from its newest checkpoint. Raises ``ConfigError`` before anything is written, ``RunFailed``
    when the loss is not finite.
    """
    setup = prepare(config)
    files = RunFolder(folder)
    files.open_or_check(config)
    log = Log(files.log, say)
    for note in setup.notes:
        log(note)
    training = Training(setup, files, log)
    if not training.resume():
        training.evaluate_base()
    lines = tracker.make(config, files, log, training.session.number)
    try:
        training.loop(lines, progress)
    except NotFinite as error:
        failure = training.failed(error)
        lines.finish(files.read_result())
        raise failure from None
    result = training.result()
    write_json_atomic(files.result, result)
    lines.finish(result)
    return result


def plan(config: Config) -> dict[str, Any]:
    """What ``train`` would do: trained entries per layer and stored bytes, as the last phase begins, and the expected peak memory of all phases.

    Trains and writes nothing.
    """
    setup = prepare(config)
    session = setup.session
    session.start()
    peaks = [_expected_peak(session, params(setup)["trained"])]
    for phase in range(1, len(session.phases)):
        previous = session.states["method"]
        session.enter(phase)
        session.start(previous)
        peaks.append(_expected_peak(session, params(setup)["trained"]))
    open_yet = session.phase > 0  # what nothing has moved yet says nothing of where the entries will be
    layers = [
        {"layer": name, "shape": list(m.original.shape), "trained": None if open_yet else sum(t.numel() for d in m.deltas for t in d.inputs())}
        for name, m in patched(session.model).items()
    ]
    inplace = [m for m in session.states.modules() if isinstance(m, InPlace)]
    layers += [{"layer": name, "shape": list(p.shape), "trained": p.numel()} for m in inplace for name, p in m.trained().items()]
    notes = ["The phases before the last decide how many entries each layer gets."] if open_yet else []
    return {
        "method": config.method.name, "model": setup.base.source, "dataset": config.dataset.name, "task": setup.base.task, "steps":
        config.train.steps, "layers": layers, "params": params(setup), "stored_bytes": stored.stored_bytes(session.states),
        "expected_peak_memory_bytes": max(peaks), "notes": setup.notes + notes,
    }  # fmt: skip


def _expected_peak(session: Session, trained: int) -> int:
    """This process as it stands, plus what one micro-batch keeps for backward, plus gradient and two moments of each trained entry."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = next(b for b in next(session.batches.steps(0, 1)) if b)
    weights = {p.untyped_storage().data_ptr() for p in session.tuned.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), session.accelerator.autocast():
        logits = session.tuned(**session.on_device(batch.inputs))
    activations = sum(size for place, size in kept.items() if place not in weights)
    del logits
    now = torch.cuda.memory_allocated() if session.accelerator.device.type == "cuda" else _resident()
    return now + activations + 3 * 4 * trained


def _resident() -> int:
    """Bytes of this process in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
