"""Adapters, then LoRA: two phases of which the second is trained on top of the first."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.artifacts import compose, export
from finetune.config.load import load
from finetune.core.attach import NotMergeable, base, detach, merge, patched
from finetune.data import digits
from finetune.errors import ConfigError
from finetune.methods.adapters.adapter import Adapter
from finetune.methods.adapters.adapter_lora import AdapterLoRA
from finetune.methods.reparam.lora import LoRA
from finetune.sweep import size
from finetune.testing import contract
from finetune.testing.cases import Case, contract_test
from finetune.training.prepare import count_parameters, prepare
from finetune.training.session import Session


def method() -> AdapterLoRA:
    """Half of the steps for each phase: the contract's checkpoints lie within, between and at the end."""
    return AdapterLoRA(share=0.5, bottleneck=4, rank=2)


CASES = [
    Case(
        "adapter_lora",
        method,
        ("vit", "gpt2", "llama"),
        settings=("method.bottleneck=8", "method.targets=[q]"),
        selectable=False,
    )
]

test_contract = contract_test(CASES)


def between(kind: Any = "vit") -> tuple[Session, dict[str, Tensor], Tensor]:
    """Train to the end of the first phase; return what it left, and its logits, and enter the second."""
    session = contract.begin(method(), kind)
    steps = session.steps()
    for _ in range(contract.STEPS // 2):
        next(steps)
    left = {name: tensor.clone() for name, tensor in session.states["method"].state_dict().items()}
    logits = contract.logits(session.tuned, kind)
    previous = session.states["method"]
    session.enter(1)
    session.start(previous)
    return session, left, logits


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_the_second_phase_starts_where_the_first_ended_and_leaves_its_parts_alone(kind: Any) -> None:
    session, left, logits = between(kind)
    assert torch.equal(contract.logits(session.tuned, kind), logits)
    kept: Any = session.states["kept"]
    start = {name: p.clone() for name, p in session.states["method"].named_parameters()}
    contract.finish(session)
    now = kept[0].state_dict()
    assert now.keys() == left.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, left[name]), name
    assert not any(p.requires_grad for p in kept.parameters())
    for name, parameter in session.states["method"].named_parameters():
        assert not torch.equal(parameter, start[name]), name
    with base(session.states["method"]):  # the second phase is taken away, the first is still there
        found = contract.logits(session.tuned, kind)
    if kind == "llama":  # no head has moved since
        assert torch.equal(found, logits)


def test_the_output_is_that_of_adapters_on_a_model_with_the_low_rank_change_in_its_weights() -> None:
    session = contract.finish(contract.begin(method(), "gpt2"))
    expected = contract.logits(session.tuned, "gpt2")
    plain = contract.tiny("gpt2")
    for name, layer in patched(session.model).items():
        plain.get_submodule(name).weight.data.copy_(layer.weight.T)
    state = Adapter(rank=4).build(plain)
    kept: Any = session.states["kept"]
    state.load_state_dict(copy.deepcopy(kept[0].state_dict()))
    torch.testing.assert_close(contract.logits(plain, "gpt2"), expected, atol=1e-5, rtol=1e-4)


def test_both_phases_are_counted() -> None:
    session, _, _ = between()
    alone = []
    for each in (Adapter(rank=4), LoRA(rank=2)):
        state = contract.begin(each).states["method"]
        alone.append(sum(p.numel() for p in state.parameters()))
    setup: Any = SimpleNamespace(session=session, total=1)
    head = sum(p.numel() for p in session.states["head"].parameters())
    assert count_parameters(setup)["trained"] == sum(alone) + head


def test_it_cannot_be_merged_and_comes_off_to_the_bit() -> None:
    session = contract.finish(contract.begin(method()))
    before = contract.logits(session.tuned)
    with pytest.raises(NotMergeable, match="the method attaches a bottleneck adapter, which no weight"):
        merge(session.model, session.states)
    assert torch.equal(contract.logits(session.tuned), before)
    detach(session.model, session.states)
    contract.same_values(session.model, contract.tiny())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in session.model.modules())
    assert not any(isinstance(module, nn.ModuleDict) for module in session.model.modules())


def test_no_format_holds_both_phases() -> None:
    session = contract.begin(method())
    session.enter(1)
    setup: Any = SimpleNamespace(session=session, config=SimpleNamespace(method=method()))
    for train_norms in (True, False):
        if not train_norms:
            kept: Any = session.states["kept"]
            del kept[0]["norms"]
        with pytest.raises(
            ConfigError, match=r"method=adapter_lora: peft has no such format: it trains"
        ) as e:
            export._as_peft(setup, Path("run"))
        assert ("parameters in place" if train_norms else "a bottleneck adapter") in str(e.value)
        assert "It cannot be merged either" in str(e.value)
    with pytest.raises(ConfigError, match="it stores a bottleneck adapter and a low-rank change"):
        compose.sparse_changes(setup)


@pytest.mark.parametrize(("share", "steps", "faulty"), [(0.25, 4, False), (0.25, 1, True), (0.9, 4, True)])
def test_a_share_that_leaves_a_phase_without_steps_is_refused(share: float, steps: int, faulty: bool) -> None:
    found = AdapterLoRA(share=share).faults(steps)
    assert bool(found) == faulty
    if faulty:
        assert f"method.share={share:g} of the run's {steps} steps leaves no step" in found[0]


def test_a_fault_of_the_second_phase_is_found_before_the_first_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digits, "SIZES", {"train": 16, "val": 16, "test": 16})
    words = ["method=adapter_lora", "method.bottleneck=2", "train.threads=1"]
    setup = prepare(load(words))
    state: Any = setup.session.states["method"]
    assert setup.session.phase == 0
    assert list(state) == ["adapters", "norms"]
    with pytest.raises(ConfigError, match=r"'nothing' matches no linear layer"):
        prepare(load([*words, "method.targets=[nothing]"]))
    setup.session.enter(1)  # a budget counts both phases
    assert size.measure(setup.config).trained == count_parameters(setup)["trained"]
