"""Test S2FT against its published form.

The oracle is a model with permuted heads and channels, and trained slices beside frozen weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.core.attach import merge, patched
from finetune.core.sparse.bank import Bank
from finetune.data.encode import IGNORED, collate
from finetune.errors import ConfigError
from finetune.methods.sparse.s2ft import S2FT
from finetune.optim.adamw import AdamW
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import Kind
from finetune.training.session import Session, rate

CASES = [Case("s2ft", lambda: S2FT(d=0.1, u=0.1))]

PUBLISHED = Published(
    "arXiv 2412.06289: the released script for Llama 3 8B",
    {"v": 0.0, "o": 0.0, "u": 0.0, "d": 0.03, "criterion": "random"},
)

test_contract = contract_test(CASES)

EACH = S2FT(v=0.5, o=0.5, u=0.2, d=0.3)
SETTINGS = AdamW(lr=1e-2)
WIDTH, GROUP, INNER, LAYERS = (
    8,
    2,
    48,
    2,
)  # of the tiny llama: columns of a head, queries a key, channels, blocks


def started(method: S2FT, kind: Kind = "llama", seed: int = 0, model: Any = None) -> Session:
    session = contract.begin(method, kind, replace(contract.TRAIN, clip=None), seed, model)
    if model is not None:
        session.states.double()
    session.start()
    return session


def bank_of(session: Session) -> Bank:
    bank: Bank = session.states["method"]["bank"]
    return bank


def masks(session: Session) -> dict[str, Tensor]:
    """Return which entries of each weight are trained."""
    bank, found = bank_of(session), {}
    for i, (name, layer) in enumerate(patched(session.model).items()):
        flat = torch.zeros(layer.original.numel(), dtype=torch.bool).index_fill_(
            0, bank.positions(i).long(), True
        )
        found[name] = flat.view(layer.original.shape)
    return found


def rows(mask: Tensor, size: int = 1) -> list[int]:
    """Return the blocks of ``size`` rows that are trained; each is trained whole."""
    blocks = mask.reshape(-1, size * mask.shape[1])
    assert torch.equal(blocks.any(1), blocks.all(1))
    return blocks.all(1).nonzero().view(-1).tolist()


@dataclass
class Pair:
    """The order of a coupled pair's units ([only first] [both] [only second] [rest]), and both slices."""

    order: list[int]
    first: slice
    second: slice

    @staticmethod
    def of(first: list[int], second: list[int], count: int) -> Pair:
        both = [u for u in first if u in second]
        chosen = [*(u for u in first if u not in both), *both, *(u for u in second if u not in both)]
        start = len(first) - len(both)
        return Pair(
            chosen + [u for u in range(count) if u not in chosen],
            slice(0, len(first)),
            slice(start, len(chosen)),
        )

    def wide(self, size: int) -> Tensor:
        return torch.cat([torch.arange(u * size, (u + 1) * size) for u in self.order])


def scaled(part: slice, size: int) -> slice:
    return slice(part.start * size, part.stop * size)


def permuted(
    model: nn.Module, found: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, tuple[Tensor, bool, slice]]]:
    """Return the model with permuted heads and channels.

    Also return, by layer, the order along the permuted side, whether that side is rows, and the trained
    slice.
    """
    new, plan = copy.deepcopy(model), dict[str, tuple[Tensor, bool, slice]]()
    for block in range(LAYERS):
        at, mlp = f"model.layers.{block}.self_attn.", f"model.layers.{block}.mlp."
        heads = Pair.of(rows(found[at + "v_proj"], WIDTH), rows(found[at + "o_proj"].T, WIDTH * GROUP), 2)
        channels = Pair.of(rows(found[mlp + "up_proj"]), rows(found[mlp + "down_proj"].T), INNER)
        plan |= {
            at + "q_proj": (heads.wide(WIDTH * GROUP), True, slice(0, 0)),
            at + "k_proj": (heads.wide(WIDTH), True, slice(0, 0)),
            at + "v_proj": (heads.wide(WIDTH), True, scaled(heads.first, WIDTH)),
            at + "o_proj": (heads.wide(WIDTH * GROUP), False, scaled(heads.second, WIDTH * GROUP)),
            mlp + "gate_proj": (channels.wide(1), True, slice(0, 0)),
            mlp + "up_proj": (channels.wide(1), True, channels.first),
            mlp + "down_proj": (channels.wide(1), False, channels.second),
        }
    for name, (order, by_row, _) in plan.items():
        weight = new.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data = weight.data[order] if by_row else weight.data[:, order]
    return new, plan


def test_training_equals_the_slices_of_a_permuted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is the same at first, the steps agree, and only selected rows and columns change."""
    monkeypatch.setattr(sessions, "OPTIMIZER", SETTINGS)
    original = contract.tiny("llama").double()
    session = started(EACH, model=contract.tiny("llama").double())
    found = masks(session)
    model, plan = permuted(original, found)
    model.requires_grad_(False)
    tokens = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(
        model(input_ids=tokens).logits, original(input_ids=tokens).logits, atol=1e-12, rtol=0
    )
    cached = model(
        input_ids=tokens[:, 5:],
        past_key_values=model(input_ids=tokens[:, :5], use_cache=True).past_key_values,
    ).logits
    torch.testing.assert_close(cached, original(input_ids=tokens).logits[:, 5:], atol=1e-12, rtol=0)
    slices = {
        n: torch.zeros_like(_part(model.get_submodule(n).weight, r, s)).requires_grad_()
        for n, (_, r, s) in plan.items()
    }
    optimizer = torch.optim.AdamW(list(slices.values()), weight_decay=0.0)
    for number, micro in enumerate(session.batches.steps(0, contract.STEPS)):
        batch = collate([contract.examples("llama")[int(i)] for i in micro[0].ids])  # type: ignore
        fused = {
            f"{n}.weight": _fused(model.get_submodule(n).weight, t, *plan[n][1:]) for n, t in slices.items()
        }
        logits = functional_call(model, fused, kwargs=batch.inputs).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        ).backward()
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr * rate(SETTINGS, number, contract.STEPS)
        optimizer.step()
    contract.finish(session)
    for name, layer in patched(session.model).items():
        order, by_row, part = plan[name]
        back = order.argsort()
        theirs = _fused(model.get_submodule(name).weight, slices[name].detach(), by_row, part)
        theirs = theirs[back] if by_row else theirs[:, back]
        torch.testing.assert_close(layer.weight, theirs, atol=1e-6, rtol=0)
        changed = layer.weight != original.get_submodule(name).weight
        assert not (changed & ~found[name]).any()
    assert sum(int(m.sum()) for m in found.values()) == sum(t.numel() for t in slices.values())


def _part(weight: Any, by_row: bool, part: slice) -> Tensor:
    found: Tensor = weight.detach()[part] if by_row else weight.detach()[:, part]
    return found


def _fused(weight: Any, change: Tensor, by_row: bool, part: slice) -> Tensor:
    new = weight.detach().clone()
    if by_row:
        new[part] = new[part] + change
    else:
        new[:, part] = new[:, part] + change
    return new


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_counts_over_the_model_are_exact(kind: Kind) -> None:
    """With grouped-query attention a unit of o is all query heads of one key and value head."""
    session = started(EACH, kind)
    groups, queries, width = {"llama": (2, 2, 8), "vit": (2, 1, 16)}[kind]
    heads = int(0.5 * groups * LAYERS)
    up, down = int(0.2 * INNER * LAYERS), int(0.3 * INNER * LAYERS)
    assert (
        len(bank_of(session).values)
        == bank_of(session).active
        == 32 * (heads * width + heads * queries * width + up + down)
    )
    found = masks(session)
    ends = {"llama": ("up_proj", "down_proj"), "vit": ("fc1", "fc2")}[kind]
    assert sum(len(rows(m)) for n, m in found.items() if n.endswith(ends[0])) == up
    assert sum(len(rows(m.T)) for n, m in found.items() if n.endswith(ends[1])) == down
    assert not any("gate" in name or "k_proj" in name for name in found)


def test_fused_attention_trains_heads_of_the_last_third() -> None:
    session = started(S2FT(v=0.5, d=0.0), "gpt2")
    blocks = [rows(m, 16) for m in masks(session).values()]
    assert sum(map(len, blocks)) == 2
    assert all(4 <= b < 6 for found in blocks for b in found)  # 2 heads of 16 each in q, k and v


def test_draws_are_over_the_model_and_of_the_seed() -> None:
    """Layers differ, each channel has the same chance, and the seed decides."""
    session = started(S2FT(d=0.3))
    first, counts, seen = (
        torch.cat([m.T.all(1) for m in masks(session).values()]),
        set[int](),
        torch.zeros(LAYERS * INNER),
    )
    session.run.generator.manual_seed(0)
    for _ in range(300):
        session.current.begin(session.run, session.states["method"], None)
        found = torch.cat([m.T.all(1) for m in masks(session).values()])
        assert int(found.sum()) == int(0.3 * INNER * LAYERS)
        assert torch.equal(found, first) == (not counts)
        counts.add(int(found[:INNER].sum()))
        seen += found
    assert len(counts) > 5
    chance = 28 / 96
    assert float((seen - 300 * chance).abs().max()) < 5 * (300 * chance * (1 - chance)) ** 0.5


def unit_scores(model: Any, batch: Any, criterion: str) -> dict[str, Tensor]:
    """Return the score of each unit of each layer of a plain tiny llama, by autograd and hooks."""
    seen: dict[str, Tensor] = {}
    names = [
        name
        for name, _ in model.named_modules()
        if name.endswith(("v_proj", "o_proj", "up_proj", "down_proj"))
    ]
    real = batch.inputs["attention_mask"].bool()
    for name in names:

        def keep(_: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            x = output if name.endswith(("v_proj", "up_proj")) else inputs[0]
            seen[name] = x.detach()[real].abs().mean(0)

        model.get_submodule(name).register_forward_hook(keep)
    logits = model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits
    nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    ).backward()
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight
        rows_first = name.endswith(("v_proj", "up_proj"))
        if criterion == "activation":
            per_feature = seen[name]
        else:
            entries = (weight.detach() if criterion == "weight" else weight.grad).abs()
            per_feature = entries.mean(1 if rows_first else 0)
        size = {"v_proj": WIDTH, "o_proj": WIDTH * GROUP}.get(name.rpartition(".")[2], 1)
        found[name] = per_feature.reshape(-1, size).mean(1)
    return found


@pytest.mark.parametrize("direction", ["largest", "smallest"])
@pytest.mark.parametrize("criterion", ["weight", "activation", "gradient"])
def test_units_are_the_best_of_the_model_by_their_criterion(criterion: Any, direction: Any) -> None:
    session = started(replace(EACH, criterion=criterion, direction=direction))
    (batch,) = session.run.upcoming(1)[0]
    scores = unit_scores(contract.tiny("llama"), batch, criterion)
    for ending, share in (("v_proj", 0.5), ("o_proj", 0.5), ("up_proj", 0.2), ("down_proj", 0.3)):
        size = {"v_proj": WIDTH, "o_proj": WIDTH * GROUP}.get(ending, 1)
        chosen, every = list[int](), list[Tensor]()
        for block, name in enumerate(name for name in scores if name.endswith(ending)):
            mask = masks(session)[name]
            mine = rows(mask if ending in ("v_proj", "up_proj") else mask.T, size)
            chosen += [block * len(scores[name]) + unit for unit in mine]
            every.append(scores[name])
        whole = torch.cat(every)
        best = whole.topk(int(share * len(whole)), largest=direction == "largest").indices
        assert sorted(chosen) == sorted(best.tolist())


@pytest.mark.parametrize("criterion", ["weight", "activation", "gradient"])
def test_the_values_of_a_fused_projection_are_chosen_in_its_last_third(criterion: Any) -> None:
    found = masks(started(S2FT(v=0.5, d=0.0, criterion=criterion), "gpt2"))
    for mask in found.values():
        first = 2 * len(mask) // 3
        assert not mask[:first].any()
    assert sum(int(mask.all(1).sum()) for mask in found.values()) > 0


def test_settings_of_another_criterion_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.direction=smallest has no effect with criterion=random"):
        S2FT(direction="smallest")
    with pytest.raises(ValueError, match=r"method\.batches=2 has no effect with criterion=weight"):
        S2FT(criterion="weight", batches=2)


def test_all_channels_train_the_whole_matrix() -> None:
    assert all(m.all() for m in masks(started(S2FT(d=1.0))).values())


def test_change_of_down_has_at_most_the_rank_of_its_channels() -> None:
    session = contract.finish(started(S2FT(u=0.1, d=0.1)))
    for name, layer in patched(session.model).items():
        mask = masks(session)[name]
        count = len(rows(mask.T if name.endswith("down_proj") else mask))
        assert int(torch.linalg.matrix_rank((layer.weight - layer.original).double(), tol=1e-6)) <= count


def test_merged_twice_is_merged_once() -> None:
    """The second time there is nothing left to fold in."""
    session = contract.finish(started(EACH))
    live = contract.logits(session.tuned, "llama")
    merge(session.model, session.states)
    once = copy.deepcopy(session.model)
    merge(session.model, session.states)
    contract.same_values(session.model, once)
    torch.testing.assert_close(contract.logits(session.model, "llama"), live, atol=2e-5, rtol=1e-4)


def test_disjoint_selections_add_without_touching_each_other() -> None:
    model, states = contract.tiny("llama"), []
    for start in (0, 10):
        state = S2FT(d=0.1).build(model)
        bank = state["bank"]
        assert isinstance(bank, Bank)
        columns = torch.arange(start, start + 4)
        index = (torch.arange(32)[:, None] * INNER + columns).view(-1).to(torch.int32)
        bank.place([index, index])
        bank.values.data[: 2 * len(index)].normal_()
        states.append(state)
    layer = patched(model)["model.layers.0.mlp.down_proj"]
    both = layer.weight
    for delta, mine in zip(layer.deltas, (slice(0, 4), slice(10, 14)), strict=True):
        delta.gate = 0.0
        assert torch.equal(layer.weight[:, mine], layer.original[:, mine])
        changed = layer.weight != both
        assert changed[:, mine].all()
        assert int(changed.sum()) == 4 * 32
        delta.gate = 1.0


def test_one_more_channel_changes_nothing_at_the_start() -> None:
    few, many = started(S2FT(d=0.1)), started(S2FT(d=0.5))
    assert torch.equal(contract.logits(few.tuned, "llama"), contract.logits(many.tuned, "llama"))


def test_layers_of_different_widths_have_room_for_the_largest_units() -> None:
    model = contract.tiny("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 64, bias=False)
    state = S2FT(d=0.5).build(model)["bank"]
    assert isinstance(state, Bank)
    assert len(state.values) == 48 * 64


def test_shares_that_the_model_cannot_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="all 0"):
        S2FT(d=0.0)
    with pytest.raises(
        ConfigError, match=r"method\.d=0\.001 of the model's 96 channels is less than one; take 0\.01 or more"
    ):
        S2FT(d=0.001).build(contract.tiny("llama"))
    with pytest.raises(ConfigError, match=r"method\.v=0\.1 of the model's 4 heads is less than one"):
        S2FT(v=0.1).build(contract.tiny("llama"))
    with pytest.raises(ConfigError, match=r"method\.u=0\.1: .* up; .*\n.*method\.d=0\.03: .* down"):
        S2FT(u=0.1).build(nn.Sequential(nn.Linear(4, 4)))
    model = contract.tiny("llama")
    model.config.head_dim = 7
    with pytest.raises(ConfigError, match=r"heads of this llama model are unknown: .* width 7"):
        S2FT(v=0.5).build(model)
