"""Test ID3 step by step: which entries come in, and with which moments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.core.attach import patched
from finetune.core.loss import count, example_losses
from finetune.methods.sparse.id3 import ID3
from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.grow import Grow
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [Case("id3", lambda: ID3(sparsity=0.9), ("vit", "gpt2"), data_dependent=True)]

PUBLISHED = Published(
    "arXiv 2408.14470: the schedule of the paper, eps and power of the README's example",
    {
        "score": "d3",
        "scope": "model",
        "schedule": Grow(every=1, end=1.0),
        "eps": 1e-3,
        "power": 0.0,
        "decay": "base",
        "selection": "train",
    },
    {
        "power": (1.0, "0 would be the size of the gradient alone, which is another score"),
        "selection": ("eval", "the choice does not depend on the draws of dropout"),
    },
)

test_contract = contract_test(CASES)

SITES: dict[str, Any] = {"targets": ("q", "down"), "sparsity": 0.9}


def chosen(session: Any) -> set[tuple[int, int]]:
    bank = session.states["method"]["bank"]
    return {(i, at) for i in range(len(bank.sizes)) for at in bank.positions(i).tolist()}


def gradients(session: Any) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's current weight and its gradient on the next step's batch, by autograd on a plain
    model."""
    twin = contract.tiny()
    with torch.no_grad():
        for name, p in session.states["head"].trained().items():
            twin.get_parameter(name).copy_(p)
        for name, layer in patched(session.model).items():
            twin.get_submodule(name).weight.copy_(layer.weight)
    weights = [twin.get_submodule(name).weight for name in patched(session.model)]
    (batch,) = session.run.upcoming(1)[0]
    (example_losses(twin(**batch.inputs).logits, batch.labels).sum() / count(batch.labels)).backward()
    return [(w.detach(), w.grad) for w in weights]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_each_part_is_the_best_of_those_not_chosen_yet(power: float) -> None:
    """Counts are exact, no entry leaves, and unchosen entries keep their bits."""
    method = ID3(power=power, eps=1e-3, **SITES)
    session = contract.begin(method)
    original = [layer.original.clone() for layer in patched(session.model).values()]
    whole = sum(w.numel() for w in original)
    k, before = whole - round(0.9 * whole), set[tuple[int, int]]()
    steps, number = session.steps(), 0
    while number < contract.STEPS:
        scores = [(g.abs() / (w.abs() + 1e-3) ** power).reshape(-1) for w, g in gradients(session)]
        next(steps)
        number += 1
        now = chosen(session)
        assert before < now
        assert len(now) == round(k * number / contract.STEPS)
        new = now - before
        outside = [
            scores[i][[at for at in range(len(s)) if (i, at) not in now]].max() for i, s in enumerate(scores)
        ]
        assert min(float(scores[i][at]) for i, at in new) >= float(max(outside)) * (1 - 1e-4)
        for i, layer in enumerate(patched(session.model).values()):
            kept = torch.ones(layer.original.numel(), dtype=torch.bool)
            kept[[at for j, at in now if j == i]] = False
            assert torch.equal(layer.weight.reshape(-1)[kept], original[i].reshape(-1)[kept])
        before = now
    assert len(before) == k


def with_dropout() -> Any:
    """Return the tiny model with dropout in its MLPs and attention outputs."""
    model = contract.tiny()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return model


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_gradient_that_chooses_is_that_of_the_mode_and_of_the_steps_own_dropout(mode: Any) -> None:
    """In train mode the oracle is the gradient of a plain model with the random numbers of the step."""
    method = ID3(schedule=Grow(every=5, end=0.9), selection=mode, **SITES)
    session = contract.begin(method, model=with_dropout())
    plain = with_dropout().train(mode == "train")
    session.tuned.train()
    before = torch.get_rng_state()
    session.start()
    assert torch.equal(torch.get_rng_state(), before)
    (batch,) = session.run.upcoming(1)[0]
    torch.set_rng_state(before)
    (example_losses(plain(**batch.inputs).logits, batch.labels).sum() / count(batch.labels)).backward()
    scores = []
    for name in patched(session.model):
        weight = plain.get_submodule(name).weight
        scores.append((weight.grad.abs() / (weight.detach().abs() + 1e-3)).reshape(-1))
    whole = torch.cat(scores)
    offsets = [0, *torch.tensor([len(s) for s in scores]).cumsum(0).tolist()]
    found = torch.tensor(sorted(offsets[i] + at for i, at in chosen(session)))
    best = whole.topk(len(found)).indices.sort().values
    assert len(set(found.tolist()) & set(best.tolist())) >= 0.99 * len(best)


def test_a_mode_that_no_gradient_uses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.selection=train has no effect with score=magnitude"):
        Crossing(score="magnitude", selection="train")


def test_power_zero_does_not_see_the_weight() -> None:
    """With a power, the smaller of two weights with equal gradients is chosen first."""
    from finetune.core.sparse.scores import ScoredSite, score_named

    g = torch.tensor([[1.0, 1.0]])

    def score(power: float) -> Tensor:
        w = torch.tensor([[3.0, 0.5]])
        layer: Any = type("Layer", (), {"weight": w, "original": w})()
        return score_named("d3")(ScoredSite(layer, torch.Generator(), g.clone()), ID3(power=power))

    assert torch.equal(score(0.0), g)
    torch.testing.assert_close(score(1.0), torch.tensor([[1 / 3.001, 1 / 0.501]]))


def test_all_at_once_is_a_one_shot_gradient_mask() -> None:
    """With one part before the first step, the run is that of the fixed mask, to the bit."""
    growing = contract.finish(contract.begin(ID3(schedule=Grow(every=5, end=0.9), **SITES)))
    fixed = contract.finish(contract.begin(Crossing(score="d3", scope="model", **SITES)))
    contract.same_values(growing.states, fixed.states)


def test_an_entry_has_no_moments_before_it_is_chosen() -> None:
    """Its first update uses the bias correction of the whole run."""
    session = contract.begin(ID3(**SITES), train=replace(contract.TRAIN, steps=3, clip=None))
    bank: Any = session.states["method"]["bank"]
    steps = session.steps()
    next(steps), next(steps)
    before = chosen(session)
    lr, (b1, b2), eps = 1e-2, (0.9, 0.999), 1e-8
    step = next(steps)
    state = session.optimizer.state[bank.values]
    assert float(state["step"]) == 3
    new = 0
    for i, (a, b) in enumerate(zip(bank.bounds(), bank.bounds()[1:], strict=False)):
        for slot, at in zip(range(a, b), bank.positions(i).tolist(), strict=True):
            if (i, at) not in before:
                g = float(state["exp_avg"][slot]) / (1 - b1)
                root = (float(state["exp_avg_sq"][slot]) / (1 - b2**3)) ** 0.5
                assert float(bank.values.detach()[slot]) == pytest.approx(
                    -step.lr * (1 - b1) * g / (1 - b1**3) / (root + eps), rel=1e-3
                )
                assert float(state["exp_avg_sq"][slot]) == pytest.approx((1 - b2) * g * g, rel=1e-3)
                new += 1
    assert new > 10
    assert step.lr <= lr
