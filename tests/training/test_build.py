"""Check the one build of a phase's states: what a session trains, and what is counted without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.core.attach import detach, parts, trained_in_place
from finetune.core.method import Method
from finetune.core.selector import Selector
from finetune.errors import ConfigError
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.baseline.head import Head
from finetune.methods.reparam.lora import LoRA
from finetune.methods.sparse.shira import SHiRA
from finetune.selectors.ist import IST
from finetune.testing import contract
from finetune.testing.cases import Case, find_cases
from finetune.training.build import Pretrained, build_states

HEAD = ("classifier.weight", "classifier.bias")
CASES = [case for case in find_cases(Path(__file__).parents[1] / "methods") if "vit" in case.kinds]
METHODS: list[Callable[[], Method]] = [lambda: LoRA(rank=2), lambda: SHiRA(sparsity=0.9), Full, BitFit, Head]


def shapes(states: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in states.state_dict().items()}


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make().name)
def test_a_build_without_values_has_the_shapes_of_a_session(make: Callable[[], Method]) -> None:
    session = contract.begin(make())
    model = contract.tiny().requires_grad_(False).to("meta")
    with torch.device("meta"):
        states = build_states(Pretrained(model, HEAD), make())
    assert all(tensor.is_meta for tensor in states.parameters())
    assert shapes(states) == shapes(session.states)
    assert list(states) == ["head", "method"]


def test_the_selector_is_built_for_all_that_is_trained() -> None:
    model = contract.tiny().requires_grad_(False)
    states = build_states(Pretrained(model, HEAD), LoRA(rank=2), IST())
    assert list(states) == ["head", "method", "selector"]
    assert shapes(states) == shapes(contract.begin(LoRA(rank=2), selector=IST()).states)
    detach(model, states)
    contract.same_values(model, contract.tiny())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_method_can_leave_a_kept_head_frozen(case: Case) -> None:
    model = contract.tiny().requires_grad_(False)
    pretrained = Pretrained(model, HEAD, new_head=False, train_head=False)
    method = case.make().phases()[-1].method
    if method.name == "head":
        with pytest.raises(ConfigError, match=r"nothing to train here: method\.head=false freezes the head"):
            build_states(pretrained, method)
        return
    states = build_states(pretrained, method)
    assert not any(p.requires_grad for p in states["head"].parameters())
    for parameter in HEAD:
        assert not model.get_parameter(parameter).requires_grad
        assert parameter not in trained_in_place(states)
    counted = sum(part.adapted() for part in parts(states))
    assert counted == sum(part.adapted() for part in parts(states["method"]))


def test_a_selector_without_a_state_has_an_empty_one() -> None:
    states = build_states(Pretrained(contract.tiny().requires_grad_(False), HEAD), BitFit(), Selector())
    assert not list(states["selector"].state_dict())


def test_a_method_that_trains_nothing_is_refused() -> None:
    model = contract.tiny("gpt2").requires_grad_(False)
    with pytest.raises(ConfigError, match="method=head has nothing to train here"):
        build_states(Pretrained(model), Head())


def test_parts_without_a_copy_get_the_source_of_the_originals() -> None:
    original = contract.tiny()
    model = contract.tiny().requires_grad_(False)
    states = build_states(Pretrained(model, HEAD, reload=lambda: original), Full())
    with torch.no_grad():
        for parameter in states.parameters():
            parameter.add_(1.0)
    detach(model, states)
    contract.same_values(model, original)
