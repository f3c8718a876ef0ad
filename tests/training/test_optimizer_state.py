"""Check that the optimizer's state is known by the names of its parameters: their order may change.

The reference is always the uninterrupted session. Checkpoints of other orders are made here by rewriting the
files of a checkpoint, with no code of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.core.method import Method
from finetune.core.optimizer import Optimizer
from finetune.errors import ConfigError, RunFailed
from finetune.methods.baseline.full import Full
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.sparse import Crossing
from finetune.optim.adamw import AdamW
from finetune.optim.sm3 import SM3
from finetune.schedules.drop_grow import DropGrow
from finetune.storage import checkpoint, manifest
from finetune.system import random_state
from finetune.testing import contract
from finetune.training import session as session_module
from finetune.training.session import Session

AT = 3
METHODS: dict[str, Callable[[], Method]] = {
    "full": Full,
    "sparse": lambda: Crossing(sparsity=0.9, schedule=DropGrow(every=2)),  # entries move in both halves
    "two phases": lambda: LTSFT(sparsity=0.9),
}
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(lr=1e-2, weight_decay=0.3),  # the groups differ by their weight decay
    "sm3": SM3(lr=1e-2, weight_decay=0.3),
}
Files = tuple[dict[str, Any], dict[str, Tensor]]  # of a checkpoint: state.json, state.safetensors
both = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def begin(method: str, optimizer: str) -> Session:
    return contract.begin(METHODS[method](), optimizer=OPTIMIZERS[optimizer])


def train_and_save(folder: Path, method: str, optimizer: str) -> Session:
    """Train to the end; the checkpoint of step ``AT`` stays in ``folder``."""
    whole = begin(method, optimizer)
    for step in whole.steps():
        if step.number == AT:
            checkpoint.save(folder, whole, {})
    return whole


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Files]) -> None:
    """Change the content of a checkpoint and seal it again."""
    file, tensors = folder / "state.json", folder / "state.safetensors"
    content, stored = change(json.loads(file.read_text()), load_file(tensors))
    file.write_text(json.dumps(content))
    save_file(stored, tensors)
    manifest.write(folder)


def resume(folder: Path, method: str, optimizer: str) -> Session:
    session = begin(method, optimizer)
    random_state.seed(7)  # a new process starts with other random states
    checkpoint.load(folder, session)
    return contract.finish(session)


def unnamed(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    """Remove the names, as in the first checkpoints."""
    del content["parameters"]
    return content, tensors


def renumbered(order: list[int], content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    """Number the parameters anew: parameter ``order[i]`` becomes parameter i."""
    places = {old: new for new, old in enumerate(order)}
    for group in content["groups"]:
        group["params"] = sorted(places[old] for old in group["params"])
    content["parameters"] = [content["parameters"][old] for old in order]
    moved = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            old, _, key = rest.partition("/")
            name = f"optimizer/{places[int(old)]}/{key}"
        moved[name] = tensor
    return content, moved


def groups_reversed(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["groups"].reverse()
    order = []
    for group in content["groups"]:
        order += reversed(group["params"])
    return renumbered(order, content, tensors)


def one_group_each(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    groups = []
    for group in content["groups"]:
        for place in group["params"]:
            groups.append({**group, "params": [place]})
    return {**content, "groups": groups}, tensors


@both
def test_a_checkpoint_names_what_it_stores(tmp_path: Path, optimizer: str) -> None:
    session = train_and_save(tmp_path / "state", "sparse", optimizer)
    content = json.loads((tmp_path / "state" / "state.json").read_text())
    tensors = load_file(tmp_path / "state" / "state.safetensors")
    trained = {name for name, p in session.states.named_parameters() if p.requires_grad}
    assert set(content["parameters"]) == trained
    assert sorted(content["parameters"]) == sorted(trained)
    for i, name in enumerate(content["parameters"]):
        keys = {key.split("/")[2] for key in tensors if key.startswith(f"optimizer/{i}/")}
        if optimizer == "adamw":
            assert keys == {"step", "exp_avg", "exp_avg_sq"}
            assert tensors[f"optimizer/{i}/exp_avg"].shape == tensors[f"states/{name}"].shape
        else:
            sites = len(session.states["method"]["bank"].sizes)
            assert len(keys) == (2 * sites if "bank" in name else tensors[f"states/{name}"].ndim)


@both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change", [unnamed, groups_reversed, one_group_each], ids=lambda change: change.__name__
)
def test_a_checkpoint_of_another_order_resumes_to_the_same_bits(
    tmp_path: Path, optimizer: str, method: str, change: Callable[..., Files]
) -> None:
    whole = train_and_save(tmp_path / "state", method, optimizer)
    rewrite(tmp_path / "state", change)
    resumed = resume(tmp_path / "state", method, optimizer)
    contract.same_values(resumed.states, whole.states)
    left, right = resumed.state_dict()["optimizer"]["state"], whole.state_dict()["optimizer"]["state"]
    assert left.keys() == right.keys()
    for name, entry in left.items():
        assert entry.keys() == right[name].keys()
        for key, tensor in entry.items():
            assert torch.equal(tensor, right[name][key]), (name, key)


@both
def test_a_version_with_other_parameter_groups_resumes_to_the_same_bits(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that this version would put into another group keeps the weight decay that it had."""
    whole = train_and_save(tmp_path / "state", "full", optimizer)
    real = session_module.make_optimizer

    def make_other(states: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
        groups = []
        for group in reversed(real(states, settings).param_groups):
            for parameter in reversed(group["params"]):
                groups.append({"params": [parameter], "weight_decay": 0.9})
        return settings.make(groups, states)

    monkeypatch.setattr(session_module, "make_optimizer", make_other)
    contract.same_values(resume(tmp_path / "state", "full", optimizer).states, whole.states)


class CountingSGD(torch.optim.Optimizer):
    """Gradient descent whose state is plain Python, as in some third-party optimizers.

    Later steps are smaller.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                state["share"], state["buffer"] = 1 / state["steps"], None
                parameter.sub_(parameter.grad, alpha=group["lr"] * state["share"])


@dataclass(frozen=True)
class Counting(Optimizer):
    name = "counting"

    def make(self, groups: list[dict[str, Any]], states: nn.Module) -> torch.optim.Optimizer:
        return CountingSGD(groups, {"lr": self.lr})


def test_numbers_in_the_state_of_an_optimizer_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "counting", Counting(lr=1e-2))
    whole = train_and_save(tmp_path / "state", "full", "counting")
    content = json.loads((tmp_path / "state" / "state.json").read_text())
    assert content["numbers"]["0"] == {"steps": AT, "share": 1 / AT, "buffer": None}
    resumed = resume(tmp_path / "state", "full", "counting")
    contract.same_values(resumed.states, whole.states)
    assert resumed.state_dict()["optimizer"] == whole.state_dict()["optimizer"]


@pytest.mark.parametrize("value", [[1, 2], "text", float("nan")])
def test_what_no_checkpoint_can_hold_is_one_clear_error(tmp_path: Path, value: Any) -> None:
    session = contract.begin(Full(), optimizer=Counting(lr=1e-2))
    next(session.steps())
    next(iter(session.optimizer.state.values()))["history"] = value
    with pytest.raises(RunFailed, match=r"keeps history=.* which a checkpoint cannot hold"):
        checkpoint.save(tmp_path / "state", session, {})
    assert not (tmp_path / "state").exists()


def a_number_of_another_parameter(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return {**content, "numbers": {"99": {"steps": 3}}}, tensors


def a_number_of_another_type(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return {**content, "numbers": {"0": {"steps": [3]}}}, tensors


def a_number_for_a_tensor(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return {**content, "numbers": {"0": {"exp_avg": 3}}}, tensors


def without_last(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["parameters"].pop()
    return content, tensors


def of_another_name(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["parameters"][0] = "../../elsewhere"
    return content, tensors


def named_twice(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["parameters"][0] = content["parameters"][1]
    return content, tensors


def one_more(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    count = len(content["parameters"])
    content["parameters"].append("another")
    content["groups"][0]["params"].append(count)
    return content, tensors


def one_less(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    last = len(content["parameters"]) - 1
    content["parameters"].pop()
    content["groups"][-1]["params"].remove(last)
    return content, {name: t for name, t in tensors.items() if not name.startswith(f"optimizer/{last}/")}


def beyond_the_groups(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return content, {**tensors, "optimizer/99/exp_avg": torch.zeros(2)}


def numbered_by_words(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return content, {**tensors, "optimizer/first/exp_avg": torch.zeros(2)}


def names_of_numbers(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    return {**content, "parameters": list(range(len(content["parameters"])))}, tensors


def groups_of_words(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["groups"][0]["params"] = ["0"]
    return content, tensors


def the_same_number_twice(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["groups"][0]["params"][0] = content["groups"][1]["params"][0]
    return content, tensors


def one_group_less(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    """Join the groups of a checkpoint without names, so that they do not fit."""
    del content["parameters"]
    first, second = content["groups"]
    return {**content, "groups": [{**first, "params": first["params"] + second["params"]}]}, tensors


def settings_of_words(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["groups"][0]["betas"] = ["a", "b"]
    return content, tensors


def a_flag_for_a_rate(content: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    content["groups"][0]["lr"] = True
    return content, tensors


HOSTILE = {
    settings_of_words: r"the optimizer's betas is \"\['a', 'b'\]\"",
    a_flag_for_a_rate: "the optimizer's lr is 'True'",
    without_last: "there are 39 names for the optimizer's 40 parameters",
    of_another_name: r"2 of the optimizer's parameters differ \(first: ../../elsewhere\)",
    named_twice: "names for the optimizer's",
    one_more: r"1 of the optimizer's parameters differ \(first: another\)",
    one_less: "1 of the optimizer's parameters differ",
    beyond_the_groups: "the optimizer's groups have no parameter 99",
    numbered_by_words: "invalid literal for int",
    names_of_numbers: r"parameters\[0\] should be a str and is 0",
    groups_of_words: r"groups\[0\].params\[0\] should be a int",
    the_same_number_twice: "the optimizer's groups do not number their parameters from 0",
    a_number_of_another_parameter: "the optimizer's groups have no parameter 99",
    a_number_of_another_type: r"numbers.0.steps should be a .* and is \[3\]",
    a_number_for_a_tensor: "the optimizer's exp_avg is there twice, as a tensor and as a number",
    one_group_less: "different number of parameter groups",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_wrong_names_and_numbers_are_one_clear_error(tmp_path: Path, change: Callable[..., Files]) -> None:
    session = contract.begin(Full(), train=replace(contract.TRAIN, steps=1))
    contract.finish(session)
    checkpoint.save(tmp_path / "state", session, {})
    rewrite(tmp_path / "state", change)
    new = contract.begin(Full(), train=replace(contract.TRAIN, steps=1))
    with pytest.raises(ConfigError, match=HOSTILE[change]) as raised:
        checkpoint.load(tmp_path / "state", new)
    (fault,) = raised.value.faults
    assert "is not a state of this method and model" in fault or "state.json cannot be read" in fault
    assert fault.endswith("Resume from another checkpoint, or train again.")
