"""Every method against the contract, on the architectures that it can act on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune import registry
from finetune.core.method import Method
from finetune.methods.bitfit import BitFit
from finetune.methods.full import Full
from finetune.methods.head import Head
from finetune.methods.lora import LoRA
from finetune.methods.peft import Peft
from finetune.methods.shira import SHiRA
from finetune.methods.snell import SNELL
from finetune.testing import contract

CASES: dict[str, Callable[[], Method]] = {
    "full": Full,
    "head": Head,
    "bitfit": BitFit,
    "lora": lambda: LoRA(rank=4),
    "lora dropout": lambda: LoRA(rank=4, dropout=0.2, targets=("q", "v", "mlp")),
    "snell": lambda: SNELL(rank=8, sparsity=0.9),
    "snell dense": lambda: SNELL(rank=8, sparsity=0.0),
    "snell paper": lambda: SNELL(rank=8, sparsity=0.5, sparsifier="paper"),
    "snell dropout": lambda: SNELL(rank=8, sparsity=0.5, dropout=0.1, drop_path=0.1),
    "shira": lambda: SHiRA(sparsity=0.9),
    "peft lora": lambda: Peft(config={"r": 4}),
}
LANGUAGE = ("full", "bitfit", "lora", "snell", "snell dropout", "shira")
CHECKS = dict(contract.checks())


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_contract_on_vit(case: str, check: str) -> None:
    CHECKS[check](CASES[case])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", LANGUAGE)
def test_contract_on_gpt2(case: str, check: str) -> None:
    CHECKS[check](CASES[case], "gpt2")


@pytest.mark.parametrize("case", ["lora", "snell", "shira"])
def test_llama_merges_and_resumes(case: str) -> None:
    contract.check_merge(CASES[case], "llama")
    contract.check_resume(CASES[case], "llama")


def test_every_method_is_a_case() -> None:
    assert {make().name for make in CASES.values()} == set(registry.catalog("method"))
