"""peft's tuners inside our loop."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import ConfigError
from finetune.methods.lora import LoRA
from finetune.methods.peft import Peft
from finetune.testing import contract


def test_their_lora_trains_as_ours_does() -> None:
    """Same layers, same scale, same start: the same output after training."""
    ours = contract.begin(LoRA(rank=4, alpha=8))
    theirs = contract.begin(Peft(config={"r": 4, "lora_alpha": 8}))
    values = theirs.states["method"].state_dict()
    for key, delta in ours.states["method"].items():
        delta.a.data.copy_(values[f"{key}/lora_A/default/weight"])
    contract.finish(ours)
    contract.finish(theirs)
    torch.testing.assert_close(contract.logits(ours.tuned), contract.logits(theirs.tuned), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch, at the sparse tensors of peft's SHiRA
@pytest.mark.parametrize(("type_", "config"), [("VERA", {"r": 4}), ("SHIRA", {"r": 2}), ("OFT", {"oft_block_size": 4})])
def test_other_tuners_keep_the_contract(type_: str, config: dict[str, object]) -> None:
    for check in (contract.check_base_untouched, contract.check_merge, contract.check_stored):
        check(lambda: Peft(type=type_, config=dict(config)))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Peft(type="LORAA"), "Did you mean 'LORA'"),
        (Peft(type="PREFIX_TUNING"), "no tuner of the installed peft for layers"),
        (Peft(config={"rnak": 4}), "method.config.rnak is no option of peft's LoraConfig"),
        (Peft(config={"target_modules": ["nothing"]}), "peft's LORA refuses"),
    ],
)
def test_faults_are_named(method: Peft, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        contract.begin(method)
