"""Test that an objective sees what it says it needs, of the trained model and of a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from finetune.core.loss import count, example_losses
from finetune.core.method import Method, Run
from finetune.core.objective import Need, Objective
from finetune.core.run import Seen
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.testing import contract, objectives


@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """The task's loss, and the squared distance between the attention weights of student and base."""

    name: ClassVar[str] = "attention_transfer"
    needs: ClassVar[tuple[Need, ...]] = ("attention",)

    def references(self) -> tuple[str, ...]:
        return ("base",)

    def counts(self, run: Run, batch: Any) -> dict[str, float]:
        return {"task": count(batch.labels), "attention": len(batch.ids)}

    def terms(self, run: Run, seen: Seen, batch: Any) -> dict[str, Tensor]:
        taught = run.reference("base")(batch).attention
        assert len(seen.attention) == len(taught) == 2
        distances = [(s - t).square().sum() for s, t in zip(seen.attention, taught, strict=True)]
        task = example_losses(seen.logits, batch.labels).sum()
        return {"task": task, "attention": torch.stack(distances).sum()}


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
@pytest.mark.parametrize("method", [LoRA(rank=2), Full()], ids=["shared", "read"])
def test_attention_weights_are_those_of_unfused_attention(kind: Any, method: Method) -> None:
    session = contract.begin(method, kind, objective=AttentionTransfer())
    session.start()
    batch = next(session.batches.steps(0, 1))[0]
    assert batch is not None
    plain = contract.tiny(kind)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = plain(**batch.inputs, output_attentions=True).attentions
        seen = session.tuned.eval()(("attention",), **batch.inputs).attention
    for found in (seen, session.run.reference("base")(batch).attention):
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:-1]))


def test_what_is_not_needed_is_not_kept() -> None:
    session = contract.begin(LoRA(rank=2))
    batch = next(session.batches.steps(0, 1))[0]
    assert batch is not None
    seen = session.tuned(**batch.inputs)
    assert (seen.hidden, seen.attention) == ((), ())


@pytest.mark.parametrize("check", ["resume", "passes", "terms"])
def test_contract(check: str) -> None:
    """Those checks that do not compare with a model of fused attention, whose last bits differ."""
    objectives.CHECKS[check](contract.Trial(Full, objective=AttentionTransfer()))
