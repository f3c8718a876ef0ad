"""Test that two ranks choose the same blocks, score them alike and end with the same bits."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.shira import SHiRA
from finetune.selectors.ist import IST
from finetune.testing import contract, ranks
from finetune.training.batches import Batches


def train() -> dict[str, Tensor]:
    """Train each kind of part; return what the runs end with, and their losses and choices on the way."""
    kept: dict[str, Tensor] = {}
    for name, method in {"lora": LoRA(rank=2), "shira": SHiRA(sparsity=0.9)}.items():
        # Every third batch has five examples: one micro-batch of the second rank is empty, and its share of
        # the loss differs.
        session = contract.begin(
            method, train=replace(contract.TRAIN, micro_batch_size=1), selector=IST(every=2)
        )
        process, world = session.accelerator.process_index, session.accelerator.num_processes
        session.batches = Batches(session.batches.data, 8, 1, 0, process, world)
        chosen: list[int] = []
        for step in session.steps():
            chosen += session.states["selector"].chosen  # type: ignore[arg-type]  # a list
            kept[f"{name}/loss {step.number}"] = torch.tensor(step.loss)
        kept |= {f"{name}/{key}": t.contiguous() for key, t in session.states.state_dict().items()}
        kept |= {f"{name}/chosen": torch.tensor(chosen), f"{name}/world": torch.tensor(world)}
    return kept


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    first, second = ranks.run(__file__, tmp_path)
    alone = train()
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name in ("lora", "shira"):
        assert (int(first[f"{name}/world"]), int(alone[f"{name}/world"])) == (2, 1)
        assert torch.equal(first[f"{name}/chosen"], alone[f"{name}/chosen"])
        assert first[f"{name}/selector.scores"].any()
        torch.testing.assert_close(
            first[f"{name}/selector.scores"], alone[f"{name}/selector.scores"], atol=1e-4, rtol=1e-3
        )
        for step in range(1, contract.STEPS + 1):
            torch.testing.assert_close(
                first[f"{name}/loss {step}"], alone[f"{name}/loss {step}"], atol=1e-4, rtol=1e-4
            )


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
