"""Put every optimizer of the package to the checks of the contract, with LoRA and with a sparse bank."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune import registry
from finetune.core.method import Method
from finetune.core.optimizer import Optimizer
from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.shira import SHiRA
from finetune.optim.adamw import AdamW
from finetune.optim.mezo import MeZO
from finetune.optim.sm3 import SM3
from finetune.testing import contract, optimizers

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(lr=1e-2, weight_decay=0.1),
    "sm3": SM3(lr=0.1, weight_decay=0.1),
    "mezo": MeZO(lr=1e-3, weight_decay=0.1),
    "sparse_mezo": MeZO(lr=1e-3, sparsity=0.8),
}
METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=2),
    "shira": lambda: SHiRA(sparsity=0.9),
}
TRIALS = {}
for _name, _optimizer in OPTIMIZERS.items():
    for _method, _make in METHODS.items():
        TRIALS[f"{_name}-{_method}"] = contract.Trial(_make, optimizer=_optimizer)


@pytest.mark.parametrize("check", optimizers.CHECKS)
@pytest.mark.parametrize("trial", TRIALS)
def test_contract(trial: str, check: str) -> None:
    optimizers.CHECKS[check](TRIALS[trial])


def test_every_optimizer_is_tried() -> None:
    assert registry.catalog("optimizer").keys() == {optimizer.name for optimizer in OPTIMIZERS.values()}
