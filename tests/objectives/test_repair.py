"""Compare repair with its formula on both batches, and put it to the checks of every objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.data.encode import collate
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.objectives.repair import Repair
from finetune.testing import contract, objectives, sessions
from finetune.training.batches import choose_examples, derive_seed


def predict(model: Any, item: dict[str, Any]) -> Tensor:
    """Return log p of every token of a text that follows another one."""
    batch = collate([item])
    logits: Tensor = model(**batch.inputs).logits[0, :-1]
    return logits.log_softmax(-1)


def test_the_loss_is_its_formula_text_by_text() -> None:
    session = contract.Trial(Full, "gpt2", objective=Repair(task=0.25, kl=3.0)).begin()
    steps = session.steps()
    next(steps), next(steps)
    session.tuned.eval()
    (step,) = list(session.batches.steps(1, 2))
    found = session._backward(step)
    texts, general = contract.examples("gpt2"), contract.examples("gpt2", sessions.STREAM_EXAMPLES, seed=2)
    losses, divergences, base = [], [], contract.tiny("gpt2")
    with torch.no_grad():
        for i in choose_examples(len(texts), 8, 0, 1):
            chances, targets = predict(session.model, texts[i]), torch.tensor(texts[i]["input_ids"][1:])
            losses.append(-chances.gather(1, targets[:, None])[:, 0])
        for i in choose_examples(len(general), 8, derive_seed(0, "general"), 1):
            p, q = predict(base, general[i]), predict(session.model, general[i])
            divergences.append((p.exp() * (p - q)).sum(-1))
    mean = torch.cat(divergences).mean().item()
    assert mean > 1e-4, "the model has not moved, so the test is void"
    assert found == pytest.approx(0.25 * torch.cat(losses).mean().item() + 3.0 * mean, abs=1e-5)


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_the_first_step_is_pure_repair(kind: Any) -> None:
    """Invariant: where the model is the teacher, the divergence and its gradient are 0."""
    gradients = []
    for kl in (1.0, 100.0):
        session = contract.Trial(Full, kind, objective=Repair(kl=kl)).begin()
        session.start()
        session.tuned.eval()
        session._backward(next(session.batches.steps(0, 1)))
        assert abs(session.run.metrics["loss_kl"]) < 1e-6
        gradients.append([p.grad for p in session.states.parameters() if p.grad is not None])
    for small, large in zip(*gradients, strict=True):
        torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-3)


def test_the_weights_are_those_of_the_released_code() -> None:
    assert (Repair().task, Repair().kl, Repair().temperature) == (0.5, 1.0, 1.0)


@pytest.mark.parametrize(("make", "kind"), [(lambda: LoRA(rank=2), "vit"), (Full, "gpt2")])
def test_contract(make: Any, kind: Any) -> None:
    objectives.check_objective(Repair(), make, kind)
