"""The low-rank structure: the best factors, roles of the factors, and the checks of every structure."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from finetune.core.anatomy import Anatomy
from finetune.core.linalg import factor_low_rank
from finetune.core.site import find_sites
from finetune.core.structure import StructuredLinear
from finetune.errors import ConfigError
from finetune.models.sidecar import fit, replace_module
from finetune.structures.low_rank import LowRank
from finetune.testing.sessions import Kind, tiny
from finetune.testing.structures import check_structure


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_factors_lose_exactly_the_smallest_singular_values(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    first, second = factor_low_rank(weight, rank)
    values = torch.linalg.svdvals(weight)
    error = (weight - second @ first).norm()
    assert torch.allclose(error, values[rank:].square().sum().sqrt(), atol=1e-12)
    for norms in (first.norm(dim=1), second.norm(dim=0)):
        assert torch.allclose(norms, values[:rank].sqrt(), rtol=1e-10)
    assert torch.allclose(first @ first.mT, values[:rank].diag(), atol=1e-10)


def test_a_weight_of_a_smaller_rank_is_kept() -> None:
    weight = torch.ones(4, 6, dtype=torch.float64)
    first, second = factor_low_rank(weight, 3)
    assert torch.allclose(second @ first, weight, atol=1e-12)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


def replaced(kind: Kind) -> Any:
    """Return a model whose query, or query-key-value, layers are of rank 2."""
    model = tiny(kind)
    for site in find_sites(model, ("qkv",) if kind == "gpt2" else ("q",)):
        structure = LowRank(site.shape[1], site.shape[0], site.has_bias, 2)
        replace_module(model, site.name, fit(structure, site.module))
    return model


@pytest.mark.parametrize(("kind", "role"), [("llama", "q"), ("gpt2", "qkv"), ("vit", "q")])
def test_targets_find_the_factors(kind: Kind, role: str) -> None:
    model = replaced(kind)
    found = find_sites(model, (role,))
    assert [site.role for site in found] == [f"{role}.first", f"{role}.second"] * 2
    assert found[0].shape[0] == found[1].shape[1] == 2
    assert [site.name for site in find_sites(model, (f"{role}.second",))] == [found[1].name, found[3].name]
    for group in ("attention", "all"):
        assert {site.name for site in found} < {site.name for site in find_sites(model, (group,))}
    assert len(find_sites(model, ("all",))) == len(find_sites(tiny(kind), ("all",))) + 2


def test_the_anatomy_of_such_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="Layers of this llama model are stored as structures"):
        Anatomy.of(replaced("llama"))


def test_a_transposed_layer_becomes_a_plain_structure() -> None:
    """The Conv1D of GPT-2 stores [in, out]; at full rank the model computes the same."""
    model, ids = tiny("gpt2"), torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    for site in find_sites(model, ("all",)):
        structure = LowRank(site.shape[1], site.shape[0], site.has_bias, min(site.shape))
        replace_module(model, site.name, fit(structure, site.module))
    assert sum(isinstance(module, StructuredLinear) for module in model.modules()) == 8
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("vit", marks=pytest.mark.slow)])
def test_contract(kind: Kind) -> None:
    check_structure(partial(LowRank, rank=3), kind)
