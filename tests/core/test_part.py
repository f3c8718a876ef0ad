"""Parts: forward against the plain product, the recomputing function against autograd.

Base and merge are compared to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.core.attach import attach, base, detach, merge, patched, unpatch
from finetune.core.kernel import Kernel
from finetune.core.layer import Patched, changed_linear
from finetune.core.lowrank import LowRank
from finetune.core.method import Method
from finetune.core.part import Delta, Edit
from finetune.core.site import Site
from finetune.core.sparse.bank import Bank, SparseDelta
from finetune.core.sparse.mixed import Mixed, MixedDelta
from finetune.errors import ConfigError
from finetune.methods.reparam.amt import Mask
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.snell import SNELL
from finetune.methods.sparse.shira import SHiRA
from finetune.testing import contract


class Shift(Delta):
    """A change of full size, whose gradient autograd knows.

    It is the outer product of two vectors, plus a multiple of the weight.
    """

    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(out)), nn.Parameter(torch.randn(in_))

    def forward(self, weight: Tensor) -> Tensor:
        return self.u.outer(self.v) + 0.1 * self.u[:, None] * weight


class Half(Edit):
    """Half the output, as an edit."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
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
    states = nn.ModuleList([Shift(4, 5), Half().on(model, "1")])
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


def mask(linear: nn.Linear) -> Mask:
    delta = Mask((4, 5), 1e-2, 5e-3)
    delta.scores.data.add_(1e-2 * torch.randn(4, 5))
    return delta.double()


def branch(linear: nn.Linear) -> MixedDelta:
    site = Site("l", linear, 0, "q", (4, 5))
    bank = Mixed([site], 9, rank=1)
    bank.mix([torch.zeros(0, dtype=torch.int32)], torch.tensor([True]))
    bank.values.data = torch.randn(9, dtype=torch.float64)
    return MixedDelta(bank, 0, site)


def low_rank(linear: nn.Linear) -> LowRank:
    delta = LowRank((4, 5), 2, 4.0, 0.0).double()
    nn.init.normal_(delta.b)
    return delta


DELTAS: dict[str, Callable[[nn.Linear], Delta]] = {
    "dense": lambda linear: Shift(4, 5).double(),
    "sparse": lambda linear: sparse(linear).double(),
    "kernel": lambda linear: Kernel((4, 5), SNELL(rank=2, sparsity=0.4, sparsifier="paper")).double(),
    "mask": mask,
    "low rank": low_rank,
    "branch": branch,
}
STACKS = [("sparse",), ("kernel",), ("dense", "sparse", "mask"), ("low rank", "kernel"), ("branch", "sparse")]


@pytest.mark.parametrize("gate", [1.0, 0.5])
@pytest.mark.parametrize("later", [0.0, 2.0])
@pytest.mark.parametrize("names", STACKS, ids=" and ".join)
def test_backward_uses_the_gates_of_the_forward_pass(
    names: tuple[str, ...], gate: float, later: float
) -> None:
    """The oracle is autograd through the dense matrices, with the gates that the forward pass saw."""
    model = nn.Sequential(layer())
    linear = model[0]
    deltas = [DELTAS[name](linear) for name in names]
    for delta in deltas:
        if isinstance(delta, SparseDelta):
            delta.bank.double()
        attach(model, "0", delta)
        delta.gate = gate
    deltas[-1].gate = 0.25
    gates = [delta.gate for delta in deltas]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    trained = [t for delta in deltas for t in delta.inputs()]
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    total = linear.weight + sum(g * dense_change(d, linear) for g, d in zip(gates, deltas, strict=True))
    expected = torch.autograd.grad(
        (nn.functional.linear(x, total, linear.bias) * weights).sum(), [x, *trained]
    )
    loss = (model(x) * weights).sum()
    for delta in deltas:
        delta.gate = later
    for mine, true in zip(torch.autograd.grad(loss, [x, *trained]), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


def dense_change(delta: Delta, linear: nn.Linear) -> Tensor:
    """The change as a matrix with autograd's gradient.

    A kernel's change is written again, since its own has none.
    """
    if not isinstance(delta, Kernel):
        return delta(linear.weight)
    scale = delta.method.scale
    distances = (delta.rows[:, :, None] - delta.cols[:, None, :]).square().sum(-1).sqrt()
    kernel = scale * (distances[0] - distances[1])
    cut = kernel.detach().abs().flatten().sort().values[int(delta.method.sparsity * (kernel.numel() - 1))]
    return kernel * (kernel.abs() - cut).relu()


@pytest.mark.parametrize("name", ["sparse", "low rank", "branch"])
def test_the_declared_change_is_the_change(name: str) -> None:
    """The oracle is the dense matrix that the delta forms."""
    linear = layer()
    delta = DELTAS[name](linear)
    if isinstance(delta, SparseDelta):
        delta.bank.double()
    changes, dense = delta.changes(), torch.zeros(4, 5, dtype=torch.float64)
    assert (changes.entries is None) == (name != "sparse")
    if changes.entries is not None:
        assert changes.entries.index.diff().gt(0).all()
        dense.view(-1)[changes.entries.index] = changes.entries.values.double()
    elif changes.factors is not None:
        dense = changes.factors.scale * changes.factors.b @ changes.factors.a
    torch.testing.assert_close(dense, delta(linear.weight), rtol=1e-6, atol=1e-6)


def test_dropout_of_a_kernel_scales_its_change_by_the_gate_once() -> None:
    torch.manual_seed(0)
    linear = layer()
    kernel = Kernel((4, 5), SNELL(rank=2, sparsity=0.4, drop_path=1e-12)).double().train()
    kernel.gate = 0.5
    model = nn.Sequential(linear)
    attach(model, "0", kernel)
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = nn.functional.linear(x, linear.weight + 0.5 * kernel(linear.weight), linear.bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), SHiRA(sparsity=0.9), SNELL(rank=4)], ids=lambda method: method.name
)
def test_activation_checkpointing_gives_the_same_gradients(method: Method) -> None:
    session = contract.begin(method)
    session.start()
    for parameter in session.states.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    (batch,) = next(session.batches.steps(0, 1))
    assert batch is not None
    pixels = batch.inputs["pixel_values"]
    trained = [p for p in session.states.parameters() if p.requires_grad]

    def gradients(run: Callable[..., Tensor]) -> list[Tensor | None]:
        for parameter in trained:
            parameter.grad = None
        run(pixels).square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in trained]

    def forward(pixel_values: Tensor) -> Tensor:
        logits: Tensor = session.tuned(pixel_values=pixel_values).logits
        return logits

    plain = gradients(forward)
    recomputed = gradients(lambda x: checkpoint(forward, x, use_reentrant=False))
    assert any(grad is not None and grad.any() for grad in plain)
    for one, other in zip(plain, recomputed, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]


def test_a_model_with_a_bank_can_be_copied_after_a_forward_pass() -> None:
    session = contract.begin(SHiRA(sparsity=0.9))
    session.start()
    (batch,) = next(session.batches.steps(0, 1))
    assert batch is not None
    live = session.tuned(**batch.inputs).logits
    twin = copy.deepcopy(session.tuned)
    assert torch.equal(twin(**batch.inputs).logits, live)
    twin(**batch.inputs).logits.square().sum().backward()
    values, other = session.states["method"]["bank"].values, twin.states["method"]["bank"].values
    assert values.grad is None
    assert other.grad.any()
    other.data.fill_(1.0)
    assert torch.equal(session.tuned(**batch.inputs).logits, live)
    assert not torch.allclose(twin(**batch.inputs).logits, live)


def test_an_edit_is_not_merged_silently() -> None:
    """Its hook would still change the output of the merged model."""
    model = nn.Sequential(layer(torch.float32), nn.Tanh())
    states = nn.ModuleList([Shift(4, 5), Half().on(model, "1")])
    attach(model, "0", states[0])  # type: ignore[arg-type]
    x = torch.randn(3, 5)
    before = model(x)
    with pytest.raises(
        ConfigError, match="cannot be merged: the method attaches an edit of a module's tensors"
    ):
        merge(model, states)
    assert torch.equal(model(x), before)
    assert isinstance(model[0], Patched)


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward"])
def test_a_layer_with_hooks_is_refused(register: str) -> None:
    """A layer whose weight is formed anew does not call the pretrained one, so its hooks would be lost."""
    model = contract.tiny()
    layer = model.get_submodule("vit.layers.0.attention.q_proj")
    getattr(layer, f"register_{register}_hook")(lambda *_: None)
    with pytest.raises(ConfigError, match=r"layer vit\.layers\.0\.attention\.q_proj has hooks"):
        contract.begin(SHiRA(sparsity=0.9), model=model)
