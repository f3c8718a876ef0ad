"""Check the invariants of SquareHead; they are those of its formula and of the released loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.core.run import Seen
from finetune.data.encode import Batch, collate
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.objectives.squarehead import SquareHead, relative_errors
from finetune.testing import contract, objectives

EPS = 2.0**-7


def states(layers: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 5, 8, generator=generator) * 10**i for i in range(layers))


def test_defaults_are_those_of_the_released_script() -> None:
    method = SquareHead()
    assert (method.task, method.squarehead, method.kl, method.temperature) == (1.0, 1.0, 0.0, 1.0)
    assert method.eps == torch.finfo(torch.bfloat16).eps


def test_equal_states_have_no_error_and_no_gradient() -> None:
    student = tuple(s.requires_grad_() for s in states())
    found = relative_errors(student, states(), None, EPS)
    assert found.tolist() == [0.0] * 3
    for gradient in torch.autograd.grad(found.sum(), student):
        assert not gradient.any()


def test_states_of_zero_have_an_error_just_below_one_each() -> None:
    teacher = states()
    found = relative_errors(tuple(torch.zeros_like(t) for t in teacher), teacher, None, EPS)
    for error, t in zip(found, teacher, strict=True):
        mean = t.square().mean()
        torch.testing.assert_close(error, mean / (mean + EPS))
    assert 2.9 < float(found.sum()) < 3


def test_the_scale_of_a_layer_does_not_matter_where_it_is_far_above_eps() -> None:
    student, teacher = states(2, 1), states(2)
    small = relative_errors(student, teacher, None, EPS)[1]
    large = relative_errors((student[1] * 1000,), (teacher[1] * 1000,), None, EPS)[0]
    torch.testing.assert_close(small, large, rtol=1e-3, atol=0)


def test_padding_does_not_count() -> None:
    student, teacher = states(3, 1), states()
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    found = relative_errors(student, teacher, mask, EPS)
    other = tuple(s.masked_fill(mask[:, :, None] == 0, 1e6) for s in student)
    assert torch.equal(relative_errors(other, teacher, mask, EPS), found)
    longer = tuple(torch.cat([s, torch.randn(4, 2, 8)], 1) for s in student)
    wider = tuple(torch.cat([t, torch.randn(4, 2, 8)], 1) for t in teacher)
    torch.testing.assert_close(
        relative_errors(longer, wider, torch.cat([mask, mask[:, :2] * 0], 1), EPS), found
    )


def test_layers_are_summed() -> None:
    student, teacher = states(3, 1), states()
    once = relative_errors(student, teacher, None, EPS).sum()
    torch.testing.assert_close(relative_errors(student * 2, teacher * 2, None, EPS).sum(), 2 * once)


def test_the_output_of_the_embeddings_is_left_out_and_every_block_counts() -> None:
    """The term of one batch is the sum of the relative errors of all blocks, for every model."""
    for kind, blocks in (("vit", 2), ("llama", 2), ("gpt2", 2)):
        objective = SquareHead(task=0.0)
        session = contract.Trial(lambda: LoRA(rank=2), kind, objective=objective).begin()  # type: ignore[arg-type]
        batch = next(session.batches.steps(0, 1))[0]
        assert batch is not None
        seen = session.tuned(("hidden",), **batch.inputs)
        assert len(seen.hidden) == blocks + 1
        moved = Seen(seen.logits, (seen.hidden[0] + 1, *(h + 1 for h in seen.hidden[1:])))
        session.references._made["base"] = Fixed(seen)
        total = objective.terms(session.run, moved, batch)["squarehead"]
        wanted = relative_errors(moved.hidden[1:], seen.hidden[1:], batch.inputs.get("attention_mask"), EPS)
        torch.testing.assert_close(total / objective.counts(session.run, batch)["squarehead"], wanted.sum())


class Fixed:
    """A reference that always gives the same."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.model = seen, None

    def __call__(self, batch: Any) -> Seen:
        return self.seen


def test_tokens_are_those_of_the_attention_mask() -> None:
    batch: Batch = collate(contract.examples("llama")[:4])
    counted = SquareHead().count_term("squarehead", batch)
    assert counted == sum(len(item["input_ids"]) for item in contract.examples("llama")[:4])
    assert SquareHead().count_term("task", batch) == counted - 4


@pytest.mark.parametrize(("make", "kind"), [(Full, "vit"), (lambda: LoRA(rank=2), "llama")])
def test_contract(make: Any, kind: Any) -> None:
    objectives.check_objective(replace(SquareHead(), kl=0.5), make, kind)
