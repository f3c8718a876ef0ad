"""Test that two ranks make the same steps without gradients, and those of one process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
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
            for key, tensor in ranks.record(session).items():
                kept[f"{name}-{method_name}/{key}"] = tensor
    return kept


@pytest.mark.processes
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    ranks.check_agreement(__file__, tmp_path, train())


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
