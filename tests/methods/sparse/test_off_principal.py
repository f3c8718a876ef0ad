"""Compare the masks of the off-principal study with their definitions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.core.attach import patched
from finetune.methods.sparse.off_principal import OffPrincipal
from finetune.schedules.static import Static
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [Case("off_principal", lambda: OffPrincipal(rank=4))]

PUBLISHED = Published(
    "arXiv 2511.08567: the case study; it does not state the rank",
    {"sparsity": 0.5, "score": "off_principal", "scope": "matrix", "schedule": Static(), "decay": "base"},
)

test_contract = contract_test(CASES)

HALF: dict[str, Any] = {"targets": ("k", "down"), "rank": 3}


def masks(method: OffPrincipal) -> list[tuple[Tensor, Tensor]]:
    """Return the weight and the mask of each layer."""
    session = contract.begin(method)
    session.start()
    bank, found = session.states["method"]["bank"], []
    for i, layer in enumerate(patched(session.model).values()):
        mask = torch.zeros(layer.original.numel(), dtype=torch.bool).index_fill(
            0, bank.positions(i).long(), True
        )
        found.append((layer.original, mask.view(layer.original.shape)))
    return found


def near(w: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    return ((u[:, :3] * s[:3]) @ v[:3]).abs()


def test_principal_and_complement_are_halves() -> None:
    on = masks(OffPrincipal(score="principal", direction="largest", **HALF))  # type: ignore[arg-type]
    off = masks(OffPrincipal(score="principal", direction="smallest", **HALF))  # type: ignore[arg-type]
    for (w, a), (_, b) in zip(on, off, strict=True):
        assert torch.equal(a, ~b)
        assert near(w)[a].min() >= near(w)[b].max() * (1 - 1e-6)


def test_at_full_rank_the_principal_mask_is_that_of_large_weights() -> None:
    full = masks(OffPrincipal(score="principal", sparsity=0.7, targets=("k",), rank=32))
    low = masks(OffPrincipal(score="magnitude", direction="smallest", sparsity=0.7, targets=("k",)))
    for (w, large), (_, small) in zip(full, low, strict=True):
        assert not (large & small).any()
        assert w.abs()[large].min() >= w.abs()[~large].max()


def test_safe_is_the_union_of_low_and_complement_with_k_entries() -> None:
    """For some a it is the union of the a smallest |w| and the a smallest |W_R|, and sizes add up."""
    for w, safe in masks(OffPrincipal(sparsity=0.4, **HALF)):
        k = w.numel() - round(0.4 * w.numel())
        assert int(safe.sum()) == k
        orders = [x.reshape(-1).argsort(stable=True) for x in (w.abs(), near(w))]
        unions = []
        for a in range(w.numel()):
            low, off = ({*order[:a].tolist()} for order in orders)
            assert len(low | off) == len(low) + len(off) - len(low & off)
            unions.append(low | off)
            if len(low | off) >= k:
                break
        chosen = set(safe.reshape(-1).nonzero().view(-1).tolist())
        assert unions[-2] <= chosen <= unions[-1] | unions[-2]


def test_entries_outside_the_mask_stay_to_the_bit() -> None:
    session = contract.begin(OffPrincipal(**HALF))
    session.start()
    bank = session.states["method"]["bank"]
    contract.finish(session)
    for i, layer in enumerate(patched(session.model).values()):
        trained = (
            torch.zeros(layer.original.numel(), dtype=torch.bool)
            .index_fill(0, bank.positions(i).long(), True)
            .view(layer.original.shape)
        )
        assert torch.equal(layer.weight[~trained], layer.original[~trained])
        assert not torch.equal(layer.weight[trained], layer.original[trained])
