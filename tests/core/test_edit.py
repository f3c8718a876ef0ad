"""Edits against the formula written out, on plain modules and on the attention modules of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.core.anatomy import Anatomy
from finetune.core.attach import NotMergeable, attach, base, detach, merge
from finetune.core.edit import Edit, Replacement
from finetune.core.lowrank import LowRank
from finetune.core.part import Delta
from finetune.testing.sessions import tiny


class Scale(Edit):
    """Adds ``s`` times what is edited and 0.5 times what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.s * y + 0.5 * x


class Rows(Edit):
    """Multiplies the outputs of a linear layer by 1.5."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * y

    def fold_into(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.mul_(1 + self.gate * 0.5)


def square(n: int = 3) -> nn.Sequential:
    """Make three layers of equal width."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(n))).double().requires_grad_(False)


def sample() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_an_edit_of_an_output_reads_the_input_of_its_module() -> None:
    model, x = square(1), sample()
    y = model(x)
    Scale().on(model, "0")
    torch.testing.assert_close(model(x), y + 0.3 * y + 0.5 * x)


def test_an_edit_of_an_input_changes_what_the_module_receives() -> None:
    model, x = square(1), sample()
    expected = model(x + 0.3 * x + 0.5 * x)
    Scale().on(model, "0", edits="input")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_edit_reads_one_module_and_writes_another(side: Any) -> None:
    model, x = square(), sample()
    a, b, c = model
    h = a(x)
    y = c(b(h))
    Scale().on(model, "2", reads="1", reads_side=side)
    torch.testing.assert_close(model(x), y + 0.3 * y + 0.5 * (h if side == "input" else b(h)))


def test_an_edit_of_an_input_reads_another_module() -> None:
    model, x = square(), sample()
    a, b, c = model
    h = b(a(x))
    expected = c(h + 0.3 * h + 0.5 * x)
    Scale().on(model, "2", edits="input", reads="0")
    torch.testing.assert_close(model(x), expected)


def test_a_module_that_is_read_too_late_is_named() -> None:
    model = square()
    Scale().on(model, "0", reads="2")
    with pytest.raises(RuntimeError, match=r"an edit of 0 reads a module that did not run before it"):
        model(sample())


class Pair(NamedTuple):
    first: Tensor
    second: str


class Gives(nn.Module):
    """Gives its input in a container, and takes it by keyword, too."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, mask: Tensor | None = None, hidden_states: Tensor | None = None) -> Any:
        assert hidden_states is not None
        return self.make(hidden_states)


@pytest.mark.parametrize("make", [lambda x: (x, "rest"), lambda x: [x, "rest"], lambda x: Pair(x, "rest")])
def test_tuples_and_keywords_keep_everything_but_the_edited_tensor(make: Callable[[Tensor], Any]) -> None:
    model, x = nn.Sequential(Gives(make)), sample()
    Scale().on(model, "0")
    Rows().on(model, "0", edits="input")
    out = model[0](mask=torch.zeros(1), hidden_states=x)
    given = 1.5 * x
    assert type(out) is type(make(x))
    assert out[1] == "rest"
    torch.testing.assert_close(out[0], given + 0.3 * given + 0.5 * given)


def test_what_cannot_be_edited_is_refused() -> None:
    model = nn.Sequential(Gives(lambda x: {"x": x}))
    Scale().on(model, "0")
    with pytest.raises(RuntimeError, match=r"returns a tensor or a tuple of tensors, not a dict"):
        model[0](hidden_states=sample())


def attention_model(kind: str) -> Any:
    if kind != "bert":
        return tiny(kind)  # type: ignore[arg-type]
    library: Any = transformers
    config = library.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return library.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama", "bert"])
def test_an_attention_module_is_edited_as_its_output_projection_is(kind: str) -> None:
    """The module gives a tuple; its first tensor is the projection's output (BERT's comes after a norm)."""
    model = attention_model(kind)
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([[3, 5, 7, 9]])}
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    block = Anatomy.of(model).blocks[0]
    assert block.attention.place is not None
    part = block.attention.norm.name if kind == "bert" else block.attention.last.name
    found = []
    with torch.no_grad():
        plain = model(**inputs).logits
        for name in (block.attention.place.name, part):
            edit = Rows().on(model, name)
            found.append(model(**inputs).logits)
            edit.detach()
        assert torch.equal(model(**inputs).logits, plain)
    assert not torch.equal(found[0], plain)
    assert torch.equal(found[0], found[1])


def test_an_edit_is_differentiated_with_the_gate_of_the_forward_pass() -> None:
    for reads in (None, "0"):
        model, x, edit = square(2), sample(), Scale()
        y = model(x)
        edit.on(model, "1", reads=reads)
        edit.gate = 0.5
        loss = model(x).sum()
        edit.gate = 0.0
        loss.backward()
        torch.testing.assert_close(edit.s.grad, 0.5 * y.sum())


def test_the_gate_is_read_once_even_where_two_modules_are_involved() -> None:
    model, x, edit = square(2), sample(), Scale()
    a, b = model
    y = b(a(x))
    edit.on(model, "1", reads="0")
    edit.gate = 0.5
    a.register_forward_hook(lambda *_: setattr(edit, "gate", 0.0))
    torch.testing.assert_close(model(x), y + 0.5 * (0.3 * y + 0.5 * x))


def test_with_gate_0_the_output_is_that_of_the_base_and_no_gradient_flows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = square().to(dtype), sample().to(dtype)
        plain = model(x)
        states = nn.ModuleList([Scale().on(model, "1"), Rows().on(model, "2", edits="input", reads="0")])
        assert model(x).requires_grad
        with base(states):
            assert torch.equal(model(x), plain)
            assert not model(x).requires_grad
        assert model(x).dtype == dtype


def test_a_small_change_of_a_bfloat16_output_is_rounded_once() -> None:
    """The change is added in the wider dtype: 1 + 3/512 lies above the middle of two numbers of bfloat16."""

    class Offset(Edit):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return torch.full_like(y, 3 / 512, dtype=torch.float32)

    model = nn.Sequential(nn.Identity())
    Offset().on(model, "0")
    one = torch.ones(1, dtype=torch.bfloat16)
    assert float(model(one)) == 1 + 1 / 128


@pytest.mark.parametrize("reads", [None, "0"])
def test_a_copy_of_the_model_runs_copies_of_its_edits(reads: str | None) -> None:
    model, x, edit = square(2), sample(), Scale()
    edit.on(model, "1", reads=reads)
    model(x)  # a pass with gradient leaves nothing that cannot be copied
    whole = nn.ModuleDict({"model": model, "states": nn.ModuleList([edit])})
    twin = copy.deepcopy(whole)
    expected = model(x)
    twin_edit: Any = twin["states"][0]  # type: ignore[index]
    assert torch.equal(twin["model"](x), expected)
    twin_edit.s.data.zero_()
    assert not torch.equal(twin["model"](x), expected)
    assert torch.equal(model(x), expected)
    twin["model"](x).sum().backward()
    assert twin_edit.s.grad is not None
    assert edit.s.grad is None
    detach(twin["model"], twin["states"])
    assert torch.equal(twin["model"](x), square(2)(x))
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_a_copy_after_a_forward_pass_that_failed_holds_no_activation() -> None:
    model, x = square(2), sample().requires_grad_()
    Scale().on(model, "1", reads="0")
    handle = model[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(1 * x)
    handle.remove()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model, x, edit = square(), sample().requires_grad_(), Scale()
    edit.on(model, "2", reads="1")
    plain = torch.autograd.grad(model(x).square().sum(), [x, edit.s])
    recomputed = torch.autograd.grad(
        checkpoint(model, x, use_reentrant=False).square().sum(),
        [x, edit.s],
    )
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gate", [1.0, 0.25, 0.0])
def test_a_folded_edit_is_in_the_weights_and_acts_no_more(gate: float) -> None:
    model, x, edit = square(2), sample(), Rows()
    edit.on(model, "0")
    edit.gate = gate
    expected = model(x)
    merge(model, nn.ModuleList([edit]))
    torch.testing.assert_close(model(x), expected)
    edit.gate = 1.0
    torch.testing.assert_close(model(x), expected)
    assert not model[0]._forward_hooks


def test_a_merge_that_is_refused_changes_nothing() -> None:
    model, x = square(), sample()
    delta = LowRank((4, 4), 1, 1.0, 0.0).double()
    delta.b.data.fill_(1.0)
    attach(model, "1", delta)
    states = nn.ModuleList([Rows().on(model, "0"), delta, Scale().on(model, "2")])
    before = model(x)
    with pytest.raises(NotMergeable, match=r"an edit of a module's tensors \(Scale\), which no"):
        merge(model, states)
    assert torch.equal(model(x), before)


def test_an_edit_on_a_layer_with_deltas_is_not_merged() -> None:
    """Its fold would miss the deltas."""
    model = square(1)
    delta = LowRank((4, 4), 1, 1.0, 0.0).double()
    attach(model, "0", delta)
    with pytest.raises(NotMergeable):
        merge(model, nn.ModuleList([delta, Rows().on(model, "0")]))
    model = square(1)
    edit = Rows().on(model, "0")
    attach(model, "0", delta)
    with pytest.raises(NotMergeable):
        merge(model, nn.ModuleList([edit, delta]))


@pytest.mark.parametrize("formed", [False, True])
def test_a_delta_may_be_stacked_on_a_layer_with_edits(formed: bool) -> None:
    """The first edit acts on the layer, the second reads its input, the third edits what it receives."""
    model, x = square(2), sample()
    a: Any = model[0]
    b: Any = model[1]
    plain = model(x)
    edits = [Scale().on(model, "0"), Scale().on(model, "1", reads="0"), Scale().on(model, "0", edits="input")]
    before, delta = model(x), LowRank((4, 4), 1, 1.0, 0.0).double()
    attach(model, "0", delta)
    if formed:
        attach(model, "0", Doubling())
    assert formed or torch.equal(model(x), before)
    nn.init.normal_(delta.b)
    h = 1.8 * x
    y = h @ ((2 if formed else 1) * a.weight + delta(a.weight)).T + a.bias
    expected = 1.3 * ((1.3 * y + 0.5 * h) @ b.weight.T + b.bias) + 0.5 * x
    torch.testing.assert_close(model(x), expected)
    states = nn.ModuleList([*edits, delta])
    with base(states):
        assert formed or torch.equal(model(x), plain)
    detach(model, states)
    assert torch.equal(model(x), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


class Doubling(Delta):
    """Adds the weight once more, as a formed matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


def test_an_edit_acts_on_one_module() -> None:
    edit, model = Rows(), square()
    edit.on(model, "0")
    with pytest.raises(RuntimeError, match=r"acts on 0 already"):
        edit.on(model, "1")


class Doubled(Replacement):
    """Twice what the module gives, plus a trained number."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return 2 * original(*args, **kwargs) + self.c


def test_a_replacement_computes_in_place_of_the_module() -> None:
    model, x = square(2), sample()
    a, b = model
    plain, expected = model(x), b(2 * a(x) + 1)
    part = Doubled()
    part.on(model, "0")
    torch.testing.assert_close(model(x), expected)
    twin = copy.deepcopy(nn.ModuleDict({"model": model, "states": nn.ModuleList([part])}))
    with base(part):
        assert torch.equal(model(x), plain)
        torch.testing.assert_close(twin["model"](x), expected)
    with pytest.raises(NotMergeable, match=r"a replacement of a module \(Doubled\)"):
        merge(model, part)
    detach(twin["model"], twin["states"])
    assert torch.equal(twin["model"](x), plain)
    torch.testing.assert_close(model(x), expected)
    detach(model, part)
    part.detach()
    assert torch.equal(model(x), plain)
    assert "forward" not in vars(a)


def test_the_units_of_an_edit_lie_in_its_module() -> None:
    model, edit = square(), Scale()
    (unit,) = edit.on(model, "1").units()
    assert (unit.name, unit.place, unit.parameter) == ("s", "1", edit.s)
