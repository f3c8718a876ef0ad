"""Test SHiRA's vector form against its other form: the whole weight trained with masked gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.core.attach import patched
from finetune.core.site import Site
from finetune.core.sparse.bank import Bank, SparseDelta
from finetune.methods.sparse.shira import SHiRA
from finetune.schedules.static import Static
from finetune.storage.delta import load_delta, save_delta
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test
from finetune.training.session import Session

CASES = [Case("shira", lambda: SHiRA(sparsity=0.9), ("vit", "gpt2", "llama"))]

PUBLISHED = Published(
    "arXiv 2406.13175: 2 % of the entries for images; huggingface/peft for the mask",
    {
        "sparsity": 0.98,
        "score": "random",
        "scope": "matrix",
        "grain": "element",
        "schedule": Static(),
        "decay": "base",
    },
)

test_contract = contract_test(CASES)


def started(method: SHiRA, seed: int = 0) -> Session:
    session = contract.begin(method, seed=seed)
    session.start()
    return session


def places(session: Session) -> list[torch.Tensor]:
    bank = session.states["method"]["bank"]
    return [bank.positions(i).clone() for i in range(len(bank.sizes))]


def test_exactly_k_entries_ever_differ_and_always_the_same() -> None:
    session = started(SHiRA(sparsity=0.9))
    before = places(session)
    for _ in session.steps():
        for found, first in zip(places(session), before, strict=True):
            assert torch.equal(found, first)
    for place, layer in zip(before, patched(session.model).values(), strict=True):
        differ = (layer.weight != layer.original).flatten().nonzero().flatten()
        assert torch.equal(differ.int(), place)
        assert len(place) == layer.original.numel() - round(0.9 * layer.original.numel())


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [((100, 10), 0.9, 100), ((100, 10), 0.99, 10), ((3, 1), 0.99, 1), ((10, 10), 0.0, 100)],
)
def test_count_is_rounded_and_never_zero(size: tuple[int, int], sparsity: float, expected: int) -> None:
    model = nn.Sequential(nn.Linear(size[1], size[0]))
    state = SHiRA(sparsity=sparsity).build(model)
    assert len(state["bank"].values) == expected  # int(1000 * (1 - 0.9)) would be 99


def test_masks_differ_between_layers_of_one_shape_and_between_seeds() -> None:
    first, again, other = (places(started(SHiRA(sparsity=0.9), seed)) for seed in (0, 0, 1))
    assert not torch.equal(first[0], first[1])  # q and k of the first block
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_change_has_high_rank() -> None:
    """With out = in = 256 and the budget of a LoRA of rank 4 the rank is 256."""
    site = Site("q", nn.Linear(256, 256), 0, "q", (256, 256))
    bank = Bank([site], 4 * 512)
    bank.place(
        [torch.randperm(256 * 256, generator=torch.Generator().manual_seed(0))[: 4 * 512].sort().values]
    )
    bank.values.data.normal_(generator=torch.Generator().manual_seed(1))
    assert int(torch.linalg.matrix_rank(SparseDelta(bank, 0, site)(site.module.weight))) > 200


def changes(method: SHiRA) -> list[torch.Tensor]:
    """Return S of each layer after training."""
    session = contract.finish(started(method))
    deltas = [layer.deltas[0] for layer in patched(session.model).values()]
    return [delta(delta.bank.values).detach() for delta in deltas]


@pytest.mark.parametrize("grain", ["element", "row", "column"])
def test_top_and_bottom_magnitude_are_disjoint(grain: str) -> None:
    """They are if less than half of the entries is trained."""
    top, bottom = (
        places(started(SHiRA(sparsity=0.6, score="magnitude", direction=d, grain=grain)))
        for d in ("largest", "smallest")
    )
    for a, b in zip(top, bottom, strict=True):
        assert len(a)
        assert not set(a.tolist()) & set(b.tolist())


def test_row_structured_adapters_that_share_no_row_do_not_interfere() -> None:
    """S1^T S2 is exactly 0. Adapters of single entries do interfere."""
    for grain in ("row", "element"):
        first, second = (
            changes(SHiRA(sparsity=0.9, score="magnitude", direction=d, grain=grain))
            for d in ("largest", "smallest")
        )
        assert all(s.any() for s in [*first, *second])
        assert (grain == "row") == all(not (a.T @ b).any() for a, b in zip(first, second, strict=True))
        if grain == "row":
            assert all(set(s.any(1).tolist()) == {False, True} and s[s.any(1)].all() for s in first), (
                "whole rows, and not all of them"
            )


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_vector_form_equals_gradient_masked_form(optimizer: str) -> None:
    session = started(SHiRA(sparsity=0.8, targets=("up",)))
    bank, masked = session.states["method"]["bank"], contract.tiny().double().requires_grad_(False)
    session.model.double()
    bank.double()
    masks = {}
    for i, (name, layer) in enumerate(patched(session.model).items()):
        weight = masked.get_submodule(name).weight.requires_grad_()
        masks[name] = (
            torch.zeros(weight.numel(), dtype=torch.float64)
            .index_fill(0, bank.positions(i).long(), 1.0)
            .view_as(weight)
        )
        assert layer.original.dtype == torch.float64
    weights = [masked.get_submodule(name).weight for name in masks]
    ours, theirs = OPTIMIZERS[optimizer]([bank.values]), OPTIMIZERS[optimizer](weights)
    x, y = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8) % 3
    masked.classifier.load_state_dict(
        {k: v.double() for k, v in session.model.classifier.state_dict().items()}
    )
    for _ in range(5):
        for model, step in ((session.model, ours), (masked, theirs)):
            step.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
            if model is masked:
                for name, mask in masks.items():
                    model.get_submodule(name).weight.grad.mul_(mask)
            step.step()
    for name, layer in patched(session.model).items():
        torch.testing.assert_close(layer.weight, masked.get_submodule(name).weight)
        assert not torch.equal(layer.weight, layer.original)


def test_forward_leaves_the_base_as_it_was_and_gate_zero_is_the_base() -> None:
    session = contract.finish(started(SHiRA(sparsity=0.5)))
    contract.logits(session.tuned)
    for name, layer in patched(session.model).items():
        assert torch.equal(layer.original, contract.tiny().get_submodule(name).weight)
    deltas = [d for layer in patched(session.model).values() for d in layer.deltas]
    whole = next(iter(patched(session.model).values()))
    full = whole.weight - whole.original
    for delta in deltas:
        delta.gate = 0.5
    torch.testing.assert_close(whole.weight - whole.original, 0.5 * full, atol=1e-6, rtol=1e-3)
    for delta in deltas:
        delta.gate = 0.0
    session.states["head"].gate = 0.0
    assert torch.equal(contract.logits(session.tuned), contract.logits(contract.tiny()))


def test_stored_indices_come_back_whatever_the_seed(tmp_path: Path) -> None:
    session, other = contract.finish(started(SHiRA(sparsity=0.9))), started(SHiRA(sparsity=0.9), seed=5)
    save_delta(tmp_path / "delta", session.states, {})
    load_delta(tmp_path / "delta", other.states)
    assert all(torch.equal(a, b) for a, b in zip(places(session), places(other), strict=True))
    assert torch.equal(session.states["method"]["bank"].values, other.states["method"]["bank"].values)


def test_stored_size_is_at_most_six_bytes_an_entry_at_two_percent(tmp_path: Path) -> None:
    sites = [Site(f"l{i}", nn.Linear(768, 768), i, "q", (768, 768)) for i in range(3)]
    k = round(0.02 * 768 * 768)
    bank = Bank(sites, 3 * k)
    bank.place([torch.randperm(s.size)[:k].sort().values for s in sites])
    save_delta(tmp_path / "delta", nn.ModuleDict({"bank": bank}), {})
    assert (tmp_path / "delta" / "delta.safetensors").stat().st_size <= 6 * len(bank.values)


def test_casting_a_model_leaves_the_indices_alone() -> None:
    session = started(SHiRA(sparsity=0.9))
    before = places(session)
    session.states.bfloat16()
    assert all(
        torch.equal(a, b) and a.dtype == torch.int32 for a, b in zip(places(session), before, strict=True)
    )
