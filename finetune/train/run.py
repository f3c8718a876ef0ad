"""Whole runs: train, evaluate, merge, and the plan of a run that is not started."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from ..config import load as load_config
from ..core.inplace import InPlace
from ..core.part import Part, base, patched
from ..core.part import merge as merge_parts
from ..data.encode import collate, encode
from ..errors import ConfigError, RunFailed
from ..models.load import Base, fingerprint, pristine, save
from ..models.load import load as load_model
from ..settings import Config, TrainConfig
from . import checkpoint, stored, tracker
from .batches import Batches
from .evaluate import Evaluation, better
from .evaluate import evaluate as measure
from .files import RunFolder, replacing, write_json_atomic, write_predictions
from .loop import NotFinite, Session
from .result import make_result, peak_memory

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.02}  # of logits, by the dtype that the merged weights are rounded to


@dataclass
class Setup:
    """What a configuration stands for: the model, the data as tensors, and a session that has not started."""

    config: Config
    base: Base
    labels: tuple[str, ...]
    data: dict[str, Any]
    fingerprint: str
    total: int
    session: Session
    notes: list[str]


def make_accelerator(settings: TrainConfig, unused_parameters: bool = False) -> Accelerator:
    """An Accelerator of these settings; earlier ones of this process are forgotten, since their state is shared and fixed."""
    cuda = torch.cuda.is_available()
    on_cpu = settings.device == "cpu" or not cuda
    if settings.device == "cuda" and not cuda:
        raise ConfigError("train.device=cuda, but torch sees no CUDA device here. Use train.device=auto.")
    if settings.precision == "fp16" and on_cpu:
        raise ConfigError("train.precision=fp16 needs a GPU. Use train.precision=bf16 or fp32 on the CPU.")
    AcceleratorState._reset_state(reset_partial_state=True)
    handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    return Accelerator(cpu=on_cpu, mixed_precision=MIXED[settings.precision], kwargs_handlers=[handler])


def make_deterministic(settings: TrainConfig) -> None:
    """The same seed gives the same bits on one machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)


def prepare(config: Config) -> Setup:
    """Read data and model and attach the method. Every fault of the configuration shows here, before anything is written."""
    if config.model.dtype != "float32" and config.train.precision == "fp32":
        raise ConfigError(
            f"model.dtype={config.model.dtype} needs train.precision=bf16 (or fp16 on a GPU): trained values stay in float32 beside it."
        )
    accelerator = make_accelerator(config.train, config.method.unused_parameters)
    make_deterministic(config.train)
    raw = config.dataset.read()
    model = load_model(config.model, raw.task, raw.labels, config.seed)
    data = encode(raw, model.processor)
    if hasattr(model.model.config, "use_cache"):
        model.model.config.use_cache = False
    mark = fingerprint(model.model, model.head)
    total = sum(p.numel() for p in model.model.parameters())
    batches = Batches(
        data["train"], config.train.batch_size, config.train.micro_batch_size, config.seed,
        accelerator.process_index, accelerator.num_processes, config.train.workers,
    )  # fmt: skip
    session = Session(
        model.model, config.method, model.head, batches, config.optimizer, config.train, config.seed, accelerator, lambda: pristine(model)
    )
    return Setup(config, model, raw.labels, data, mark, total, session, raw.notes + model.notes)


def params(setup: Setup) -> dict[str, int]:
    """Counts of entries: trained ones, those of the model that they can change, and all of the model."""
    parts = [m for m in setup.session.states.modules() if isinstance(m, Part)]
    adapted = sum(m.original.numel() for m in patched(setup.session.model).values()) + sum(p.adapted() for p in parts)
    return {"trained": sum(p.numel() for p in setup.session.states.parameters() if p.requires_grad), "adapted": adapted, "total": setup.total}


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
        self.progress: dict[str, Any] = {"best": None, "best_step": None, "val": None, "base": {}, "base_retention": None, "seconds": []}

    def evaluate(self, split: str) -> Evaluation:
        return measure(self.session.tuned, self.setup.data[split], self.settings.eval_batch_size, self.session.accelerator)

    def evaluate_base(self) -> None:
        """The model before training. A neutral start is the base; otherwise the parts are switched off."""
        with base(self.session.states if not self.setup.config.method.neutral_start else nn.Module()):
            self.progress["base"] = self.evaluate("test").metrics
            if "retention" in self.setup.data:
                self.progress["base_retention"] = self.evaluate("retention").metrics

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
        found = self.evaluate("val").metrics
        key = list(better(found))
        if self.settings.select == "last" or self.progress["best"] is None or key > self.progress["best"]:
            self.progress |= {"best": key, "best_step": self.session.number, "val": found}
            stored.save(self.files.delta, self.session.states, self.about())
        return found

    def about(self) -> dict[str, Any]:
        config = self.setup.config.as_dict()
        known = {key: config[key] for key in ("method", "model", "seed")}
        return {**known, "labels": list(self.setup.labels), "task": self.setup.base.task, "head": list(self.setup.base.head),
                "step": self.session.number, "base_fingerprint": self.setup.fingerprint}  # fmt: skip

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
        if self.progress["best_step"] != self.session.number:
            stored.load(self.files.delta, self.session.states)
        metrics = {"base": self.progress["base"], "val": self.progress["val"]}
        test = self.evaluate("test")
        write_predictions(self.files.predictions, [{k: v for k, v in row.items() if k != "loss" or "bytes" in row} for row in test.rows])
        metrics["test"] = test.metrics
        if "retention" in self.setup.data:
            metrics |= {"base_retention": self.progress["base_retention"], "retention": self.evaluate("retention").metrics}
        seconds = self.progress["seconds"]
        cost = {
            "step_seconds_median": statistics.median(seconds) if seconds else None, "train_seconds": sum(seconds),
            "peak_memory_bytes": peak, "peak_memory_kind": kind,
        }  # fmt: skip
        size = sum(f.stat().st_size for f in self.files.delta.iterdir())
        return make_result(
            self.setup.config, status="finished", metrics=metrics, params=params(self.setup), stored_bytes=size, cost=cost,  # type: ignore[arg-type]
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
    """What ``train`` would do: trained entries per layer, stored bytes, expected peak memory. Trains and writes nothing."""
    setup = prepare(config)
    session = setup.session
    session.start()
    layers = [
        {"layer": name, "shape": list(m.original.shape), "trained": sum(t.numel() for d in m.deltas for t in d.inputs())}
        for name, m in patched(session.model).items()
    ]
    inplace = [m for m in session.states.modules() if isinstance(m, InPlace)]
    layers += [{"layer": name, "shape": list(p.shape), "trained": p.numel()} for m in inplace for name, p in m.trained().items()]
    counts = params(setup)
    return {
        "method": config.method.name, "model": setup.base.source, "dataset": config.dataset.name, "task": setup.base.task, "steps":
        config.train.steps, "layers": layers, "params": counts, "stored_bytes": stored.stored_bytes(session.states),
        "expected_peak_memory_bytes": _expected_peak(session, counts["trained"]), "notes": setup.notes,
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


def run_of(path: Path) -> tuple[RunFolder, Path | None]:
    """The run that ``path`` names, and the checkpoint folder if it names one. ``path``: a run, its ``delta``, or a ``checkpoints/step-N``."""
    for root, state in ((path, None), (path.parent, None), (path.parent.parent, path)):
        if (root / "config.yaml").is_file() and path.is_dir():
            return RunFolder(root), state if state and (state / "state.json").is_file() else None
    raise ConfigError(f"ckpt={path} is not the folder of a run (it has no config.yaml). Give outputs/<name>/<run>, as `finetune train` prints it.")


def rebuild(path: Path, dataset: Any = None) -> Setup:
    """Base plus stored change of a run, with the run's data or with ``dataset``. Raises ``ConfigError`` where they do not fit each other."""
    files, state = run_of(path)
    config = load_config([], None, files.config)
    config = replace(config, dataset=dataset) if dataset else config
    known = stored.about(files.delta)
    setup = prepare(config)
    if dataset and len(setup.labels) != len(known["labels"]):
        raise ConfigError(
            f"dataset={dataset.name} has {len(setup.labels)} labels and the head of {files.path} has {len(known['labels'])}. "
            "Evaluate on a data set with the same labels."
        )
    if setup.fingerprint != known["base_fingerprint"]:
        raise ConfigError(
            f"model.path={config.model.path} is not the model that {files.path} was trained on: its weights differ. Restore the original base."
        )
    if state:
        checkpoint.load(state, setup.session)
    else:
        stored.load(files.delta, setup.session.states)
    return setup


def evaluate(path: Path, dataset: Any = None) -> dict[str, Any]:
    """The metrics of a run's stored change on the test split (and validation and retention, where there are), computed anew."""
    setup = rebuild(path, dataset)
    settings = setup.config.train
    splits = [s for s in ("val", "test", "retention") if s in setup.data]
    found = {s: measure(setup.session.tuned, setup.data[s], settings.eval_batch_size, setup.session.accelerator).metrics for s in splits}
    return {"run": str(path), "dataset": setup.config.dataset.name, "metrics": found}


@torch.no_grad()
def merge(path: Path, out: Path, tolerance: float | None = None) -> dict[str, Any]:
    """Write base and change as one Hugging Face folder, after comparing logits on real test batches.

    ``tolerance``: the largest difference of a logit; by default by the dtype of the weights. Raises ``ConfigError`` above it, and for an ``out`` in
    use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty. Choose a new folder.")
    setup = rebuild(path)
    if not setup.config.method.mergeable:
        raise ConfigError(f"method={setup.config.method.name} cannot be merged: it changes more than weights.")
    tolerance = TOLERANCE[setup.config.model.dtype] if tolerance is None else tolerance
    live = _logits(setup)
    merge_parts(setup.session.model, setup.session.states)
    setup.session.model.to(getattr(torch, setup.config.model.dtype))
    merged = _logits(setup)
    difference = max(float((a - b).abs().max()) for a, b in zip(live, merged, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(live, merged, strict=True)) / sum(a[..., 0].numel() for a in live)
    if not difference <= tolerance:
        raise ConfigError(
            f"The merged model's logits differ from the unmerged one's by {difference:.3g}, more than --tolerance {tolerance:g}; nothing was written."
        )
    if hasattr(setup.session.model.config, "use_cache"):
        setup.session.model.config.use_cache = True
    with replacing(out) as temporary:
        save(setup.session.model, setup.base.processor, temporary)
    return {"out": str(out), "largest_logit_difference": difference, "same_predictions": same, "tolerance": tolerance}


def _logits(setup: Setup, batches: int = 4) -> list[torch.Tensor]:
    data, session = setup.data["test"], setup.session
    session.tuned.eval()
    found = []
    size = setup.config.train.batch_size
    for start in range(0, min(len(data), batches * size), size):
        batch = collate([data[i] for i in range(start, min(start + size, len(data)))])
        with session.accelerator.autocast():
            found.append(session.tuned(**session.on_device(batch.inputs)).float().cpu())
    return found
