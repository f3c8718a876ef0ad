"""Compare the task's own loss with torch's cross-entropy over the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.core.loss import IGNORED
from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LoRA
from finetune.objectives.task import Task
from finetune.testing import contract, objectives
from finetune.training.session import Session

WEIGHTS = (0.5, 2.0, 0.25)


def begin(objective: Task, kind: Any, **train: Any) -> Session:
    trial = contract.Trial(lambda: LoRA(rank=2), kind, objective=objective)
    session = trial.begin(**train)
    session.start()
    session.tuned.eval()
    return session


def expected_loss(session: Session, **options: Any) -> torch.Tensor:
    """Return torch's loss of the first step's batch in one piece."""
    session.batches.micro_batch_size = None
    (batch,) = next(session.batches.steps(0, 1))
    assert batch is not None
    logits = session.tuned(**batch.inputs).logits
    if batch.labels.ndim == 1:
        return F.cross_entropy(logits, batch.labels, **options)
    targets = batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, **options)


@pytest.mark.parametrize(
    ("kind", "objective", "options"),
    [
        ("vit", Task(), {}),
        ("llama", Task(), {}),
        ("vit", Task(label_smoothing=0.3), {"label_smoothing": 0.3}),
        ("llama", Task(label_smoothing=0.3), {"label_smoothing": 0.3}),
        ("vit", Task(class_weights=WEIGHTS), {"weight": torch.tensor(WEIGHTS)}),
        (
            "vit",
            Task(label_smoothing=0.2, class_weights=WEIGHTS),
            {"weight": torch.tensor(WEIGHTS), "label_smoothing": 0.2},
        ),
    ],
)
def test_micro_batches_give_torch_s_loss_and_gradient_of_the_whole_batch(
    kind: Any, objective: Task, options: dict[str, Any]
) -> None:
    session = begin(objective, kind, micro_batch_size=3)
    loss = session._backward(next(session.batches.steps(0, 1)))
    parameters = [p for p in session.states.parameters() if p.requires_grad]
    wanted = expected_loss(session, **options)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-7)


def test_balanced_weights_give_every_class_the_same_total() -> None:
    session = begin(Task(class_weights="balanced"), "vit")
    counts = session.run.class_counts()
    labels = [item["label"] for item in contract.examples()]
    assert counts == [labels.count(i) for i in range(3)]
    weights = Task(class_weights="balanced").weigh_classes(session.run)
    assert weights is not None
    totals = [float(w) * n for w, n in zip(weights, counts, strict=True)]
    assert totals == pytest.approx([len(labels) / 3] * 3)


def test_a_class_weight_of_zero_trains_nothing_on_that_class_alone() -> None:
    """A step whose examples all have weight 0 has loss 0 and no gradient, and no division by zero."""
    session = begin(Task(class_weights=(0.0, 0.0, 1.0)), "vit")
    micro = next(session.batches.steps(0, 1))
    for batch in micro:
        assert batch is not None
        batch.labels.clamp_(max=1)
    assert session._backward(micro) == 0
    assert not any(p.grad is not None and p.grad.any() for p in session.states.parameters())


@pytest.mark.parametrize(
    ("kind", "objective", "words"),
    [
        ("vit", Task(class_weights=(1.0, 2.0)), r"=\[1,2\] has 2 weights, but the data set has 3 classes"),
        ("vit", Task(class_weights=(0.0, 0.0, 0.0)), r"=\[0,0,0\] are all 0, so nothing is minimized"),
        ("llama", Task(class_weights="balanced"), "=balanced has no effect on a language model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(kind: Any, objective: Task, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(objective, kind)


def test_contract() -> None:
    objectives.check_objective(Task(label_smoothing=0.1, class_weights=WEIGHTS), lambda: LoRA(rank=2))
