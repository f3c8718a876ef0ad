"""Truncated SVD: the error, the counts, the faults, and the checks of every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.core.site import Site
from finetune.passes.svd import Svd
from finetune.testing.passes import check_pass
from finetune.testing.sessions import Kind


def site_of(rows: int, columns: int) -> Site:
    return Site("layer", nn.Linear(columns, rows), 0, "q", (rows, columns))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(128, 128), (352, 128), (10, 7)])
def test_the_factors_have_the_share_that_is_kept(shape: tuple[int, int], keep: float) -> None:
    """One rank more would have more entries than the share."""
    rows, columns = shape
    site = site_of(rows, columns)
    if Svd(keep=keep).faults([site]):
        assert keep * rows * columns < rows + columns
        return
    made = Svd(keep=keep).tensor(site, torch.ones(rows, columns), None)
    entries = sum(tensor.numel() for tensor in made.tensors.values())
    assert entries <= keep * rows * columns < entries + rows + columns
    assert made.structure.sizes() == {
        "inputs": columns,
        "outputs": rows,
        "bias": True,
        "rank": Svd(keep=keep).rank_of(site),
    }


def test_the_error_is_that_of_the_discarded_singular_values() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    made = Svd(rank=5).tensor(site_of(24, 16), weight, None)
    error = (weight - made.dense()).norm()
    discarded = torch.linalg.svdvals(weight.double())[5:].square().sum().sqrt()
    assert abs(float(error / discarded) - 1) < 1e-6


def test_faults_say_what_to_set() -> None:
    site = site_of(8, 6)
    assert Svd().faults([]) == ["How much is kept is not set. Add keep=0.8 or rank=16."]
    (both,) = Svd(keep=0.5, rank=2).faults([])
    assert "keep=0.5 has no effect with rank=2" in both
    assert Svd(keep=0.2).faults([site]) == ["keep=0.2 leaves a rank of 0 for layer, 8 x 6. Raise it."]
    assert Svd(rank=7).faults([site]) == ["rank=7 is more than the 6 that layer, 8 x 6, can have. Lower it."]
    assert not Svd(rank=6).faults([site])


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_contract(kind: Kind) -> None:
    check_pass(Svd(keep=0.5), kind)
