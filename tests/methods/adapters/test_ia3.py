"""Compare (IA)^3 with its formula, and with the IA3 of peft."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.core.anatomy import Anatomy
from finetune.core.attach import base, merge
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.adapters.ia3 import IA3, AllFactors, Factors
from finetune.testing import sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import Kind, tiny

CASES = [Case("ia3", IA3, ("vit", "gpt2", "llama"), budget=6 * (128 + 128 + 384))]

PUBLISHED = Published("arXiv 2205.05638: the formula, and configs/ia3.json", {"targets": ("k", "v", "down")})

test_contract = contract_test(CASES)

KINDS: list[Kind] = ["vit", "gpt2", "llama"]


def factors_of(state: AllFactors) -> dict[str, Factors]:
    found = {}
    for key, factors in state.factors.items():
        assert isinstance(factors, Factors)
        found[key] = factors
    return found


def built(kind: Kind, method: IA3 | None = None, noise: float = 0.3) -> tuple[Any, AllFactors]:
    """Return a tiny model in double precision with random factors, and the state that owns them."""
    model = tiny(kind).double().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases start at 0
    state = (method or IA3()).build(model)
    state.double()
    for factors in factors_of(state).values():
        factors.factor.data += noise * torch.randn_like(factors.factor)
    return model, state


def answer(model: nn.Module, kind: Kind) -> Tensor:
    inputs = collate(sessions.examples(kind)[:4]).inputs
    if kind == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_the_output_is_that_of_the_base_to_the_bit(kind: Kind, dtype: torch.dtype) -> None:
    model = tiny(kind).to(dtype)
    plain = sessions.logits(model, kind)
    IA3(targets=("q", "k", "v", "up", "down")).build(model)
    assert torch.equal(sessions.logits(model, kind), plain)


@pytest.mark.parametrize(("kind", "values"), [("vit", 32 + 32 + 48), ("gpt2", 32 + 32 + 128), ("llama", 80)])
def test_counts_the_features_of_keys_values_and_hidden_layer(kind: Kind, values: int) -> None:
    """Llama has half as many heads of keys and values as of queries."""
    _, state = built(kind)
    assert sum(p.numel() for p in state.parameters()) == 2 * values


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_rows_or_columns_only_and_keeps_the_output(kind: Kind) -> None:
    model, state = built(kind)
    with base(state):
        original = copy.deepcopy(model.state_dict())
    expected = answer(model, kind)
    factors = factors_of(state)
    merge(model, state)
    torch.testing.assert_close(answer(model, kind), expected)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, original[name])}
    layers = {each.features.site.name for each in factors.values()}
    assert {name.rpartition(".")[0] for name in changed} == layers
    for each in factors.values():
        site, rows = each.features.site, each.features.side == "output"
        ratio = model.state_dict()[f"{site.name}.weight"] / original[f"{site.name}.weight"]
        ratio = ratio.T if kind == "gpt2" else ratio
        part = slice(each.features.first, each.features.first + each.features.count)
        wanted = each.factor[:, None] if rows else each.factor
        found = ratio[part] if rows else ratio[:, part]
        torch.testing.assert_close(found, wanted.expand_as(found))
        if f"{site.name}.bias" in original:
            bias = original[f"{site.name}.bias"][part]
            wanted_bias = bias * each.factor if rows else bias
            torch.testing.assert_close(model.state_dict()[f"{site.name}.bias"][part], wanted_bias)


def test_queries_of_a_fused_projection_stay() -> None:
    model, state = built("gpt2")
    original = model.transformer.h[0].attn.c_attn.weight.clone()
    merge(model, state)
    changed = (model.transformer.h[0].attn.c_attn.weight != original).any(0)
    assert changed.tolist() == [False] * 32 + [True] * 64


def test_a_factor_after_up_equals_one_before_down_in_a_gated_mlp_only() -> None:
    for kind, equal in (("llama", True), ("vit", False)):
        answers, grads = [], []
        values = 1 + 0.5 * torch.randn(48, dtype=torch.float64)
        for target in ("up", "down"):
            model, state = built(kind, IA3(targets=(target,)), noise=0.0)  # type: ignore[arg-type]
            for factors in factors_of(state).values():
                factors.factor.data.copy_(values)
            found = answer(model, kind)  # type: ignore[arg-type]
            found.square().sum().backward()
            answers.append(found)
            grads.append([each.factor.grad for each in factors_of(state).values()])
        assert torch.allclose(answers[0], answers[1]) == equal
        assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True)) == equal


def test_one_factor_for_all_keys_is_a_temperature_of_the_attention() -> None:
    model, state = built("llama", IA3(targets=("k",)), noise=0.0)
    for factors in factors_of(state).values():
        factors.factor.data.fill_(0.25)
    expected = answer(model, "llama")
    for factors in factors_of(state).values():
        factors.factor.data.fill_(1.0)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.25
    torch.testing.assert_close(answer(model, "llama"), expected)


def test_with_values_of_0_the_attention_gives_the_bias_of_its_output_projection() -> None:
    model, state = built("vit", IA3(targets=("v",)))
    for factors in factors_of(state).values():
        factors.factor.data.zero_()
    projection = Anatomy.of(model).blocks[1].attention.last.module
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda _m, _a, y: seen.append(y))
    answer(model, "vit")
    torch.testing.assert_close(seen[0], projection.get_parameter("bias").expand_as(seen[0]))


def test_two_adapters_compose_by_their_product_in_any_order() -> None:
    outputs = []
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(3)
        model = tiny("llama").double().requires_grad_(False)
        drawn = []
        for _ in range(2):
            drawn.append([1 + 0.3 * torch.randn(n, dtype=torch.float64) for n in (16, 16, 48) * 2])
        for number in order:
            state = IA3().build(model).double()
            for factors, values in zip(factors_of(state).values(), drawn[number], strict=True):
                factors.factor.data.copy_(values)
        outputs.append(answer(model, "llama"))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_a_gate_stands_for_a_mixture_with_1(gate: float) -> None:
    model, state = built("llama")
    for factors in factors_of(state).values():
        factors.gate = gate
    found = answer(model, "llama")
    for factors in factors_of(state).values():
        factors.gate = 1.0
        factors.factor.data.copy_(1 + gate * (factors.factor - 1))
    torch.testing.assert_close(found, answer(model, "llama"))


def test_a_bfloat16_model_keeps_small_steps_of_the_factors() -> None:
    """1 + 3 * 2**-9 is no number of bfloat16; the product is rounded, not the factor."""
    model = tiny("vit").bfloat16().requires_grad_(False)
    state = IA3(targets=("v",)).build(model)
    site = Anatomy.of(model).blocks[0].attention.sites["v"]
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    plain = site.module(x)
    for factors in factors_of(state).values():
        factors.factor.data.fill_(1 + 3 * 2**-9)
    expected = (plain.float() * (1 + 3 * 2**-9)).to(torch.bfloat16)
    assert torch.equal(site.module(x), expected)
    assert not torch.equal(expected, plain * torch.tensor(1 + 3 * 2**-9, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits_and_gradients(kind: Kind) -> None:
    """The configuration and the tensors are those that ``finetune export`` writes."""
    peft = pytest.importorskip("peft")
    model, state = built(kind)
    with base(state):
        theirs = copy.deepcopy(model)
    for hooked in theirs.modules():
        hooked._forward_hooks.clear()
        hooked._forward_pre_hooks.clear()
    expected = answer(model, kind)
    expected.square().sum().backward()
    written = state.export_as("peft")
    assert written is not None
    config, tensors = written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it will rename
        wrapped = peft.get_peft_model(theirs, config)
    loaded = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not loaded.unexpected_keys
    wrapped.double().eval()
    found = answer(wrapped, kind)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    grads = {n.replace(".default", ""): p.grad for n, p in wrapped.named_parameters() if "ia3_l" in n}
    for each in factors_of(state).values():
        features = each.features
        grad = grads[f"base_model.model.{features.site.name}.ia3_l"].reshape(-1)
        part = grad[features.first : features.first + features.count]
        torch.testing.assert_close(part, each.factor.grad, rtol=1e-5, atol=1e-8)
    assert state.export_as("other") is None


def test_targets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"method\.targets=\[k,k\] must name at least one target, and each only"
    ):
        IA3(targets=("k", "k"))
    with pytest.raises(ConfigError, match=r"blocks and heads of a Linear model are unknown"):
        IA3().build(nn.Linear(2, 2))
