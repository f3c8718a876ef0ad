"""Test AMT and R-AMT.

The oracles are autograd over dense weights, a Monte Carlo mean, and the pretrained model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.core.attach import merge, patched
from finetune.core.layer import changed_linear
from finetune.errors import ConfigError
from finetune.methods.reparam.amt import AMT, Mask, damp
from finetune.optim.adamw import AdamW
from finetune.storage.delta import load_delta, save_delta, tensors_to_store
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.session import Session, make_optimizer

CASES = [
    Case("amt", AMT, ("vit", "gpt2"), data_dependent=True, budget=393_216),
    Case("amt plain", lambda: AMT(gdr=0.0), data_dependent=True),
]

PUBLISHED = Published(
    "arXiv 2307.15049: the configurations of the released code",
    {
        "targets": ("attention",),
        "initial": 1e-2,
        "threshold": 5e-3,
        "penalty": 1e-4,
        "gdr": 1.0,
        "temperature": 1.0,
    },
)

test_contract = contract_test(CASES)


def masks(session: Session) -> list[Mask]:
    return [m for m in session.states.modules() if isinstance(m, Mask)]


def make(shape: tuple[int, int] = (6, 5)) -> Mask:
    """Return a mask with about half of its weights off."""
    delta = Mask(shape, 1e-2, 5e-3)
    delta.scores.data.add_(1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return delta


def test_at_the_start_all_is_on_and_the_output_is_the_base_s() -> None:
    session = contract.begin(AMT())
    session.start()
    assert not any(m.off().any() for m in masks(session))
    assert torch.equal(contract.logits(session.tuned), contract.logits(contract.tiny()))
    assert set(patched(session.model)) == {
        f"vit.layers.{i}.attention.{n}_proj" for i in (0, 1) for n in "qkvo"
    }


def test_the_threshold_itself_masks() -> None:
    delta = Mask((1, 3), 1.0, 0.5)
    delta.scores.data.copy_(torch.tensor([[0.5, 0.5000001, 0.4]]))
    assert delta.off().tolist() == [[True, False, True]]


@pytest.mark.parametrize("gate", [1.0, 0.5])
def test_gradient_of_the_scores_is_the_dense_gradient_times_the_weight(gate: float) -> None:
    delta = make()
    delta.gate = gate
    weight = torch.randn(6, 5)
    x = torch.randn(4, 5, requires_grad=True)
    y = changed_linear(x, weight, None, [delta])
    found = torch.autograd.grad(y.square().sum(), [x, delta.scores])
    on = delta.scores.detach() > 5e-3
    assert 5 < int(on.sum()) < 25
    dense = (weight - gate * weight * ~on).requires_grad_()
    expected = F.linear(x, dense)
    grad_x, grad = torch.autograd.grad(expected.square().sum(), [x, dense])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found[0], grad_x)
    torch.testing.assert_close(found[1], gate * grad * weight)
    torch.testing.assert_close(
        torch.autograd.grad((delta(weight) * grad).sum(), delta.scores)[0], grad * weight
    )


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_zero_or_the_pretrained_bits(kind: Any, dtype: torch.dtype) -> None:
    precision: Any = "fp32" if dtype == torch.float32 else "bf16"
    session = contract.finish(
        contract.begin(
            AMT(), kind, replace(contract.TRAIN, precision=precision), model=contract.tiny(kind).to(dtype)
        )
    )
    names = list(patched(session.model))
    merge(session.model, session.states)
    original, zeros, total = contract.tiny(kind).to(dtype), 0, 0
    for name in names:
        new, old = session.model.get_submodule(name).weight, original.get_submodule(name).weight
        assert new.dtype == dtype
        assert torch.equal(new, torch.where(new == 0, torch.zeros_like(old), old))
        zeros, total = zeros + int((new == 0).sum()), total + new.numel()
    assert 0.05 < zeros / total < 0.95


A, B = (
    torch.randn(2, 4000, generator=torch.Generator().manual_seed(1)) * 1e-9
)  # as small as gradients of means may be
UNIFORM = torch.rand(4000, generator=torch.Generator().manual_seed(2))


def test_gradient_dropout_leaves_what_does_not_conflict() -> None:
    assert torch.equal(damp(A, torch.zeros_like(A), 1.0, UNIFORM), A)
    assert torch.equal(damp(A, B.abs() * A.sign(), 1.0, UNIFORM), A)
    assert torch.equal(damp(A, B, 0.0, UNIFORM), A)
    assert not damp(torch.zeros_like(A), B, 1.0, UNIFORM).any()


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_gradient_dropout_in_the_mean(strength: float) -> None:
    """With strength 1 and opposite signs the mean of the gradient is a |a| / (|a| + |b|)."""
    a, b = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([-1.0, 3.0, -0.5, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([damp(a, b, strength, torch.rand(4, generator=generator)) for _ in range(20000)])
    p = (1 + a.sign() * (a + b) / (a.abs() + b.abs())) / 2
    assert p.tolist() == pytest.approx([2 / 3, 1 / 4, 1 / 2, 1])
    torch.testing.assert_close(drawn.mean(0), a * (1 - strength + strength * p), atol=0.03, rtol=0)
    for column, value in zip(drawn.T, a, strict=True):
        assert all(min(abs(x - value), abs(x - value * (1 - strength))) < 1e-6 for x in column.unique())


def dense(session: Session, kind: Any, changed: bool) -> Any:
    """Return a plain model in eval mode with the session's head, and pretrained or current weights."""
    model = contract.tiny(kind)
    if "head" in session.states:
        model.load_state_dict(session.states["head"].trained(), strict=False)
    for name, layer in patched(session.model).items() if changed else ():
        weight = model.get_submodule(name).weight
        weight.data.copy_(layer.weight.T if layer.transposed else layer.weight)
    return model


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_distilled_gradient_is_that_of_dense_models(kind: Any) -> None:
    """Micro-batches, examples or tokens, are unequal; the teacher has pretrained weights and the current
    head."""
    method = AMT(gdr=0.0, temperature=2.0)
    session = contract.finish(contract.begin(method, kind, replace(contract.TRAIN, micro_batch_size=3)))
    assert (
        sum(int(m.off().sum()) for m in masks(session)) / sum(m.scores.numel() for m in masks(session)) > 0.01
    )
    session.run.batch = [*next(session.batches.steps(0, 1)), None]
    found = method.teacher_gradients(
        session.run, session.states["method"], [m.scores for m in masks(session)]
    )
    student, teacher = dense(session, kind, True), dense(session, kind, False)
    loss, counted = torch.zeros(()), 0
    for batch in session.run.batch[:-1]:
        logits, wanted = (m(**batch.inputs).logits for m in (student, teacher))
        for i in range(len(logits)):
            places = [...] if kind == "vit" else range(int(batch.inputs["attention_mask"][i].sum()) - 1)
            for place in places:
                loss = (
                    loss
                    + F.kl_div(
                        F.log_softmax(logits[i, place] / 2, -1),
                        F.softmax(wanted[i, place].detach() / 2, -1),
                        reduction="sum",
                    )
                    * 4
                )
                counted += 1
    names = list(patched(session.model))
    grads = torch.autograd.grad(loss / counted, [student.get_submodule(name).weight for name in names])
    for mine, grad, name in zip(found, grads, names, strict=True):
        true = grad * teacher.get_submodule(name).weight
        torch.testing.assert_close(mine, true.T if kind == "gpt2" else true, rtol=2e-3, atol=1e-9)
        assert mine.abs().sum() > 0


def test_scores_step_with_the_damped_gradient() -> None:
    """An element is a, or sometimes (1 - gdr) a where the signs differ; the default generator is not used."""
    method = AMT(gdr=0.3)
    session = contract.finish(contract.begin(method))
    session.tuned.train()
    micro = next(session.batches.steps(0, 1))
    session.run.batch = micro
    session._backward(micro)
    a = [m.scores.grad.clone() for m in masks(session) if m.scores.grad is not None]
    rng = torch.get_rng_state()
    b = method.teacher_gradients(session.run, session.states["method"], [m.scores for m in masks(session)])
    method.after_backward(session.run, session.states["method"])
    assert torch.equal(rng, torch.get_rng_state())
    assert session.tuned.training
    dropped = 0
    for mask, plain, other in zip(masks(session), a, b, strict=True):
        grad = mask.scores.grad
        assert grad is not None
        less = grad != plain
        torch.testing.assert_close(grad[less], 0.7 * plain[less])
        assert not (less & (plain * other > 0)).any()
        dropped += int(less.sum())
    assert dropped > 100
    assert session.states["head"].get_parameter("classifier/weight").grad is not None


def test_at_the_first_step_the_teacher_is_the_student_and_drops_nothing() -> None:
    method = AMT()
    session = contract.begin(method)
    session.start()
    session.run.batch = next(session.batches.steps(0, 1))
    session._backward(session.run.batch)
    for mask, b in zip(
        masks(session),
        method.teacher_gradients(session.run, session.states["method"], [m.scores for m in masks(session)]),
        strict=True,
    ):
        assert mask.scores.grad is not None
        assert b.abs().max() < 1e-5 * mask.scores.grad.abs().max()


def test_plain_amt_runs_no_teacher() -> None:
    session = contract.begin(AMT(gdr=0.0))

    def fail(batch: Any) -> Tensor:
        raise AssertionError

    session.run.logits = fail
    contract.finish(session)


def test_frozen_masks_are_left_out() -> None:
    session = contract.begin(AMT())
    session.start()
    first, second, *rest = masks(session)
    for mask in (first, *rest):
        mask.scores.requires_grad_(False)
    next(session.steps())
    assert not torch.equal(second.scores, Mask((32, 32), 1e-2, 5e-3).scores)
    assert torch.equal(first.scores, Mask((32, 32), 1e-2, 5e-3).scores)
    second.scores.requires_grad_(False)
    next(session.steps())


def settings(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sessions, "OPTIMIZER", AdamW(schedule="constant", warmup=0.0, **options))


def test_nothing_is_masked_before_adam_can_have_moved_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam moves a score by at most 3.2 t lr in t steps; a few times as many steps mask something."""
    settings(monkeypatch, lr=4e-4)
    steps = [
        s.metrics["masked"] for s in contract.begin(AMT(), train=replace(contract.TRAIN, steps=20)).steps()
    ]
    assert steps[:3] == [0, 0, 0]
    assert steps[-1] > 0.01
    session = contract.finish(contract.begin(AMT(), train=replace(contract.TRAIN, steps=20)))
    off = sum(int((m.scores <= 5e-3).sum()) for m in masks(session))
    assert steps[-1] == pytest.approx(off / sum(m.scores.numel() for m in masks(session)))


def test_only_adam_s_ratio_of_margin_to_rate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, threshold and rate that are 128 times as large give the same masks."""
    found = []
    for scale in (1, 128):
        settings(monkeypatch, lr=5e-4 * scale, eps=1e-12)
        method = AMT(initial=1e-2 * scale, threshold=5e-3 * scale)
        session = contract.begin(method, "gpt2", replace(contract.TRAIN, steps=15))
        contract.finish(session)
        found.append([m.off() for m in masks(session)])
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert any(m.any() for m in found[0])
    assert all(same)


def test_where_the_loss_does_not_push_only_the_penalty_does() -> None:
    """Weights of 0 get no gradient from the loss, so their scores all shrink by penalty * s / ||s||."""
    model = contract.tiny()
    name = "vit.layers.0.attention.q_proj"
    model.get_submodule(name).weight.data[:4] = 0
    session = contract.begin(AMT(penalty=0.5), train=replace(contract.TRAIN, micro_batch_size=3), model=model)
    session._backward(next(session.batches.steps(0, 1)))
    (delta,) = patched(session.model)[name].deltas
    assert isinstance(delta, Mask)
    assert delta.scores.grad is not None
    torch.testing.assert_close(
        delta.scores.grad[:4], torch.full((4, 32), 0.5 / 32)
    )  # all 1024 are equal: s / ||s|| = 1 / 32
    assert (delta.scores.grad[4:] - 0.5 / 32).abs().max() > 1e-6
    contract.finish(session)
    assert len(delta.scores[:4].unique()) == 1
    assert delta.scores[0, 0] < 5e-3


def test_weight_decay_leaves_scores_alone() -> None:
    session = contract.begin(AMT())
    optimizer = make_optimizer(session.states, AdamW(lr=0.1, weight_decay=0.5))
    before = {k: p.detach().clone() for k, p in session.states.named_parameters()}
    for p in session.states.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [k for k, p in session.states.named_parameters() if not torch.equal(p, before[k])]
    assert moved == ["head.classifier/weight"]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


def test_a_stored_mask_is_a_bit_a_weight() -> None:
    delta = Mask((3, 5), 1e-2, 5e-3)
    delta.scores.data.view(-1)[torch.tensor([0, 7, 8, 14])] = 0.0
    assert delta.pack()["on"].tolist() == [
        0b01111110,
        0b01111100,
    ]  # the first in the highest place, zeros at the end
    other = Mask((3, 5), 1e-2, 5e-3)
    other.unpack(delta.pack())
    assert torch.equal(other.off(), delta.off())
    assert other.scores.dtype == torch.float32
    with pytest.raises(ConfigError, match="2 bytes, which do not fit a weight of 17 entries"):
        Mask((1, 17), 1e-2, 5e-3).unpack(delta.pack())


@pytest.mark.parametrize("scale", [(1e-2, 5e-3), (1.0, 0.5), (0.0, -3.0)])
def test_storing_gives_identical_logits_in_an_eighth_of_a_byte_a_weight(
    scale: tuple[float, float], tmp_path: Path
) -> None:
    method = AMT(initial=scale[0], threshold=scale[1])
    session = contract.begin(method)
    for mask in masks(session):
        mask.scores.data.add_(torch.randn(mask.scores.shape) * (scale[0] - scale[1]))
    save_delta(tmp_path / "delta", session.states, {})
    new = contract.begin(method, seed=3)
    load_delta(tmp_path / "delta", new.states)
    assert any(m.off().any() for m in masks(new))
    assert torch.equal(contract.logits(new.tuned), contract.logits(session.tuned))
    sizes = {
        k: t.numel() * t.element_size()
        for k, t in tensors_to_store(session.states).items()
        if k.startswith("method.")
    }
    assert list(sizes.values()) == [32 * 32 // 8] * 8


def test_a_mask_that_would_start_off_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.initial=0\.1 is not above method\.threshold=0\.5"):
        AMT(initial=0.1, threshold=0.5)


def test_stacked_on_another_change_a_mask_takes_away_the_pretrained_weight_only() -> None:
    delta, weight = make(), torch.randn(6, 5)
    total = weight + 3.0
    delta.add_(total, weight, delta.gate)
    torch.testing.assert_close(total, torch.where(delta.off(), 3.0, weight + 3.0))
