"""The typed configuration of one run: what every part of the program may ask for.

The classes only hold values; ``config.py`` fills and checks them. Methods and data sets bring dataclasses of their own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from . import later

# Settings that cannot change a run's result.
NOT_THE_RUN = ("name", "run", "logger", "train.save_every", "train.keep_last")


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model: ``builtin:NAME``, a local folder, or a hub id (fetched only with ``download``)."""

    name: str
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    download: bool = False
    revision: str | None = None


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
    """One run, complete. ``method``, ``dataset``, ``optimizer`` and ``selector`` are instances of registered dataclasses."""

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

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, complete enough to build this config again."""
        plain: dict[str, Any] = json.loads(json.dumps(_plain(self)))  # tuples become lists, as in YAML
        return plain

    def deciding(self) -> dict[str, Any]:
        """Return ``as_dict`` with only the settings that can change the result, as the configuration's hash covers them.

        A setting that is newer than some runs is left out at the value that its absence means.
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


def _plain(value: Any) -> Any:
    """Return dataclasses as mappings, at any depth: a registered one with its name in front, and its former settings."""
    if not is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    name = getattr(value, "name", None)
    if isinstance(name, str):
        plain["name"] = name
    plain |= getattr(value, "former", {})
    for item in fields(value):
        if item.init:
            plain[item.name] = _plain(getattr(value, item.name))
    return plain
