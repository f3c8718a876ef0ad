"""AdamW with ages against torch's own, for equal ages and for entries that join one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.optim import adamw
from finetune.optim.adamw import AdamWOptimizer

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def trained(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.9, 0.0)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equal_ages_are_torch_s(
    betas: tuple[float, float], dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adamw.CHUNK, "cpu", 4)  # the last chunk is shorter
    start, grads = noise(11, dtype=dtype), noise(30, 11, dtype=dtype)
    ours, theirs = trained(start), trained(start)
    settings = {**SETTINGS, "betas": betas}
    optimizer, plain = (
        AdamWOptimizer([ours], [ours], **settings),
        torch.optim.AdamW([theirs], fused=False, foreach=False, **settings),
    )
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        plain.step()
        torch.testing.assert_close(ours.data, theirs.data, rtol=near, atol=near)
        assert torch.equal(ours.grad, grad)
    assert torch.equal(optimizer.state[ours]["step"], torch.full((11,), 30.0, dtype=dtype))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[ours][name], plain.state[theirs][name]), name


def test_the_first_step_is_exact_in_float32() -> None:
    """1 - 0.999^1 in float32 would be off by 1e-5 of itself."""
    start, grad = noise(50, dtype=torch.float32), noise(50, dtype=torch.float32)
    p = trained(start)
    p.grad = grad
    AdamWOptimizer([p], [p], lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0).step()
    torch.testing.assert_close(start - p.data, grad.sign(), rtol=1e-6, atol=1e-6)


def test_each_entry_counts_its_own_steps() -> None:
    """Entries that join at different steps, each with an optimizer of its own in the oracle."""
    joined = [0, 0, 2, 3, 7]
    start, grads = noise(5), noise(12, 5)
    p, singles = trained(start), [trained(v.view(1)) for v in start]
    optimizer, plain = (
        AdamWOptimizer([p], [p], **SETTINGS),
        [torch.optim.AdamW([s], **SETTINGS) for s in singles],
    )
    for step, grad in enumerate(grads):
        new = torch.tensor([at == step for at in joined])
        for t in optimizer.state[p].values():
            t[new] = 0
        with torch.no_grad():
            p[new] = start[new]
        p.grad = grad.clone()
        optimizer.step()
        for single, other, g, at in zip(singles, plain, grad, joined, strict=True):
            single.grad = g.view(1).clone()
            if step >= at:
                other.step()
        there = torch.tensor([step >= at for at in joined])
        torch.testing.assert_close(
            p.data[there], torch.cat([s.data for s in singles])[there], rtol=1e-12, atol=1e-12
        )
    assert optimizer.state[p]["step"].tolist() == [12.0 - at for at in joined]


def test_other_parameters_are_torch_s_to_the_bit() -> None:
    a, b, aged = (
        trained(noise(4, 3, dtype=torch.float32)),
        trained(noise(4, 3, dtype=torch.float32)),
        trained(noise(6, dtype=torch.float32)),
    )
    optimizer, plain = (
        AdamWOptimizer([{"params": [aged, a]}], [aged], **SETTINGS),
        torch.optim.AdamW([b], fused=True, **SETTINGS),
    )
    for grad in noise(5, 4, 3, dtype=torch.float32):
        a.grad, b.grad = grad.clone(), grad.clone()
        before = aged.detach().clone()
        optimizer.step()
        plain.step()
        assert torch.equal(a, b)
        assert torch.equal(aged, before), "no gradient, no step"
    assert aged not in optimizer.state


def test_saved_state_resumes_to_the_bit() -> None:
    grads = noise(10, 6, dtype=torch.float32)

    def made(values: Tensor) -> tuple[nn.Parameter, AdamWOptimizer]:
        p = trained(values)
        return p, AdamWOptimizer([p], [p], **SETTINGS)

    def run(p: nn.Parameter, optimizer: AdamWOptimizer, part: Tensor) -> None:
        for grad in part:
            p.grad = grad.clone()
            optimizer.step()

    whole, optimizer = made(noise(6, dtype=torch.float32))
    run(whole, optimizer, grads[:4])
    optimizer.state[whole]["step"][2:4] = 1.0
    saved = optimizer.state_dict()
    again, other = made(whole.detach())
    groups = json.loads(json.dumps(saved["param_groups"]))
    other.load_state_dict(
        {
            "state": {i: {k: t.clone() for k, t in s.items()} for i, s in saved["state"].items()},
            "param_groups": groups,
        }
    )
    run(whole, optimizer, grads[4:])
    run(again, other, grads[4:])
    assert torch.equal(whole, again)
    assert other.state[again]["step"].tolist() == [10.0, 10.0, 7.0, 7.0, 10.0, 10.0]


def test_a_gradient_scaler_unscales_first_and_skips_overflow() -> None:
    """The fused kernel would do it itself, the ages' own arithmetic does not."""
    p, q = trained(noise(3, dtype=torch.float32)), trained(noise(3, dtype=torch.float32))
    ours, theirs, scaler = (
        AdamWOptimizer([p], [p], **SETTINGS),
        AdamWOptimizer([q], [q], **SETTINGS),
        torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    scaler.scale(torch.zeros(()))
    for grad in noise(3, 3, dtype=torch.float32):
        p.grad, q.grad = grad * scaler.get_scale(), grad.clone()
        scaler.step(ours)
        scaler.update()
        theirs.step()
        assert torch.equal(p, q)
    p.grad = torch.full((3,), float("inf"))
    scaler.step(ours)
    assert torch.equal(p, q)
    assert ours.state[p]["step"].tolist() == [3.0] * 3
