"""Parameters trained in place: originals kept, or read again from their source."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finetune.core.attach import base, detach
from finetune.core.inplace import InPlace, list_untrained


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)


@pytest.mark.parametrize("keep", [True, False])
def test_switching_and_detaching(keep: bool) -> None:
    net = model()
    original = copy.deepcopy(net)
    part = InPlace(net, ["0.weight", "1.bias"], keep)
    part.source = lambda: iter(original.named_parameters())
    x = torch.randn(2, 3)
    y = original(x)
    assert torch.equal(net(x), y)
    for parameter in part.parameters():
        parameter.data += 1
    changed = net(x)
    assert not torch.allclose(changed, y)
    with base(part):
        assert torch.equal(net(x), y)
    assert torch.equal(net(x), changed)
    detach(net, part)
    assert torch.equal(net(x), y)
    torch.testing.assert_close(part.trained()["0.weight"].data, original[0].weight + 1)


def test_tied_parameters_stay_tied() -> None:
    net = model()
    net[1].weight = net[0].weight
    part = InPlace(net, ["0.weight"], keep=True)
    assert net[0].weight is net[1].weight is part.trained()["0.weight"]
    part.gate = 0.0
    assert net[0].weight is net[1].weight
    assert not net[0].weight.requires_grad


def test_low_precision_parameters_are_trained_in_float32_and_come_back_as_they_were() -> None:
    net = model().bfloat16()
    before = net[0].weight.clone()
    part = InPlace(net, ["0.weight"], keep=False)
    part.source = lambda: iter([("0.weight", before)])
    assert net[0].weight.dtype == torch.float32
    part.detach()
    assert net[0].weight.dtype == torch.bfloat16
    assert torch.equal(net[0].weight, before)


def test_a_copy_of_a_low_precision_model_runs_by_itself() -> None:
    """Parameters in float32 are cast while their module runs; in a copy that is the copied module."""
    net = model().bfloat16()
    InPlace(net, ["0.weight"], keep=True)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    y = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    twin[0].weight.data += 1
    assert not torch.equal(twin(x), y)
    assert torch.equal(net(x), y)
    assert net[0].weight.dtype == twin[0].weight.dtype == torch.float32


def test_without_a_source_the_base_cannot_be_read_again() -> None:
    with pytest.raises(RuntimeError, match="cannot be read again"):
        InPlace(model(), ["0.weight"], keep=False).gate = 0.0
    with pytest.raises(ValueError, match=r"is 1 \(on\) or 0 \(off\), not 0\.5"):
        InPlace(model(), ["0.weight"], keep=True).gate = 0.5


def test_untrained_leaves_out_what_is_trained() -> None:
    net = model()
    InPlace(net, ["0.weight"], keep=True)
    assert list_untrained(net) == ["0.bias", "1.weight", "1.bias"]
