"""The bank: its slices, its packed form, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.core.bank import Bank
from finetune.core.site import Site
from finetune.errors import ConfigError

SHAPES = ((6, 5), (40, 30), (3, 2))


def bank(counts: tuple[int, ...] = (4, 100, 6)) -> Bank:
    torch.manual_seed(0)
    made = Bank([Site(str(i), nn.Linear(s[1], s[0]), i, "q", s) for i, s in enumerate(SHAPES)], list(counts))
    made.place([torch.randperm(s[0] * s[1])[:c] for s, c in zip(SHAPES, counts, strict=True)])
    made.values.data = torch.arange(sum(counts)).float()
    return made


def test_slices_are_contiguous_and_places_ascend() -> None:
    b = bank()
    assert torch.equal(torch.cat([b.slice(i) for i in range(3)]), b.values)
    assert [len(b.where(i)) for i in range(3)] == [4, 100, 6]
    assert all((b.where(i).diff() > 0).all() for i in range(3))
    assert torch.equal(b.where(2), torch.arange(6, dtype=torch.int32))


def test_one_split_serves_a_whole_pass_and_no_gradient_passes_do_not_disturb_it() -> None:
    b = bank()
    first = b.slice(0).grad_fn
    with torch.no_grad():
        assert not b.slice(0).requires_grad
    assert b.slice(1).grad_fn is first
    with torch.no_grad():
        b.values += 1
    assert b.slice(0).grad_fn is not first


def test_gradients_of_slices_join_without_padding_and_across_passes() -> None:
    b = bank()
    for _ in range(2):
        (2 * b.slice(0).sum() + 3 * b.slice(2).sum()).backward()
    assert torch.equal(b.values.grad, torch.cat([torch.full((4,), 4.0), torch.zeros(100), torch.full((6,), 6.0)]))


def test_pack_and_unpack_is_exact_into_other_counts() -> None:
    b, other = bank(), bank((1, 2, 3))
    other.unpack(b.pack())
    for name, tensor in b.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert tensor.dtype == other.state_dict()[name].dtype


def test_a_packed_bank_of_larger_sites_is_refused() -> None:
    small = Bank([Site("s", nn.Linear(2, 2), 0, "q", (2, 2))], [1])
    stored = bank().pack()
    with pytest.raises(ConfigError, match="does not fit"):
        small.unpack(stored)
    with pytest.raises(ConfigError, match="damaged"):
        bank().unpack({**stored, "gaps": stored["gaps"][:-1]})
