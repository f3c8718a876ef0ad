"""Test that two ranks train as one process does.

They have micro-batches of their own, empty ones, and in one step one has no example of a stream.
"""

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


# the batch that ends an epoch has one example of the stream, 19 in all, and three of the training data
FEW = replace(contract.TRAIN, batch_size=6)
STREAMS = {"forget": "retain", "repair": "general"}


def train() -> dict[str, Tensor]:
    """Train with each objective; return the losses, and what the runs end with."""
    kept: dict[str, Tensor] = {}
    for name, objective in OBJECTIVES.items():
        settings = replace(contract.TRAIN, micro_batch_size=1)  # every third batch has five examples
        session = contract.begin(Full(), train=settings, objective=objective)
        for key, tensor in ranks.record(session).items():
            kept[f"{name}/{key}"] = tensor
    for name, stream in STREAMS.items():
        session = contract.begin(Full(), train=FEW, objective=OBJECTIVES[name])
        steps = [session.batches.step_of(stream, step) for step in range(FEW.steps)]
        has_none = session.batches.rank > 0  # in one step, while it has examples of the training data
        assert ([None] in steps) == has_none
        for key, tensor in ranks.record(session).items():
            kept[f"{name} without an example/{key}"] = tensor
    return kept


@pytest.mark.processes
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    ranks.check_agreement(__file__, tmp_path, train())


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
