"""Compare unlearning with explicit gradients of both batches, and put it to the checks of every objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.encode import collate
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.objectives.forget import Forget
from finetune.testing import contract, objectives, sessions
from finetune.training.batches import choose_examples, derive_seed
from finetune.training.session import Session


def cross_entropy(model: Any, items: list[dict[str, Any]]) -> Tensor:
    """Return the mean over examples, or over the predicted tokens of all texts, one text at a time."""
    losses = []
    for item in items:
        batch = collate([item])
        logits = model(**batch.inputs).logits
        if batch.labels.ndim == 1:
            losses.append(F.cross_entropy(logits, batch.labels, reduction="none"))
        else:
            losses.append(F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


def chosen(items: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    return [items[i] for i in choose_examples(len(items), 8, seed, 0)]


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_loss_and_gradients_are_those_of_both_batches(kind: Any, micro_batch_size: int | None) -> None:
    trial = contract.Trial(Full, kind, objective=Forget(forget=0.5, retain=2.0))
    session = trial.begin(micro_batch_size=micro_batch_size)
    session.start()
    session.tuned.eval()
    found = session._backward(next(session.batches.steps(0, 1)))
    model = contract.tiny(kind)
    forgotten = chosen(contract.examples(kind), 0)
    kept = chosen(contract.examples(kind, sessions.STREAM_EXAMPLES, seed=2), derive_seed(0, "retain"))
    loss = -0.5 * cross_entropy(model, forgotten) + 2.0 * cross_entropy(model, kept)
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-5)
    tuned = dict(session.model.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and tuned[name].grad is not None:
            torch.testing.assert_close(tuned[name].grad, parameter.grad, atol=1e-5, rtol=1e-3)
            compared += 1
    assert compared > 10


def test_both_losses_are_logged_without_their_weights() -> None:
    session = contract.Trial(lambda: LoRA(rank=2), objective=Forget(retain=3.0)).begin()
    step = next(session.steps())
    wanted = 3 * step.metrics["loss_retain"] - step.metrics["loss_forget"]
    assert step.loss == pytest.approx(wanted)
    assert step.metrics["loss_retain"] > 0


def mean_losses(session: Session) -> dict[str, float]:
    _, means = session.compute.evaluate(next(session.batches.steps(0, 1)))
    return means


def test_ascent_raises_the_loss_on_what_is_forgotten_and_a_retain_set_holds_the_other_down() -> None:
    lost: dict[float, float] = {}
    for weight in (1e-3, 5.0):
        session = contract.Trial(Full, objective=Forget(retain=weight)).begin()
        session.start()
        before = mean_losses(session)
        after = mean_losses(contract.finish(session))
        if weight < 1:
            assert after["forget"] > before["forget"]
        lost[weight] = after["retain"] - before["retain"]
    assert lost[5.0] < lost[1e-3]


def test_without_a_weight_there_is_no_stream() -> None:
    assert Forget(retain=0.0).streams() == ()
    session = contract.Trial(lambda: LoRA(rank=2), objective=Forget(retain=0.0)).begin()
    step = next(session.steps())
    assert {batch.stream for batch in session.run.batch} == {"train"}
    assert step.loss < 0


def test_the_weights_are_those_of_the_released_code() -> None:
    """Influence approximation unlearning (arXiv 2507.23257) minimizes mean(D_r) - mean(D_f)."""
    assert (Forget().forget, Forget().retain) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "kind"), [(lambda: LoRA(rank=2), "vit"), (Full, "vit"), (lambda: LoRA(rank=2), "gpt2")]
)
def test_contract(make: Any, kind: Any) -> None:
    objectives.check_objective(Forget(), make, kind)
