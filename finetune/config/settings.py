"""Define the typed configuration of one run.

The classes only hold values, which ``load`` reads and ``strict`` checks. Methods, data sets, optimizers and
selectors bring dataclasses of their own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from . import later

# Settings that cannot change a run's result.
NOT_THE_RUN = ("name", "run", "logger", "train.save_every", "train.keep_last")


@dataclass(frozen=True)
class ModelConfig:
    """Name the pretrained model.

    Options:
        path: ``builtin:NAME``, a local folder, or a hub id.
        dtype: Type that the weights are loaded in.
        download: Fetch a hub id that is not in the local cache.
        revision: Branch, tag or commit on the hub.
        head: Head of a classifier. ``keep`` takes the checkpoint's, whose labels must be those of the data
            set by name, in any order; ``new`` starts a new one; ``auto`` keeps it if the labels agree, and
            a note says which.
        init: ``pretrained`` reads the weights. ``random`` draws them from ``seed``; the folder then needs no
            weights.
        config: Settings of config.json that are replaced, by their own names. Only with ``init=random``.
        zeros: What becomes of the entries that ``finetune prune`` has set to 0 and that the folder's masks
            name. ``keep`` holds them at 0, ``free`` lets them change; ``null`` keeps them where the folder
            has masks.
    """

    name: str
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    download: bool = False
    revision: str | None = None
    head: Literal["auto", "keep", "new"] = "auto"
    init: Literal["pretrained", "random"] = "pretrained"
    config: dict[str, Any] = field(default_factory=dict)
    zeros: Literal["keep", "free"] | None = None

    def __post_init__(self) -> None:
        if self.config and self.init != "random":
            raise ValueError(
                f"model.config.{next(iter(self.config))} has no effect on pretrained weights. "
                "Leave it out, or set model.init=random."
            )
        if self.head == "keep" and self.init == "random":
            raise ValueError("model.head=keep: model.init=random leaves no head to keep; drop one of them.")
        if self.zeros == "keep" and self.init == "random":
            raise ValueError("model.zeros=keep: model.init=random draws every weight; drop one of them.")


@dataclass(frozen=True)
class TrainConfig:
    """Set the training loop.

    Options:
        steps: Optimizer steps.
        batch_size: Examples in one optimizer step, over all processes. ``auto`` takes as many as fit into one
            pass of every process, at most 512.
        micro_batch_size: Examples in one forward and backward pass; ``null`` takes the whole batch at once.
        eval_batch_size: Examples in one pass of an evaluation.
        precision: Type of the computations. ``bf16`` and ``fp16`` use autocast; ``fp16`` needs a GPU.
        clip: Largest norm of all gradients together; ``null`` does not clip.
        eval_every: Steps between validations; ``null`` validates only at the end.
        save_every: Steps between checkpoints; ``null`` saves one only on a signal or a failure.
        keep_last: Number of checkpoints that stay on disk; ``null`` keeps all.
        max_seconds: Seconds of training after which the run ends early.
        patience: Validations in a row without improvement after which the run ends early. They count from the
            step at which the requested sparsity is reached.
        workers: Processes that load data; 0 loads in the training process.
        select: Which state is stored and tested: the ``best`` on validation, or the ``last``.
        device: Device of the run; ``auto`` takes a GPU if there is one.
        threads: Threads of torch, divided among the processes of a machine; ``null`` leaves it to torch.
    """

    steps: Annotated[int, Ge(1)] = 200
    batch_size: Annotated[int, Ge(1)] | Literal["auto"] = 16
    micro_batch_size: Annotated[int, Ge(1)] | None = None
    eval_batch_size: Annotated[int, Ge(1)] = 100
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: Annotated[float, Gt(0)] | None = 1.0
    eval_every: Annotated[int, Ge(1)] | None = 50
    save_every: Annotated[int, Ge(1)] | None = None
    keep_last: Annotated[int, Ge(1)] | None = 2
    max_seconds: Annotated[float, Gt(0)] | None = None
    patience: Annotated[int, Ge(1)] | None = None
    workers: Annotated[int, Ge(0)] = 0
    select: Literal["best", "last"] = "best"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if self.batch_size == "auto" and self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.micro_batch_size} has no effect with train.batch_size=auto, "
                "which takes the whole batch in one pass; leave one of them out."
            )
        if not self.patience:
            return
        other = ""
        if self.select == "last":
            other = "train.select=last (there is no best checkpoint)"
        if not self.eval_every:
            other = "train.eval_every=null (nothing is validated before the end)"
        if other:
            raise ValueError(
                f"train.patience={self.patience} has no effect with {other}; leave one of them out."
            )


@dataclass(frozen=True)
class LoggerConfig:
    """Say where metrics go besides the folder of the run.

    Options:
        project: Project in W&B.
        group: Group in W&B; ``null`` takes ``name``.
        tags: Further tags of the run in W&B, beside the model and the data set.
    """

    name: Literal["jsonl", "wandb", "none"] = "jsonl"
    project: str = "finetune"
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """Hold all settings of one run.

    ``method``, ``dataset``, ``optimizer``, ``selector`` and ``objective`` are instances of registered
    dataclasses. The training loop reads these sections by name. ``streams`` holds the data sets beside
    ``dataset`` that the objective uses, by the stream's name. ``others`` holds the sections of all other
    kinds of ``registry.KINDS``, by section.
    """

    name: str | None
    run: str | None
    seed: Annotated[int, Ge(0)]
    model: ModelConfig
    method: Any
    dataset: Any
    optimizer: Any
    train: TrainConfig
    logger: LoggerConfig
    selector: Any = None
    objective: Any = None
    streams: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def section(self, name: str) -> Any:
        """Return what the section ``name`` holds."""
        return self.others[name] if name in self.others else getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, from which this configuration can be built again."""
        values = to_plain(self)
        values |= values.pop("others")
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists, as in YAML
        return plain

    def deciding(self) -> dict[str, Any]:
        """Return the part of ``as_dict`` that can change the result; the hash covers it.

        A setting that is newer than some runs is left out if it has the value that those runs had in effect.
        """
        found: dict[str, Any] = _deciding(later.without(self.as_dict()), "")
        return found

    def hash(self) -> str:
        """Return ten hex digits of everything that can change the result."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:10]


def decides(key: str) -> bool:
    """Return whether a setting, by its dotted key, can change a run's result."""
    return not f"{key}.".startswith(tuple(f"{free}." for free in NOT_THE_RUN))


def _deciding(part: Any, prefix: str) -> Any:
    if not isinstance(part, dict):
        return part
    kept = {}
    for name, value in part.items():
        if decides(f"{prefix}{name}"):
            kept[name] = _deciding(value, f"{prefix}{name}.")
    return kept


def to_plain(value: Any) -> Any:
    """Return dataclasses as mappings, at any depth, with the ``name`` and ``former`` of registered ones."""
    if isinstance(value, dict):
        return {key: to_plain(inner) for key, inner in value.items()}
    if not is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    name = getattr(value, "name", None)
    if isinstance(name, str):
        plain["name"] = name
    plain |= getattr(value, "former", {})
    for item in fields(value):
        if item.init:
            plain[item.name] = to_plain(getattr(value, item.name))
    return plain
