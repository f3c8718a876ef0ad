"""The typed configuration of one run: what every part of the program may ask for.

The classes only hold values; ``config.py`` fills and checks them. Methods and data sets bring dataclasses of their own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Share = Annotated[float, Ge(0), Lt(1)]
# Settings newer than some runs, with what stands for their absence; at it they leave a configuration's hash as it was.
LATER = {"train.patience": None}
NOT_THE_RUN = (
    "name",
    "run",
    "logger",
    "train.save_every",
    "train.keep_last",
)  # settings that cannot change a run's result


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model: ``builtin:NAME``, a local folder, or a hub id (fetched only with ``download``)."""

    name: str
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    download: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule; ``warmup`` is the share of all steps over which the rate rises from zero. ``betas`` are AdamW's."""

    name: Literal["adamw", "sm3"] = "adamw"
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        if self.name == "sm3" and self.betas != OptimizerConfig.betas:
            raise ValueError(
                f"optimizer.betas={list(self.betas)} means nothing to optimizer=sm3, which has no moving averages; leave it out."
            )


@dataclass(frozen=True)
class TrainConfig:
    """The loop. ``batch_size`` counts examples per optimizer step over all processes ("auto": as many as one pass of each holds, at most 512),
    ``micro_batch_size`` what one pass takes. ``threads`` are divided among the processes of a machine. ``patience`` ends a run (once its sparsity is
    reached) after so many validations in a row without a better one.
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
                f"train.micro_batch_size={self.micro_batch_size} means nothing to train.batch_size=auto, which takes all in one pass."
            )
        if self.patience and (not self.eval_every or self.select == "last"):
            other = (
                f"train.select={self.select}, which knows no best"
                if self.eval_every
                else "train.eval_every=null, which never validates"
            )
            raise ValueError(
                f"train.patience={self.patience} means nothing to {other}; leave one of them out."
            )


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides the run folder."""

    name: Literal["jsonl", "wandb", "none"] = "jsonl"
    project: str = "finetune"
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """One run, complete. ``method``, ``dataset`` and ``selector`` are instances of registered frozen dataclasses."""

    name: str | None
    run: str | None
    seed: Annotated[int, Ge(0)]
    model: ModelConfig
    method: Any
    dataset: Any
    optimizer: OptimizerConfig
    train: TrainConfig
    logger: LoggerConfig
    selector: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, complete enough to build this config again."""
        plain: dict[str, Any] = json.loads(json.dumps(_plain(self)))  # tuples become lists, as in YAML
        return plain

    def deciding(self) -> dict[str, Any]:
        """``as_dict`` with only what can change the result: not the run's name, nor where it logs, nor how often it is saved."""
        return {key: _deciding(key, part) for key, part in self.as_dict().items() if decides(key)}

    def hash(self) -> str:
        """Ten hex digits of everything that can change the result."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:10]


def decides(key: str) -> bool:
    """Whether a setting, by its dotted key, can change a run's result."""
    return not f"{key}.".startswith(tuple(f"{free}." for free in NOT_THE_RUN))


def _deciding(key: str, part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {
        name: value
        for name, value in part.items()
        if decides(f"{key}.{name}") and LATER.get(f"{key}.{name}", ...) != value
    }


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, at any depth; a registered one with its name in front."""
    if not is_dataclass(value):
        return value
    named = {"name": name} if isinstance(name := getattr(value, "name", None), str) else {}
    return named | {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
