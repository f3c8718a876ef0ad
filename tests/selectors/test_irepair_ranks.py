"""Test that two ranks choose the same slices, from the gradient of both, and end with the same bits."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.methods.baseline.full import Full
from finetune.methods.sparse.shira import SHiRA
from finetune.selectors.irepair import IRepair
from finetune.testing import contract, ranks
from finetune.training.batches import Batches


def train() -> dict[str, Tensor]:
    """Train each kind of part; return what the runs end with, and their slices and sensitivities."""
    kept: dict[str, Tensor] = {}
    for name, method in {"full": Full(), "shira": SHiRA(sparsity=0.9)}.items():
        # The last batch of the stream has three examples: one micro-batch of the second rank is empty.
        session = contract.begin(
            method, train=replace(contract.TRAIN, micro_batch_size=1), selector=IRepair()
        )
        process, world = session.accelerator.process_index, session.accelerator.num_processes
        sets = session.batches.sets
        session.batches = Batches(sets["train"], 8, 1, 0, process, world, streams={"bad": sets["bad"]})
        session.compute.batches = session.batches
        for step in session.steps():
            norms = [value for key, value in step.metrics.items() if key.startswith("sensitivity_")]
            kept[f"{name}/norms {step.number}"] = torch.tensor([*norms, step.metrics["loss_bad"]])
        kept |= {f"{name}/{key}": t.contiguous() for key, t in session.states.state_dict().items()}
        kept[f"{name}/world"] = torch.tensor(world)
    return kept


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_agree_to_the_bit_and_with_one(tmp_path: Path) -> None:
    first, second = ranks.run(__file__, tmp_path)
    alone = train()
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name in ("full", "shira"):
        assert (int(first[f"{name}/world"]), int(alone[f"{name}/world"])) == (2, 1)
        assert torch.equal(first[f"{name}/selector.steps"], alone[f"{name}/selector.steps"])
        for step in range(1, contract.STEPS + 1):
            key = f"{name}/norms {step}"
            torch.testing.assert_close(first[key], alone[key], atol=1e-4, rtol=1e-3)


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
