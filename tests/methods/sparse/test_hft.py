"""Test HFT.

The oracles are counts by hand, the untouched model, full fine-tuning, and a bare loop with a new optimizer a
round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from finetune.core.part import Part
from finetune.data.encode import collate
from finetune.errors import ConfigError
from finetune.methods.baseline.full import Full
from finetune.methods.sparse.hft import HFT, draw_frozen
from finetune.optim.adamw import AdamW
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import Kind
from finetune.training.session import Session, rate

CASES = [
    Case("hft", HFT, selectable=False, budget="cannot meet budget=49k", settings=("method.rounds=3",)),
    Case("hft rounds", lambda: HFT(rounds=3), ("vit", "gpt2"), selectable=False),
    Case("hft block norms", lambda: HFT(scope="block", norms=True), selectable=False),
]

PUBLISHED = Published(
    "arXiv 2404.18466: half of the matrices of each category, drawn once",
    {"sparsity": 0.5, "scope": "category", "norms": False, "rounds": 1},
)

test_contract = contract_test(CASES)

ATTENTION = r"\.(q_proj|k_proj|v_proj|o_proj|query|key|value|attention\.output\.dense|c_attn|attn\.c_proj)\."
MLP = r"\.(fc1|fc2|up_proj|gate_proj|down_proj|intermediate\.dense|\d\.output\.dense|c_fc|mlp\.c_proj)\."


def llama(layers: int, width: int = 8, inner: int = 12, keys: int = 2) -> Any:
    """Return a Llama of the given shapes on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2 if keys <= 2 else 32, "num_key_value_heads": keys}
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, **heads
            )
        )


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes))


def frozen(model: nn.Module, method: HFT, seed: int = 0) -> set[str]:
    """Return the names of the parameters that a run of this seed leaves frozen."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    method.build(model)
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def count(names: set[str], pattern: str) -> Counter[int]:
    """Count the weights among ``names`` by block."""
    hits = [name for name in names if re.search(pattern, name) and name.endswith("weight")]
    return Counter(int(re.findall(r"\.(\d+)\.", name)[0]) for name in hits)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def resting(session: Session, step: int, rounds: int) -> set[str]:
    """Return the wrapped parameters that are frozen at a step."""
    state = session.states["method"]
    return {
        name
        for name in state.trained()
        if name.rpartition(".")[0] in state.frozen[math.floor(step * rounds / contract.STEPS)]
    }


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_two_of_four_attention_matrices_and_the_rule_of_the_mlp(layers: int) -> None:
    names = frozen(llama(layers), HFT())
    assert count(names, ATTENTION) == dict.fromkeys(range(layers), 2)
    assert count(names, MLP).total() == 2 * (layers // 2) + (layers - layers // 2)
    assert sorted(count(names, MLP).values()) == [1] * (layers - layers // 2) + [2] * (layers // 2)
    assert all(re.search(ATTENTION + "|" + MLP, name) for name in names), "embeddings, norms and head train"


def test_bert_freezes_its_biases_with_their_matrices_and_never_the_pooler() -> None:
    names = frozen(bert(), HFT())
    assert count(names, ATTENTION) == dict.fromkeys(range(3), 2)
    assert count(names, MLP) == dict.fromkeys(range(3), 1)
    assert {name.replace("bias", "weight") for name in names if name.endswith("bias")} == {
        name for name in names if name.endswith("weight")
    }
    assert len(names) == 2 * (3 * 2 + 3)


def test_fused_attention_is_one_matrix_and_tied_embeddings_train() -> None:
    model = contract.tiny("gpt2")
    names = frozen(model, HFT())
    assert count(names, ATTENTION) == count(names, MLP) == {0: 1, 1: 1}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad
    seen = {
        name
        for seed in range(12)
        for name in frozen(contract.tiny("gpt2"), HFT(), seed)
        if re.search(ATTENTION, name)
    }
    assert {name.split(".attn.")[1] for name in seen} == {
        "c_attn.weight",
        "c_attn.bias",
        "c_proj.weight",
        "c_proj.bias",
    }


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_frozen_stays_to_the_bit_and_all_of_each_trained_matrix_moves(kind: Kind) -> None:
    """The pattern is one of whole matrices, not of entries."""
    before = values(contract.tiny(kind))
    session = contract.finish(contract.begin(HFT(), kind))
    for name, parameter in session.model.named_parameters():
        moved = float((parameter != before[name]).double().mean())
        least = 0.0 if re.search("wte|wpe|embed", name) else 0.9  # words that the data lacks have no gradient
        assert moved > least if parameter.requires_grad else moved == 0, name
    assert sum(not p.requires_grad for p in session.model.parameters()) > 4


def test_optimizer_holds_the_trained_and_nothing_else() -> None:
    session = contract.begin(HFT())
    for _ in session.steps():
        assert all(p.grad is None for p in session.model.parameters() if not p.requires_grad)
    held = [p for group in session.optimizer.param_groups for p in group["params"]]
    trained = [p for p in session.model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trained} == {id(p) for p in session.optimizer.state}
    assert sum(p.numel() for p in held) == sum(p.numel() for p in trained)


def test_the_seed_alone_decides_and_another_changes_half() -> None:
    first, again, other = (frozen(llama(32), HFT(), seed) for seed in (0, 0, 1))
    assert first == again
    for pattern, size in ((ATTENTION, 4 * 32), (MLP, 3 * 32)):
        assert 0.35 < sum(count(first ^ other, pattern).values()) / size < 0.65
    assert {b for b, n in count(first, MLP).items() if n == 2} != {
        b for b, n in count(other, MLP).items() if n == 2
    }


def test_independent_draws_leave_a_matrix_alone_with_probability_two_to_the_minus_rounds() -> None:
    torch.manual_seed(0)
    pool = {block: [f"{block}{name}" for name in "qkvo"] for block in range(500)}
    from fractions import Fraction

    draws = [draw_frozen(pool, Fraction(1, 2)) for _ in range(4)]
    for rounds in range(1, 5):
        assert abs(len(set.intersection(*draws[:rounds])) / 2000 - 0.5**rounds) < 0.03
    torch.manual_seed(0)
    never = HFT(rounds=3).build(llama(64).requires_grad_(False)).frozen
    assert abs(len(set.intersection(*never)) / (7 * 64) - 0.125) < 0.06


def test_half_of_the_entries_only_where_matrices_are_equal_in_size() -> None:
    """The shapes are those of Llama 2 7B, and of a model with smaller keys and values."""
    for keys in (32, 8):
        model = llama(32, 4096, 11008, keys)
        frozen(model, HFT())
        shares = []
        for block in model.model.layers:
            matrices = [p for name, p in block.self_attn.named_parameters() if name.endswith("weight")]
            shares.append(
                sum(p.numel() * p.requires_grad for p in matrices) / sum(p.numel() for p in matrices)
            )
        assert shares == [0.5] * 32 if keys == 32 else len(set(shares)) > 1
        assert abs(sum(shares) / 32 - 0.5) < 0.1
        up = [p for name, p in model.named_parameters() if ".mlp." in name]
        assert sum(p.numel() * p.requires_grad for p in up) / sum(p.numel() for p in up) == 0.5


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_without_sparsity_it_is_full_fine_tuning_step_for_step(kind: Kind) -> None:
    runs = []
    for method in (HFT(sparsity=0), Full()):
        session = contract.begin(method, kind)
        runs.append([(step.loss, values(session.model)) for step in session.steps()])
    for (loss, ours), (full_loss, full) in zip(*runs, strict=True):
        assert loss == full_loss
        assert all(torch.equal(ours[name], full[name]) for name in full)


@pytest.mark.parametrize("sparsity", [0.125, 0.3, 0.7, 0.875])
def test_other_shares_are_met_over_the_model_and_even_over_blocks(sparsity: float) -> None:
    names = frozen(llama(5), HFT(sparsity=sparsity))
    for pattern, size in ((ATTENTION, 4), (MLP, 3)):
        found = count(names, pattern)
        assert abs(found.total() - sparsity * size * 5) <= 0.5
        assert all(abs(found[block] - sparsity * size) < 1 for block in range(5))


def test_wider_scopes_meet_the_share_over_all_matrices() -> None:
    both = ATTENTION + "|" + MLP
    assert sorted(count(frozen(llama(4), HFT(scope="block")), both).values()) == [3, 3, 4, 4]
    counts = [count(frozen(llama(4), HFT(scope="model"), seed), both) for seed in range(5)]
    assert {c.total() for c in counts} == {14}
    assert max(c[block] for c in counts for block in range(4)) > 4
    assert {count(frozen(llama(4), HFT(scope="block"), seed), ATTENTION)[0] for seed in range(9)} != {2}


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_one_of_a_block_s_two_norms_if_asked(kind: Kind) -> None:
    pattern = r"\.(layernorm_before|layernorm_after|ln_1|ln_2|input_layernorm|post_attention_layernorm)\."
    assert count(frozen(contract.tiny(kind), HFT(norms=True)), pattern) == {0: 1, 1: 1}
    without = frozen(contract.tiny(kind), HFT())
    assert not count(without, pattern)
    assert all(re.search(r"\.\d\.", name) for name in without | frozen(contract.tiny(kind), HFT(norms=True)))


@pytest.mark.parametrize("rounds", [2, 4])
def test_rounds_equal_a_bare_loop_with_a_new_optimizer_each(
    rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weight decay a frozen matrix neither moves nor decays, and keeps no moments."""
    settings = AdamW(lr=1e-2, weight_decay=0.5)
    monkeypatch.setattr(sessions, "OPTIMIZER", settings)
    session = contract.begin(
        HFT(rounds=rounds), model=contract.tiny().double()
    )  # Adam's first step would show float32's noise
    bare, made = contract.tiny().double().train(), -1
    fixed = {name for name, p in session.model.named_parameters() if not p.requires_grad}
    ours = session.steps()
    for step, micro in enumerate(session.batches.steps(0, contract.STEPS)):
        rest = fixed | resting(session, step, rounds)
        named = [(name, p.requires_grad_(name not in rest)) for name, p in bare.named_parameters()]
        if rounds * step // contract.STEPS != made:
            made += 1
            trained = [p for _, p in named if p.requires_grad]
            matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
            groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups)
        batch = collate([contract.examples()[int(i)] for i in micro[0].ids])  # type: ignore[union-attr]
        bare.zero_grad()
        nn.functional.cross_entropy(bare(**batch.inputs).logits.float(), batch.labels).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate(settings, step, contract.STEPS)
        optimizer.step()
        before = values(session.model)
        next(ours)
        still = {name for name, p in session.model.named_parameters() if torch.equal(p, before[name])}
        assert still == rest
        assert {id(p) for p in session.optimizer.state} == {
            id(p) for name, p in session.model.named_parameters() if name not in rest
        }
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(values(session.model)[name], parameter.detach(), atol=1e-5, rtol=0)
    assert made == rounds - 1
    assert all(p.requires_grad for p in session.states.parameters()), (
        "between steps everything counts as trained"
    )
    assert len({frozenset(f) for f in session.states["method"].frozen}) == rounds
    assert sum(p.adapted() for p in session.states.modules() if isinstance(p, Part)) == sum(
        p.numel() for name, p in session.model.named_parameters() if name not in fixed
    )


def test_what_cannot_mean_anything_is_refused() -> None:
    assert not HFT(rounds=6).faults(6)
    assert "at most 5" in HFT(rounds=6).faults(5)[0]
    assert "rounds=1" in HFT(rounds=2, sparsity=0).faults(5)[0]
    with pytest.raises(ConfigError, match="freezes none of this model's 12 matrices"):
        HFT(sparsity=0.05).build(contract.tiny().requires_grad_(False))


def test_a_model_of_unknown_layers_needs_a_wider_scope() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"scope=category.*scope=block or method\.scope=model"):
        HFT().build(model)
    names = frozen(model, HFT(scope="model"))
    assert len(names) == 6
    assert {name[0] for name in names if name.endswith("bias")} == {
        name[0] for name in names if name.endswith("weight")
    }
