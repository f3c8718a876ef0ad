"""What a configuration stands for: model, data and a session, ready to train or to be given a stored change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ..config.settings import Config, TrainConfig
from ..core.part import base, parts, patched
from ..data.encode import Images, encode
from ..errors import ConfigError
from ..models.load import Base, fingerprint, original_parameters
from ..models.load import load as load_model
from ..storage.result import Params
from ..system.environment import sharding
from .batches import Batches
from .evaluate import Evaluation
from .evaluate import evaluate as measure
from .retention import pretrained_head, wearing
from .session import Session

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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

    @property
    def splits(self) -> list[str]:
        """What can be evaluated: retention only where the data set has such rows and, for images, the checkpoint a head."""
        return [s for s in self.data if s != "retention" or not self.labels or self._head]

    def evaluate(self, split: str) -> Evaluation:
        """The model as it is now on one split. Retention of a classifier: its pretrained head's answers, against those before training."""
        if split == "retention" and self._head:
            answered = self._answered
            with wearing(self.session.model, self._head):
                return self._measure(answered)
        return self._measure(self.data[split])

    def _measure(self, data: Any) -> Evaluation:
        return measure(self.session.tuned, data, self.config.train.eval_batch_size, self.session.accelerator)

    @cached_property
    def _head(self) -> dict[str, torch.Tensor] | None:
        return pretrained_head(self.base) if self.labels and "retention" in self.data else None

    @cached_property
    def _answered(self) -> Images:
        """The retention images, labelled by the untrained model with its pretrained head."""
        images: Images = self.data["retention"]
        with (
            base(self.session.states),
            wearing(self.session.model, self._head or {}),
        ):  # base puts a head back, too: first
            answers = [row["prediction"] for row in self._measure(images).rows]
        return Images(
            [{**row, "label": answer} for row, answer in zip(images.rows, answers, strict=True)],
            self.base.processor,
        )


def check_machine(config: Config) -> None:
    """Raise ``ConfigError`` where this machine, or its launcher, cannot compute as the configuration says."""
    settings, faults, cuda = config.train, sharding(os.environ), torch.cuda.is_available()
    if config.model.dtype != "float32" and settings.precision == "fp32":
        faults.append(
            f"model.dtype={config.model.dtype} needs train.precision=bf16 (or fp16 on a GPU): trained values stay in float32 beside it."
        )
    if settings.device == "cuda" and not cuda:
        faults.append("train.device=cuda, but torch sees no CUDA device here. Use train.device=auto.")
    if settings.precision == "fp16" and (settings.device == "cpu" or not cuda):
        faults.append("train.precision=fp16 needs a GPU. Use train.precision=bf16 or fp32 on the CPU.")
    if faults:
        raise ConfigError(*faults)


def make_accelerator(settings: TrainConfig) -> Accelerator:
    """An Accelerator of these settings; earlier ones of this process are forgotten, since their state is shared and fixed."""
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=MIXED[settings.precision])
    accelerator.gradient_accumulation_steps = (
        1  # whatever a launcher's configuration says: it would divide the loss, which is exact here
    )
    return accelerator


def make_deterministic(settings: TrainConfig) -> None:
    """The same seed gives the same bits on one machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode(
        "warn"
    )  # use_deterministic_algorithms does this and imports the compiler, for seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    if settings.threads:
        torch.set_num_threads(max(1, settings.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def prepare(config: Config) -> Setup:
    """Read data and model and attach the method. Every fault of the configuration shows here, before anything is written."""
    check_machine(config)
    accelerator = make_accelerator(config.train)
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
        model.model,
        config.method,
        model.head,
        batches,
        config.optimizer,
        config.train,
        config.seed,
        accelerator,
        lambda: original_parameters(model),
        config.selector,
    )
    return Setup(config, model, raw.labels, data, mark, total, session, raw.notes + model.notes)


def params(setup: Setup) -> Params:
    """Counts of entries: trained ones, those of the model that they can change, and all of the model."""
    adapted = sum(m.original.numel() for m in patched(setup.session.model).values()) + sum(
        part.adapted() for part in parts(setup.session.states)
    )
    trained = sum(p.numel() for p in setup.session.states.parameters() if p.requires_grad)
    return {"trained": trained, "adapted": adapted, "total": setup.total}
