"""Test that two ranks make the same steps without gradients, and those of one process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.core.optimizer import Optimizer
from finetune.methods.baseline.full import Full
from finetune.methods.sparse.sara import SaRA
from finetune.optim.mezo import MeZO
from finetune.optim.sm3 import SM3
from finetune.testing import contract, ranks

OPTIMIZERS: dict[str, Optimizer] = {
    "sm3": SM3(lr=0.01),
    "mezo": MeZO(lr=1e-3),
    "sparse_mezo": MeZO(lr=1e-3, sparsity=0.8),
}
METHODS = {"full": Full(), "sara": SaRA(sparsity=0.9, penalty=0.1)}  # a penalty is counted once, too


def train() -> dict[str, Tensor]:
    """Train with each optimizer; return the losses, and what the runs end with."""
    kept: dict[str, Tensor] = {}
    for name, optimizer in OPTIMIZERS.items():
        for method_name, method in METHODS.items():
            settings = replace(contract.TRAIN, micro_batch_size=1)  # every third batch has five examples
            session = contract.begin(method, train=settings, optimizer=optimizer)
            run = f"{name}-{method_name}"
            for step in session.steps():
                kept[f"{run}/loss {step.number}"] = torch.tensor(step.loss)
            for key, tensor in session.states.state_dict().items():
                kept[f"{run}/{key}"] = tensor.contiguous()
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
