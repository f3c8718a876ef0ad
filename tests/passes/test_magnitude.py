"""Magnitude pruning: exact counts, kept weights to the bit, n:m patterns, and the checks of every pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune.core.site import Site
from finetune.passes.magnitude import Magnitude
from finetune.testing.passes import check_pass


def site_of(weight: Tensor) -> Site:
    rows, cols = weight.shape
    return Site("layer", nn.Linear(cols, rows), 0, "q", (rows, cols))


def some_weight(rows: int = 6, cols: int = 12) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_the_smallest_entries_of_the_matrix_become_zero(sparsity: float) -> None:
    weight = some_weight()
    pruned = Magnitude(sparsity=sparsity).tensor(site_of(weight), weight, None).weight
    count = int(weight.numel() * sparsity)
    gone = pruned != weight
    assert int(gone.sum()) == count
    assert not pruned[gone].any()
    by_size = sorted(weight.abs().flatten().tolist())
    assert sorted(weight.abs()[gone].tolist()) == by_size[:count]


def test_by_row_each_row_loses_as_many() -> None:
    weight = some_weight()
    weight[0] *= 100
    pruned = Magnitude(sparsity=0.25, scope="row").tensor(site_of(weight), weight, None).weight
    assert (pruned == 0).sum(1).tolist() == [3] * 6


def test_a_pattern_prunes_n_of_each_m() -> None:
    weight = some_weight()
    pruned = Magnitude(pattern="1:4").tensor(site_of(weight), weight, None).weight
    for row, new in zip(weight.tolist(), pruned.tolist(), strict=True):
        for start in range(0, 12, 4):
            group, after = row[start : start + 4], new[start : start + 4]
            smallest = min(group, key=abs)
            assert after == [0 if value == smallest else value for value in group]


def test_masks_nest_and_ties_are_counted_exactly() -> None:
    weight = torch.ones(40, 90)
    before = torch.zeros(40, 90, dtype=torch.bool)
    for sparsity in (0.1, 0.4, 0.8):
        pruned = Magnitude(sparsity=sparsity).tensor(site_of(weight), weight, None).weight == 0
        assert int(pruned.sum()) == int(3600 * sparsity)
        assert not (before & ~pruned).any()
        before = pruned


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "Add sparsity=0.5 or pattern=2:4"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity=0.5 has no effect"),
        ({"scope": "row", "pattern": "2:4"}, "scope=row has no effect"),
        ({"pattern": "4:4"}, "not of the form n:m"),
        ({"pattern": "half"}, "not of the form n:m"),
        ({"pattern": "2:5"}, "the 12 inputs of layer are no multiple of 5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], words: str) -> None:
    faults = Magnitude(**settings).faults([site_of(some_weight())])  # type: ignore[arg-type]
    assert len(faults) == 1
    assert words in faults[0]


def test_contract() -> None:
    check_pass(Magnitude(sparsity=0.5), "gpt2")
