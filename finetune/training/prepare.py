"""Prepare a run from its configuration: model, data, and a session that can train or load a stored change."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import (
    AcceleratorState,  # its _reset_state: no public way makes a second Accelerator differ
)
from torch import nn

from ..config.settings import Config, TrainConfig
from ..core.attach import base, parts, patched
from ..data.encode import Images, Tokens, encode
from ..errors import ConfigError
from ..models.load import Base, load
from ..models.stored import fingerprint
from ..storage.result import Params
from ..system.environment import sharding_faults
from .batches import Batches
from .build import take_base
from .evaluate import Evaluation, evaluate
from .memory import ran_out
from .retention import pretrained_head, with_head
from .session import Recipe, Session
from .streams import read_streams

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # by train.precision, as Accelerate names it


@dataclass
class Setup:
    """A prepared run: the model, the data as tensors by split, and a session that has not started.

    ``fingerprint``: the base model's, without a new head. ``total``: parameters of the whole model.
    ``notes``: what the user should know of data and model.
    """

    config: Config
    base: Base
    labels: tuple[str, ...]
    data: dict[str, Any]
    fingerprint: str
    total: int
    session: Session
    notes: list[str]

    @property
    def splits(self) -> list[str]:
        """The splits that can be evaluated.

        ``retention`` is one where the data set has such rows, and for a classifier only where the checkpoint
        came with a head.
        """
        found = []
        for split in self.data:
            if split != "retention" or not self.labels or self._head:
                found.append(split)
        return found

    def evaluate(self, split: str) -> Evaluation:
        """Evaluate the model as it is now on one split.

        On ``retention`` a classifier answers with its pretrained head, and the labels are its answers before
        training.
        """
        if split == "retention" and self._head:
            images = self._images_with_answers
            with with_head(self.session.model, self._head):
                return self._measure(images)
        return self._measure(self.data[split])

    def _measure(self, data: Any) -> Evaluation:
        session, size = self.session, self.config.train.eval_batch_size
        return evaluate(session.tuned, data, size, session.accelerator)

    @cached_property
    def _head(self) -> dict[str, torch.Tensor] | None:
        return pretrained_head(self.base) if self.labels and "retention" in self.data else None

    @cached_property
    def _images_with_answers(self) -> Images:
        """The retention images, labelled by the untrained model with its pretrained head."""
        images: Images = self.data["retention"]
        # leaving base() also restores a trained head, so the pretrained head is put on inside the block
        with base(self.session.states), with_head(self.session.model, self._head or {}):
            answers = self._measure(images).rows
        rows = []
        for row, answer in zip(images.rows, answers, strict=True):
            rows.append({**row, "label": answer["prediction"]})
        return Images(rows, self.base.processor)


def check_machine(config: Config) -> None:
    """Raise ``ConfigError`` where this machine, or its launcher, cannot compute as the configuration says."""
    settings, faults, cuda = config.train, sharding_faults(os.environ), torch.cuda.is_available()
    if config.model.dtype != "float32" and settings.precision == "fp32":
        faults.append(
            f"model.dtype={config.model.dtype} needs train.precision=bf16 (or fp16 on a GPU): "
            "trained values stay in float32 beside it."
        )
    if settings.device == "cuda" and not cuda:
        faults.append("train.device=cuda, but torch sees no CUDA device here. Use train.device=auto.")
    if settings.precision == "fp16" and (settings.device == "cpu" or not cuda):
        faults.append("train.precision=fp16 needs a GPU. Use train.precision=bf16 or fp32 on the CPU.")
    if faults:
        raise ConfigError(*faults)


def make_accelerator(settings: TrainConfig) -> Accelerator:
    """Make an Accelerator of these settings; those made before in this process are reset with it."""
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=MIXED_PRECISION[settings.precision])
    # a launcher's setting would divide the loss, which is averaged exactly here
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def make_deterministic(settings: TrainConfig) -> None:
    """Make the same seed give the same bits on one machine, and set the number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # unlike use_deterministic_algorithms, this does not import the compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    # Filling new tensors costs time, and nothing here reads memory that it has not written.
    # torch sets this attribute on the module's class, where type checkers do not see it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if settings.threads:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, settings.threads // processes))


def read_teacher(config: Config, student: Base, labels: tuple[str, ...], path: str) -> nn.Module:
    """Return the model in the folder ``path``, for the same task and with the same vocabulary or images.

    Raises ``ConfigError`` where it cannot be read or does not fit.
    """
    named = f"objective.teacher={path}"
    try:
        source = replace(
            config.model, path=path, revision=None, head="auto", init="pretrained", config={}, zeros="free"
        )
        teacher = load(source, student.task, labels, config.seed)
    except ConfigError as error:
        raise ConfigError(
            *(fault.replace("model.path=", "objective.teacher=") for fault in error.faults)
        ) from None
    if teacher.new_parameters:
        raise ConfigError(
            f"{named} has no trained head for the classes of this data set, so it can teach nothing. "
            "Train it on these classes first, and merge that run."
        )
    if student.task == "image_classification":
        wanted, given = (_describe_images(base.processor) for base in (student, teacher))
        if wanted != given:
            raise ConfigError(
                f"{named} takes images of {given}, and the model takes {wanted}. Choose a teacher with the "
                "same image processor."
            )
    elif student.processor.get_vocab() != teacher.processor.get_vocab():
        raise ConfigError(
            f"{named} has another vocabulary ({len(teacher.processor)} tokens; the model has "
            f"{len(student.processor)}), so its predictions cannot be compared. Choose a teacher with the "
            "model's tokenizer."
        )
    taught: nn.Module = teacher.model
    return taught


def _describe_images(processor: Any) -> str:
    """Return the size and the normalization of a processor's images."""
    settings = processor.to_dict()
    return ", ".join(f"{key} {settings.get(key)}" for key in ("size", "image_mean", "image_std"))


def prepare(config: Config, trains: bool = True) -> Setup:
    """Read data and model, and attach the method.

    ``trains``: the objective is needed; a finished run is opened without its teacher and its data streams.
    Raises ``ConfigError`` for every fault of the configuration, before anything is written.
    """
    check_machine(config)
    accelerator = make_accelerator(config.train)
    make_deterministic(config.train)
    raw = config.dataset.read()
    model = load(config.model, raw.task, raw.labels, config.seed)
    data = encode(raw, model.processor)
    if hasattr(model.model.config, "use_cache"):
        model.model.config.use_cache = False
    mark = model.fingerprint = fingerprint(model.model, model.new_parameters)
    total = sum(parameter.numel() for parameter in model.model.parameters())
    streams: dict[str, Images | Tokens] = {}
    stream_notes: list[str] = []
    if trains:
        streams, stream_notes = read_streams(config, raw, model.processor)
    batches = Batches(
        data["train"],
        config.train.batch_size,
        config.train.micro_batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        config.train.workers,
        streams,
    )
    pretrained = replace(
        take_base(model, config.method), read_teacher=partial(read_teacher, config, model, raw.labels)
    )
    recipe = Recipe(
        config.method, config.optimizer, config.train, config.seed, config.selector, config.objective
    )
    session = Session(pretrained, recipe, batches, accelerator)
    if trains:
        session.check_phases()
        session.check_objectives()
    notes = raw.notes + stream_notes + model.notes
    return Setup(config, model, raw.labels, data, mark, total, session, notes)


def count_parameters(setup: Setup) -> Params:
    """Count the entries that are trained, those of the model that they can change, and all of the model."""
    session = setup.session
    adapted = sum(part.adapted() for part in parts(session.states))
    adapted += sum(layer.live for layer in patched(session.model).values())
    trained = sum(p.numel() for p in session.states.parameters() if p.requires_grad)
    trained -= sum(part.count_held() for part in parts(session.states))
    if "kept" in session.states:  # what earlier phases trained and left in place
        trained += sum(p.numel() for p in session.states["kept"].parameters())
    return {"trained": trained, "adapted": adapted, "total": setup.total}


def measure_changed(setup: Setup) -> float | None:
    """Return the share of the adapted entries that differ from the pretrained ones, as merging would show.

    One layer after the other is compared. None if nothing is adapted, if a part cannot tell, or if memory
    runs out: a trained run must not be lost for this number.
    """
    try:
        changed = _count_changed(setup.session)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        changed = None
    adapted = count_parameters(setup)["adapted"]
    return changed / adapted if changed is not None and adapted else None


def _count_changed(session: Session) -> int | None:
    count = 0
    for part in parts(session.states):
        found = part.count_changed()
        if found is None:
            return None
        count += found
    for layer in patched(session.model).values():
        count += layer.count_changed()
    return count
