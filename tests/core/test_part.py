"""Parts: forward against the plain product, the recomputing function against autograd, base and merge to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.core.part import (
    Delta,
    Edit,
    Patched,
    attach,
    base,
    changed_linear,
    detach,
    merge,
    patched,
    unpatch,
)
from finetune.core.site import Site
from finetune.core.sparse.bank import Bank, SparseDelta


class Shift(Delta):
    """A change of full size, whose gradient autograd knows: the outer product of two vectors, plus a multiple of the weight."""

    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(out)), nn.Parameter(torch.randn(in_))

    def forward(self, weight: Tensor) -> Tensor:
        return self.u.outer(self.v) + 0.1 * self.u[:, None] * weight


class Half(Edit):
    """Half the output, as an edit."""

    def forward(self, y: Tensor) -> Tensor:
        return -0.5 * y


def sparse(layer: nn.Linear, k: int = 7) -> SparseDelta:
    site = Site("l", layer, 0, "q", tuple(layer.weight.shape))  # type: ignore[arg-type]
    bank = Bank([site], [k])
    bank.place([torch.randperm(site.size)[:k]])
    bank.values.data.normal_()
    return SparseDelta(bank, 0, site)


def layer(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 4).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("gate", [1.0, 0.3])
def test_recomputed_gradients_equal_autograd_for_stacked_deltas(gate: float) -> None:
    linear = layer()
    deltas: list[Delta] = [Shift(4, 5).double(), sparse(linear), Shift(4, 5).double()]
    deltas[0].gate = gate
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    trained = [t for d in deltas for t in d.inputs()]
    pull = torch.randn(2, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad(
        (changed_linear(x, linear.weight, linear.bias, deltas) * pull).sum(), [x, *trained]
    )
    plain = nn.functional.linear(
        x, linear.weight + sum(d.gate * d(linear.weight) for d in deltas), linear.bias
    )
    for mine, true in zip(found, torch.autograd.grad((plain * pull).sum(), [x, *trained]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


def test_a_trained_bias_gets_its_gradient() -> None:
    linear = layer()
    linear.bias.requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64)
    changed_linear(x, linear.weight, linear.bias, [Shift(4, 5).double()]).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((4,), 3.0, dtype=torch.float64))


def test_backward_stops_below_the_first_trained_layer() -> None:
    linear = layer()
    x = torch.randn(3, 5, dtype=torch.float64)
    y = changed_linear(x, linear.weight, linear.bias, [Shift(4, 5).double()])
    assert y.requires_grad
    assert not x.requires_grad
    assert not linear(x).requires_grad


def test_sparse_delta_makes_no_copy_and_restores_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear = layer(dtype)
        before, place = linear.weight.clone(), linear.weight.data_ptr()
        delta = sparse(linear)
        x = torch.randn(3, 5, dtype=dtype)
        expected = nn.functional.linear(x, (before.float() + delta(before).detach()).to(dtype), linear.bias)
        assert torch.equal(changed_linear(x, linear.weight, linear.bias, [delta]), expected)
        assert torch.equal(linear.weight, before)
        assert linear.weight.data_ptr() == place


def test_sparse_delta_restores_when_the_product_fails() -> None:
    linear = layer()
    before = linear.weight.clone()
    with pytest.raises(RuntimeError):
        changed_linear(torch.randn(3, 6, dtype=torch.float64), linear.weight, linear.bias, [sparse(linear)])
    assert torch.equal(linear.weight, before)


class Conv1D(nn.Module):
    """GPT-2's layer: weight [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_transposed_layers_are_changed_as_out_in(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D().requires_grad_(False))
    mirror = nn.Linear(5, 4)
    mirror.weight.data, mirror.bias.data = model[0].weight.T.clone(), model[0].bias.data.clone()
    before = model[0].weight.clone()
    delta = Shift(4, 5) if kind == "dense" else sparse(mirror)
    attach(model, "0", delta)
    x = torch.randn(3, 5)
    expected = nn.functional.linear(x, mirror.weight + delta(mirror.weight), mirror.bias)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].base.weight, before)
    merge(model, nn.ModuleList([delta]))
    assert isinstance(model[0], Conv1D)
    torch.testing.assert_close(model(x), expected)


def test_merged_weight_is_what_the_live_layer_computes_with_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(layer(dtype))
        deltas = nn.ModuleList([Shift(4, 5), sparse(model[0])])
        for delta in deltas:
            attach(model, "0", delta)  # type: ignore[arg-type]
        x = torch.randn(6, 5, dtype=dtype)
        live = model(x)
        merge(model, deltas)
        assert type(model[0]) is nn.Linear
        assert torch.equal(model(x), live)


def test_base_and_gate_and_detach_give_the_pretrained_model_back() -> None:
    model = nn.Sequential(layer(torch.float32), nn.Tanh())
    x = torch.randn(3, 5)
    original, y = model[0], model(x)
    states = nn.ModuleList([Shift(4, 5), Half().on(model[1])])
    attach(model, "0", states[0])  # type: ignore[arg-type]
    changed = model(x)
    assert not torch.equal(changed, y)
    torch.testing.assert_close(
        changed, 0.5 * torch.tanh(nn.functional.linear(x, model[0].weight, original.bias))
    )
    with base(states):
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), changed)
    detach(model, states)
    assert torch.equal(model(x), y)
    assert model[0] is original
    assert not patched(model)


def test_patching_twice_stacks_on_one_layer() -> None:
    model = nn.Sequential(layer())
    attach(model, "0", Shift(4, 5))
    attach(model, "0", Shift(4, 5))
    assert isinstance(model[0], Patched)
    assert len(model[0].deltas) == 2
    assert isinstance(model[0].base, nn.Linear)
    assert len(list(model.parameters())) == 2  # the parts belong to the state, not to the model
    unpatch(model)
    assert type(model[0]) is nn.Linear
