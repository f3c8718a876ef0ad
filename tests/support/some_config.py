"""A configuration that needs no registered method, for tests of what is written about a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from finetune.config.settings import Config, LoggerConfig, ModelConfig, TrainConfig
from finetune.objectives.task import Task
from finetune.optim.adamw import AdamW


@dataclass(frozen=True)
class SomeMethod:
    name: ClassVar[str] = "lora"
    rank: int = 4
    alpha: float = 1e-5


@dataclass(frozen=True)
class SomeData:
    name: ClassVar[str] = "digits"


@pytest.fixture
def some_config() -> Config:
    model = ModelConfig("tiny_vit", "builtin:tiny_vit")
    return Config(
        "trial",
        None,
        3,
        model,
        SomeMethod(),
        SomeData(),
        AdamW(),
        TrainConfig(),
        LoggerConfig(tags=("mine",), group="grid"),
        objective=Task(),
    )
