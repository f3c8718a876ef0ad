"""Test that two ranks, with micro-batches of their own and empty ones, train as one process does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
        for step in session.steps():
            kept[f"{name}/loss {step.number}"] = torch.tensor(step.loss)
        for key, tensor in session.states.state_dict().items():
            kept[f"{name}/{key}"] = tensor.contiguous()
    return kept


@pytest.mark.processes
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    first, second = ranks.run(__file__, tmp_path)
    alone = train()
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3, msg=name)


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
