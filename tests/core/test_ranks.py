"""Two processes that train one sparse set together choose the same entries, nearly those of one process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
from finetune.testing import contract, ranks
from finetune.training.batches import Batches

CASES = {
    # one pass scores everything; every third batch has five examples: three here and two there
    "gradient": (
        None,
        Crossing(sparsity=0.9, score="gradient", scope="model", schedule=DropGrow(every=2, rate=0.4)),
    ),
    # scored matrix by matrix; the second process has an empty micro-batch now and then
    "fisher": (1, Crossing(sparsity=0.9, score="fisher", targets=("v",), schedule=Redraw(every=3))),
    "sensitivity": (2, Crossing(sparsity=0.9, score="sensitivity", targets=("v",), batches=3)),
    "random": (None, Crossing(sparsity=0.9, schedule=Redraw(every=2))),
}


def train() -> dict[str, Tensor]:
    """Train all cases; return the losses, the chosen entries and the final states."""
    kept: dict[str, Tensor] = {}
    for name, (micro, method) in CASES.items():
        session = contract.begin(method, train=replace(contract.TRAIN, micro_batch_size=micro))
        process, world = session.accelerator.process_index, session.accelerator.num_processes
        kept["world"] = torch.tensor(world)
        session.batches = Batches(
            session.batches.data, session.recipe.train.batch_size, micro, 0, process, world
        )
        bank = session.states["method"]["bank"]
        starts = torch.tensor([0, *bank.sizes]).cumsum(0)
        for step in session.steps():
            kept[f"{name}/loss {step.number}"] = torch.tensor(step.loss)
            kept[f"{name}/chosen {step.number}"] = torch.cat(
                [bank.positions(i) + starts[i] for i in range(len(bank.sizes))]
            )
        kept |= {f"{name}/{key}": t.contiguous() for key, t in session.states.state_dict().items()}
        kept |= {f"{name}/{key}": t for key, t in session.optimizer.state[bank.values].items()}
    return kept


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_agree_to_the_bit_and_nearly_with_one(tmp_path: Path) -> None:
    first, second = ranks.run(__file__, tmp_path)
    alone = train()
    assert (int(first["world"]), int(alone["world"])) == (2, 1)
    assert first.keys() == second.keys() == alone.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name, (_, method) in CASES.items():
        k = len(alone[f"{name}/method.bank.values"])
        assert len(first[f"{name}/method.bank.values"]) == k
        assert first[f"{name}/method.bank.values"].all(), "every entry has moved"
        for step in range(1, contract.STEPS + 1):
            torch.testing.assert_close(
                first[f"{name}/loss {step}"], alone[f"{name}/loss {step}"], atol=1e-3, rtol=1e-3
            )
            ours, theirs = (set(t[f"{name}/chosen {step}"].tolist()) for t in (first, alone))
            assert len(ours) == len(theirs) == k, "exactly K"
            assert len(ours & theirs) > (0.9 if method.score == "gradient" and step > 2 else 0.999) * k
        churn = len(set(first[f"{name}/chosen 6"].tolist()) - set(first[f"{name}/chosen 1"].tolist())) / k
        assert (churn > 0.1) == (method.schedule.name != "static"), churn


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
