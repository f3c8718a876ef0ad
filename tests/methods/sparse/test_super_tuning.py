"""Test Super-Tuning's mask, its count, and the branch of Supra."""

from __future__ import annotations

import torch

from finetune.core.attach import patched
from finetune.core.lowrank import LowRank
from finetune.methods.sparse.super_tuning import SuperTuning
from finetune.schedules.static import Static
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [
    Case("super_tuning", lambda: SuperTuning(sparsity=0.9)),
    Case("super_tuning branch", lambda: SuperTuning(sparsity=0.9, branch=2), ("vit", "gpt2")),
]

PUBLISHED = Published(
    "arXiv 2607.09287: the code of huggingface/peft",
    {
        "sparsity": 0.99,
        "score": "magnitude",
        "direction": "largest",
        "scope": "matrix",
        "schedule": Static(),
        "decay": "base",
        "branch": 0,
    },
)

test_contract = contract_test(CASES)


def masks(method: SuperTuning) -> list[set[int]]:
    session = contract.begin(method)
    session.start()
    bank = session.states["method"]["bank"]
    return [set(bank.positions(i).tolist()) for i in range(len(bank.sizes))]


def test_the_largest_of_each_matrix() -> None:
    found = masks(SuperTuning(sparsity=0.9))
    session = contract.begin(SuperTuning(sparsity=0.9))
    for chosen, layer in zip(found, patched(session.model).values(), strict=True):
        size = layer.original.numel()
        assert chosen == set(
            layer.original.abs()
            .reshape(-1)
            .sort(descending=True, stable=True)
            .indices[: size - round(0.9 * size)]
            .tolist()
        )


def test_top_and_bottom_are_disjoint() -> None:
    top, bottom = masks(SuperTuning(sparsity=0.6)), masks(SuperTuning(sparsity=0.6, direction="smallest"))
    assert all(a and b and not a & b for a, b in zip(top, bottom, strict=True))


def test_the_count_is_rounded_where_floating_point_would_truncate() -> None:
    """int(1000 * (1 - 0.9)) is 99."""
    model = torch.nn.Sequential(torch.nn.Linear(50, 20))
    state = SuperTuning(sparsity=0.9).build(model)
    assert len(state["bank"].values) == 100  # type: ignore[arg-type]


def test_supra_adds_a_branch_of_its_rank() -> None:
    session = contract.finish(contract.begin(SuperTuning(sparsity=0.9, branch=2)))
    layers = list(patched(session.model).values())
    bank = session.states["method"]["bank"]
    for i, layer in enumerate(layers):
        rest = (layer.weight - layer.original).view(-1).index_fill(0, bank.positions(i).long(), 0.0)
        branch = next(d for d in layer.deltas if isinstance(d, LowRank))
        assert branch.scale == 2.0
        change = branch.scale * branch.b @ branch.a
        assert int(torch.linalg.matrix_rank(change)) == 2
        torch.testing.assert_close(
            rest, change.reshape(-1).index_fill(0, bank.positions(i).long(), 0.0), atol=1e-6, rtol=1e-5
        )
