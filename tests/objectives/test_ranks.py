"""Test that two ranks, with micro-batches of their own and empty ones, train as one process does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from finetune.core.objective import Objective
from finetune.methods.baseline.full import Full
from finetune.objectives.forget import Forget
from finetune.objectives.kd import KD
from finetune.objectives.repair import Repair
from finetune.objectives.squarehead import SquareHead
from finetune.objectives.task import Task
from finetune.testing import contract, ranks

OBJECTIVES: dict[str, Objective] = {
    "task": Task(label_smoothing=0.1, class_weights=(0.5, 2.0, 0.25)),
    "kd": KD(),
    "squarehead": SquareHead(),
    "forget": Forget(forget=0.25, retain=0.5),
    "repair": Repair(),
}


def train() -> dict[str, Tensor]:
    """Train with each objective; return the losses, and what the runs end with."""
    kept: dict[str, Tensor] = {}
    for name, objective in OBJECTIVES.items():
        settings = replace(contract.TRAIN, micro_batch_size=1)  # every third batch has five examples
        session = contract.begin(Full(), train=settings, objective=objective)
        for key, tensor in ranks.record(session).items():
            kept[f"{name}/{key}"] = tensor
    return kept


@pytest.mark.processes
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    ranks.check_agreement(__file__, tmp_path, train())


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
