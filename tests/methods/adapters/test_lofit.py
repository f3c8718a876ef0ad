"""Compare LoFiT with its formula, its ranking with a training written out, and the merge with the bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.core.anatomy import Anatomy
from finetune.core.attach import NotMergeable, base, detach, merge
from finetune.data.encode import IGNORED
from finetune.errors import ConfigError
from finetune.methods.adapters.lofit import HeadFactors, HeadOffsets, HeadRanking, LoFiT, Offsets
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, Published, contract_test
from finetune.testing.sessions import Kind, tiny
from finetune.training.session import Session

CASES = [
    Case(
        "lofit",
        lambda: LoFiT(share=0.5, noise=0.1),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("method.share=0.5",),  # of the few heads of a tiny model
        selectable=False,
        budget="cannot meet budget",
    )
]

PUBLISHED = Published(
    "arXiv 2406.01563: table 3 for the share, the released code and its script for TruthfulQA for the rest",
    {"share": 0.1, "ranking": 0.5, "l1": 5e-4, "noise": 1e-3},
)

test_contract = contract_test(CASES)

KINDS: list[Kind] = ["vit", "gpt2", "llama"]
SIZES = {"vit": (2, 16), "gpt2": (2, 16), "llama": (4, 8)}  # heads of a block, width of a head


@pytest.mark.parametrize("check", [name for name in contract.CHECKS if name != "merge"])
def test_contract_but_for_the_merge_on_a_model_without_biases(check: str, llama: contract.Trial) -> None:
    contract.CHECKS[check](llama)


@pytest.fixture(scope="module")
def llama() -> contract.Trial:
    return contract.Trial(lambda: LoFiT(share=0.5, noise=0.1), "llama")


def second_phase(kind: Kind, method: LoFiT | None = None) -> tuple[Session, list[Tensor]]:
    """Return a session before the first step of its second phase, and the factors of the first, by block."""
    session = sessions.begin(method or LoFiT(share=0.5), kind)
    steps = session.steps()
    for _ in range(sessions.STEPS // 2):
        next(steps)
    previous = session.states["method"]
    factors = [each.a.detach().clone() for each in factors_of(previous)]
    session.enter(1)
    session.start(previous)
    return session, factors


def factors_of(state: nn.Module) -> list[HeadFactors]:
    """Return the factors of the first phase, by block."""
    return [module for module in state.modules() if isinstance(module, HeadFactors)]


def views_of(state: nn.Module) -> list[HeadOffsets]:
    return [module for module in state.modules() if isinstance(module, HeadOffsets)]


def offsets_of(session: Session) -> Offsets:
    state: Any = session.states["method"]
    offsets = state["offsets"]
    assert isinstance(offsets, Offsets)
    return offsets


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_ranked_by_the_norm_of_their_factors(kind: Kind) -> None:
    session, factors = second_phase(kind)
    norms = [
        (float(a[head].norm()), block, head) for block, a in enumerate(factors) for head in range(len(a))
    ]
    norms.sort(key=lambda each: -each[0])
    heads, width = SIZES[kind]
    expected = [block * heads + head for _, block, head in norms[:heads]]  # half of two blocks' heads
    offsets = offsets_of(session)
    assert offsets.chosen.tolist() == expected
    assert len(set(expected)) == len(expected)
    assert offsets.values.shape == (heads, width)


def test_the_second_phase_trains_the_offsets_of_the_chosen_heads_and_nothing_else() -> None:
    session, _ = second_phase("gpt2", LoFiT(share=0.25))
    trained = {n: p for n, p in session.states["method"].named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {"offsets.values": (1, 16)}
    sessions.finish(session)
    offsets = offsets_of(session)
    rows = [view.row() for view in views_of(session.states["method"])]
    chosen = int(offsets.chosen[0])
    whole = torch.cat(rows).view(4, 16)
    assert torch.equal(whole[chosen], offsets.values[0])
    whole[chosen] = 0
    assert not whole.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_phase_computes_the_formula(kind: Kind) -> None:
    """The oracle scales the columns of the output projection."""
    model = tiny(kind).requires_grad_(False)
    merged = copy.deepcopy(model)
    state = HeadRanking().build(model)
    for factors, block in zip(factors_of(state), Anatomy.of(merged).blocks, strict=True):
        assert factors.a.shape == SIZES[kind]
        factors.a.data.normal_()
        weight: Any = block.attention.last.module.weight
        columns = weight.data.T if kind == "gpt2" else weight.data
        columns *= 1 + factors.a.detach().flatten()
    torch.testing.assert_close(sessions.logits(model, kind), sessions.logits(merged, kind))


def test_the_penalty_is_the_sum_of_absolute_changes_of_the_factors() -> None:
    session = sessions.begin(LoFiT(share=0.5, l1=0.25))
    session.start()
    total = 0.0
    for factors in factors_of(session.states["method"]):
        factors.a.data.uniform_(-1, 1)
        total += float(factors.a.detach().abs().sum())
    loss = session.current.loss(session.run, session.states["method"], None)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(float(loss.detach()), 0.25 * total)
    loss.backward()
    for factors in factors_of(session.states["method"]):
        torch.testing.assert_close(factors.a.grad, 0.25 * factors.a.detach().sign())


def test_the_ranking_equals_a_training_of_scaled_columns() -> None:
    """Train the factors by hand: the projection's columns times 1 + a, the loss, the penalty, AdamW."""
    method = LoFiT(share=0.5, noise=0.0, l1=0.01)
    session, found = second_phase("llama", method)  # a model without dropout
    twin = sessions.begin(method, "llama")
    model = twin.model
    detach(model, twin.states)
    a = [torch.zeros(32, requires_grad=True) for _ in range(2)]
    for block, factors in zip(Anatomy.of(model).blocks, a, strict=True):
        block.attention.last.module.register_forward_pre_hook(
            lambda _m, args, factors=factors: (args[0] * (1 + factors),)
        )
    settings = sessions.OPTIMIZER
    optimizer = torch.optim.AdamW(a, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    optimizer.param_groups[0]["weight_decay"] = settings.weight_decay
    for number in range(sessions.STEPS // 2):
        optimizer.param_groups[0]["lr"] = settings.lr * rate_of(number)
        (batch,) = next(iter(twin.batches.steps(number, number + 1)))
        assert batch is not None
        logits = model(**batch.inputs).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        (loss + 0.01 * torch.cat(a).abs().sum()).backward()
        if sessions.TRAIN.clip:
            nn.utils.clip_grad_norm_(a, sessions.TRAIN.clip)
        optimizer.step()
        optimizer.zero_grad()
    for factors, one in zip(a, found, strict=True):
        torch.testing.assert_close(one.flatten(), factors.detach(), rtol=1e-4, atol=1e-6)
    assert session.phase == 1


def rate_of(step: int) -> float:
    from finetune.training.optimizer import rate

    return rate(sessions.OPTIMIZER, step, sessions.STEPS // 2)  # the schedule runs over each phase


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_both_phases_begin_at_the_base_to_the_bit(kind: Kind) -> None:
    plain = sessions.logits(tiny(kind), kind)
    session = sessions.begin(LoFiT(share=0.5, noise=0.0), kind)
    session.start()
    assert torch.equal(sessions.logits(session.tuned, kind), plain)
    session, _ = second_phase(kind, LoFiT(share=0.5, noise=0.0))
    with base(session.states["head"] if "head" in session.states else nn.Module()):
        assert torch.equal(sessions.logits(session.tuned, kind), plain)


def test_with_the_published_noise_the_start_is_near_the_base() -> None:
    session = sessions.begin(LoFiT(share=0.5))
    session.start()
    found, plain = sessions.logits(session.tuned), sessions.logits(tiny())
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=5e-3)
    values = torch.cat([factors.a.detach().flatten() for factors in factors_of(session.states["method"])])
    assert 0.7e-3 < float(values.std()) < 1.3e-3


def test_offsets_of_0_give_the_base_to_the_bit_after_training() -> None:
    session = sessions.finish(sessions.begin(LoFiT(share=0.5), "llama"))
    assert not torch.equal(sessions.logits(session.tuned, "llama"), sessions.logits(tiny("llama"), "llama"))
    offsets_of(session).values.data.zero_()
    assert torch.equal(sessions.logits(session.tuned, "llama"), sessions.logits(tiny("llama"), "llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_adds_one_vector_at_every_position_of_every_input(kind: Kind) -> None:
    """The vector is the slice of the output projection times the offset."""
    model = tiny(kind).double().requires_grad_(False)
    state = LoFiT(share=0.5).build(model)
    offsets = state["offsets"]
    assert isinstance(offsets, Offsets)
    state.double()
    heads, width = SIZES[kind]
    offsets.chosen.copy_(torch.arange(heads).flip(0) + (1 if heads == 2 else 2))
    offsets.values.data.normal_()
    for number, block in enumerate(Anatomy.of(model).blocks):
        module: Any = block.attention.last.module
        matrix = module.weight.T if kind == "gpt2" else module.weight
        x = torch.randn(3, 5, heads * width, dtype=torch.float64)
        added = module(x) - module.forward(x)
        expected = torch.zeros(32, dtype=torch.float64)
        for row, head in enumerate(offsets.chosen.tolist()):
            if head // heads == number:
                j = head % heads
                expected = expected + matrix[:, j * width : (j + 1) * width] @ offsets.values[row]
        torch.testing.assert_close(added, expected.expand_as(added))
        assert expected.any()


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_merging_adds_to_the_bias_of_the_output_projection_only(kind: Kind) -> None:
    session = sessions.finish(sessions.begin(LoFiT(share=0.5, noise=0.5), kind))
    live = sessions.logits(session.tuned, kind)
    changed = {view.layer for view in views_of(session.states["method"])}
    with base(session.states["method"]):
        before = {name: t.clone() for name, t in session.model.state_dict().items()}
    merge(session.model, session.states)
    torch.testing.assert_close(sessions.logits(session.model, kind), live, rtol=1e-5, atol=1e-5)
    for name, tensor in session.model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            assert name.removesuffix(".bias") in changed


def test_merging_is_refused_without_a_bias_and_changes_nothing() -> None:
    session = sessions.finish(sessions.begin(LoFiT(share=0.5), "llama"))
    live = sessions.logits(session.tuned, "llama")
    with pytest.raises(NotMergeable, match=r"offsets of attention heads before a projection without a bias"):
        merge(session.model, session.states)
    assert torch.equal(sessions.logits(session.tuned, "llama"), live)


def test_a_block_without_chosen_heads_does_nothing_and_backward_stops_above_it() -> None:
    model = tiny("gpt2").requires_grad_(False)
    state = LoFiT(share=0.25).build(model)
    offsets = state["offsets"]
    assert isinstance(offsets, Offsets)
    offsets.chosen.fill_(3)
    offsets.values.data.normal_()
    effects = [view.has_effect for view in views_of(state)]
    assert effects == [False, True]
    seen: list[Tensor] = []
    model.transformer.h[1].register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.requires_grad
    assert not seen[0].requires_grad


def test_small_offsets_survive_on_a_bfloat16_base() -> None:
    model = tiny("vit").bfloat16().requires_grad_(False)
    state = LoFiT(share=1.0).build(model)
    offsets = state["offsets"]
    assert isinstance(offsets, Offsets)
    offsets.values.data.fill_(3 / 512)
    projection = Anatomy.of(model).blocks[0].attention.last.module
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
    projection(torch.ones(1, 32, dtype=torch.bfloat16))
    assert torch.equal(seen[0], torch.full((1, 32), 1 + 1 / 128, dtype=torch.bfloat16))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"method\.share=0\.1 of the model's 4 attention heads is less than one; take 0\.25"
    ):
        LoFiT().build(tiny("gpt2"))
    (fault,) = LoFiT(ranking=0.05).faults(steps=5)
    assert fault.startswith("train.steps=5 with method.ranking=0.05 leaves no step")
    assert LoFiT().faults(steps=2) == []
