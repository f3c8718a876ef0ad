"""Test peft's tuners under this project's loop."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import ConfigError
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import AdaLoraRanks, Peft
from finetune.testing import contract
from finetune.testing.cases import Case, Published, contract_test

CASES = [
    Case(
        "peft lora",
        lambda: Peft(config={"r": 4}),
        selectable=False,
        settings=("method.config.lora_dropout=0.2",),
    )
]

PUBLISHED = Published("huggingface/peft: its own defaults, since no setting is passed on", {"config": {}})

test_contract = contract_test(CASES)


def test_their_lora_trains_as_ours_does() -> None:
    """Both have the same layers, scale and start, and end with the same output."""
    ours = contract.begin(LoRA(rank=4, alpha=8))
    theirs = contract.begin(Peft(config={"r": 4, "lora_alpha": 8}))
    values = theirs.states["method"].state_dict()
    for key, delta in ours.states["method"].items():
        delta.a.data.copy_(values[f"{key}/lora_A/default/weight"])
    contract.finish(ours)
    contract.finish(theirs)
    torch.testing.assert_close(
        contract.logits(ours.tuned), contract.logits(theirs.tuned), atol=1e-4, rtol=1e-3
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch, at the sparse tensors of peft's SHiRA
@pytest.mark.parametrize(
    ("type_", "config"), [("VERA", {"r": 4}), ("SHIRA", {"r": 2}), ("OFT", {"oft_block_size": 4})]
)
def test_other_tuners_keep_the_contract(type_: str, config: dict[str, object]) -> None:
    trial = contract.Trial(lambda: Peft(type=type_, config=dict(config)))
    for check in (contract.check_stored, contract.check_merge, contract.check_base_untouched):
        check(trial)


ADALORA = {"total_step": contract.STEPS, "tinit": 1, "tfinal": 3, "deltaT": 1, "init_r": 4, "target_r": 2}


def test_adalora_resumes_with_its_averages() -> None:
    """The run stops before, while and after ranks are removed; peft keeps its averages outside the model."""
    make = lambda: Peft(type="ADALORA", config=dict(ADALORA))  # noqa: E731
    trial = contract.Trial(make)
    for check in (contract.check_resume, contract.check_stored, contract.check_base_untouched):
        check(trial)
    parts = contract.finish(contract.begin(make())).states["method"]
    left = [int(buffer.sum()) for name, buffer in parts.ranks.named_buffers() if name.startswith("kept/")]
    assert sum(left) == 2 * len(left)
    values = {name.split("/lora_")[0]: value for name, value in parts.named_parameters() if "lora_E" in name}
    assert [int((value != 0).sum()) for value in values.values()] == left


@pytest.mark.slow
def test_adalora_trains_as_with_peft_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat the run with peft's own dictionaries only."""
    ours = contract.finish(contract.begin(Peft(type="ADALORA", config=dict(ADALORA))))
    monkeypatch.setattr(
        AdaLoraRanks, "after_step", lambda self, step: self._tuner[0].update_and_allocate(step)
    )
    theirs = contract.finish(contract.begin(Peft(type="ADALORA", config=dict(ADALORA))))
    assert torch.equal(contract.logits(ours.tuned), contract.logits(theirs.tuned))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Peft(type="LORAA"), "Did you mean 'LORA'"),
        (Peft(type="POLY"), "not a tuner for layers in the installed peft"),
        (Peft(type="PREFIX_TUNING"), "not a tuner for layers in the installed peft"),
        (Peft(config={"rnak": 4}), "method.config.rnak is not an option of peft's LoraConfig"),
        (Peft(config={"target_modules": ["nothing"]}), "peft's LORA refuses"),
    ],
)
def test_faults_are_named(method: Peft, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        contract.begin(method)
