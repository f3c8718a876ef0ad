"""Check the training loop: learning rates, phases, failures, and the exact loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from finetune.config import later
from finetune.core.loss import count, example_losses
from finetune.core.method import Method, Phase, Run
from finetune.core.sparse.bank import Bank
from finetune.data.encode import collate
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.spt import SPT
from finetune.optim.adamw import AdamW
from finetune.testing import contract
from finetune.training.session import NotFinite, make_optimizer, rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_rates(schedule: Any, expected: list[float]) -> None:
    settings = AdamW(schedule=schedule, warmup=1 / 3)
    assert [rate(settings, step, 6) for step in range(6)] == pytest.approx(expected)


@dataclass(frozen=True)
class TwoPhases(Method):
    """A third of the run and the rest, each with a ``restart`` or ``span`` of its own."""

    schedules: tuple[Any, Any] = ("restart", "restart")
    name: ClassVar[str] = "two_phases"

    def phases(self) -> tuple[Phase, ...]:
        first, second = self.schedules
        return Phase(BitFit(), 1 / 3, first), Phase(BitFit(), 2 / 3, second)


@pytest.mark.parametrize("schedules", [("restart", "restart"), ("span", "restart"), ("restart", "span")])
def test_the_rates_of_a_phase_are_those_of_a_run_of_its_length_or_of_the_whole_run(schedules: Any) -> None:
    settings, total = AdamW(lr=1e-3, schedule="linear", warmup=0.25), 12
    train = replace(contract.TRAIN, steps=total)

    def rates(method: Method, steps: int = total) -> list[float]:
        session = contract.begin(method, train=replace(train, steps=steps), optimizer=settings)
        return [step.lr for step in session.steps()]

    whole = rates(BitFit())
    alone = {"restart": [rates(BitFit(), 4), rates(BitFit(), 8)], "span": [whole[:4], whole[4:]]}
    expected = alone[schedules[0]][0] + alone[schedules[1]][1]
    assert rates(TwoPhases(schedules)) == expected != whole


@dataclass(frozen=True)
class Rewound(Method):
    """Dense first, then the sparse method on the rewound base, with the first phase's change as its start."""

    name: ClassVar[str] = "rewound"
    seen: ClassVar[list[Any]] = []

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(Full(), 0.5), Phase(Second(sparsity=0.5), 0.5))


@dataclass(frozen=True)
class Second(SHiRA):
    """Record what the second phase starts from."""

    def begin(self, run: Run, state: nn.ModuleDict, previous: Any) -> None:
        super().begin(run, state, previous)
        moved = (
            (previous.trained()["vit.layers.0.mlp.fc1.weight"] - contract.tiny().vit.layers[0].mlp.fc1.weight)
            .abs()
            .sum()
            .item()
        )
        Rewound.seen.append((contract.logits(run.model), moved, run.total, run.step))


def test_a_second_phase_starts_from_the_base_and_sees_the_first() -> None:
    Rewound.seen.clear()
    session = contract.finish(contract.begin(Rewound()))
    ((logits, moved, total, step),) = Rewound.seen
    assert torch.equal(logits, contract.logits(contract.tiny()))
    assert moved > 0
    assert (total, step) == (3, 0)
    assert isinstance(session.states["method"]["bank"], Bank)
    assert session.number == 6


def test_phases_resume_to_the_bit_within_and_between() -> None:
    trial = contract.Trial(Rewound)
    contract.check_resume(trial)
    contract.check_same_seed(trial)


def test_a_loss_that_is_not_finite_stops_before_the_step_with_its_examples() -> None:
    session = contract.begin(LoRA(rank=2))
    steps = session.steps()
    next(steps)
    before = {k: v.clone() for k, v in session.states.state_dict().items()}
    session.states["head"].trained()["classifier.bias"].data.fill_(float("nan"))
    with pytest.raises(NotFinite, match="nan at step 2") as caught:
        next(steps)
    assert caught.value.step == 2
    assert sorted(caught.value.ids) == sorted(
        i for b in next(session.batches.steps(1, 2)) if b for i in b.ids
    )
    assert session.number == 1
    after = session.states.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "classifier" not in k)


def test_language_model_loss_is_the_mean_over_tokens_not_over_examples() -> None:
    model, batch = contract.tiny("llama"), collate(contract.examples("llama")[:6])
    logits = model(**batch.inputs).logits
    each = [
        nn.functional.cross_entropy(logits[i, j - 1], batch.inputs["input_ids"][i, j])
        for i in range(6) for j in range(1, int(batch.inputs["attention_mask"][i].sum()))
    ]  # fmt: skip
    assert count(batch.labels) == len(each)
    torch.testing.assert_close(
        example_losses(logits, batch.labels).sum() / count(batch.labels), torch.stack(each).mean()
    )


def test_only_matrices_and_banks_decay() -> None:
    settings = AdamW(weight_decay=0.1)
    bank = contract.begin(SHiRA(sparsity=0.9)).states
    groups = make_optimizer(bank, settings).param_groups
    assert {id(p) for p in groups[0]["params"]} == {
        id(bank["method"]["bank"].values),
        id(bank["head"].trained()["classifier.weight"]),
    }
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)
    biases = contract.begin(BitFit()).states
    assert next(len(g["params"]) for g in make_optimizer(biases, settings).param_groups) == 1


@pytest.mark.parametrize("method", [SNELL(rank=4), SNELLA(rank=4), SPT(sparsity=0.9, batches=1)])
def test_weight_decay_leaves_the_class_token_alone_but_not_that_of_an_old_run(method: Any) -> None:
    """The first step's gradient is the same with and without decay, so only decay can make a difference."""

    def tokens_after_one_step(method: Method, weight_decay: float) -> torch.Tensor:
        settings = AdamW(lr=1e-2, weight_decay=weight_decay)
        session = contract.begin(method, optimizer=settings)
        next(session.steps())
        return session.model.vit.embeddings.cls_token.detach().clone()

    assert later.LATER["method[snell,snella,spt].class_token_decay"] is True
    plain, decayed = tokens_after_one_step(method, 0.0), tokens_after_one_step(method, 0.5)
    assert torch.equal(plain, decayed)
    old = replace(method, class_token_decay=True)
    start = contract.tiny().vit.embeddings.cls_token.detach()
    torch.testing.assert_close(tokens_after_one_step(old, 0.5), plain - 1e-2 * 0.5 * start)


def test_gradients_are_clipped_to_the_norm() -> None:
    session = contract.begin(LoRA(rank=2), train=replace(contract.TRAIN, clip=1e-4))
    norms: list[float] = []
    real = session.optimizer.step

    def step() -> None:
        norms.append(
            float(
                torch.stack([p.grad.norm() for p in session.states.parameters() if p.grad is not None]).norm()
            )
        )
        real()

    session.optimizer.step = step
    contract.finish(session)
    assert norms == pytest.approx([1e-4] * contract.STEPS, rel=1e-3)
