"""Compare LoRA with its formula."""

from __future__ import annotations

import torch
from torch import nn

from finetune.core.layer import Patched
from finetune.core.lowrank import LowRank
from finetune.methods.reparam.lora import LoRA
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [
    Case("lora", lambda: LoRA(rank=4), ("vit", "gpt2", "llama")),
    Case(
        "lora dropout",
        lambda: LoRA(rank=4, dropout=0.2, targets=("q", "v", "mlp")),
        data_dependent=True,
    ),
]

PUBLISHED = Published(
    "arXiv 2106.09685: rank and alpha of the released script for RoBERTa base on MNLI, which sets no "
    "dropout; the targets of the text",
    {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ("q", "v")},
    {"targets": (("all",), "all linear layers, as for every other method")},
)

test_contract = contract_test(CASES)


def test_layer_computes_the_formula() -> None:
    torch.manual_seed(0)
    layer, delta = Patched(nn.Linear(6, 5)), LowRank((5, 6), rank=2, alpha=3.0, dropout=0.0)
    delta.b.data.normal_()
    layer.deltas.append(delta)
    x = torch.randn(4, 6)
    expected = x @ (layer.base.weight + 1.5 * delta.b @ delta.a).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_counts_rank_times_in_plus_out() -> None:
    session = contract.begin(LoRA(rank=3, targets=("q", "down")))
    trained = sum(p.numel() for p in session.states["method"].parameters())
    assert trained == 2 * (3 * (32 + 32) + 3 * (48 + 32))
