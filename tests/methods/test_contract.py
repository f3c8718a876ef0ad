"""Every method against the contract, on the architectures that it can act on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune import registry
from finetune.core.method import Method
from finetune.methods.baseline.bitfit import BitFit
from finetune.methods.baseline.full import Full
from finetune.methods.baseline.head import Head
from finetune.methods.reparam.amt import AMT
from finetune.methods.reparam.lora import LoRA
from finetune.methods.reparam.peft import Peft
from finetune.methods.reparam.snell import SNELL
from finetune.methods.reparam.snella import SNELLA
from finetune.methods.sparse.hft import HFT
from finetune.methods.sparse.id3 import ID3
from finetune.methods.sparse.lift import LIFT
from finetune.methods.sparse.lt_sft import LTSFT
from finetune.methods.sparse.off_principal import OffPrincipal
from finetune.methods.sparse.s2ft import S2FT
from finetune.methods.sparse.sara import SaRA
from finetune.methods.sparse.shira import SHiRA
from finetune.methods.sparse.sparse import Crossing
from finetune.methods.sparse.spiel import SpIEL
from finetune.methods.sparse.spt import SPT
from finetune.methods.sparse.super_tuning import SuperTuning
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.redraw import Redraw
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
    "super_tuning": lambda: SuperTuning(sparsity=0.9),
    "super_tuning branch": lambda: SuperTuning(sparsity=0.9, branch=2),
    "lift": lambda: LIFT(sparsity=0.9, rank=4, schedule=Redraw(every=2)),
    "off_principal": lambda: OffPrincipal(rank=4),
    "id3": lambda: ID3(sparsity=0.9),
    "lt_sft": lambda: LTSFT(sparsity=0.9, l1=0.1),
    "sparse": lambda: Crossing(
        sparsity=0.9, score="snip", scope="role", grain="row", schedule=DropGrow(every=2)
    ),
    "spiel": lambda: SpIEL(sparsity=0.9, schedule=DropGrow(every=3), window=2),
    "sara": lambda: SaRA(sparsity=0.9),
    "s2ft": lambda: S2FT(d=0.1, u=0.1),
    "spt": lambda: SPT(sparsity=0.9, rank=4, alpha=4.0, batches=2),
    "snella": lambda: SNELLA(rank=8, every=2),
    "snella plain": lambda: SNELLA(rank=8, softmax=False, sparsity=0.5, dropout=0.1, drop_path=0.1),
    "amt": AMT,
    "amt plain": lambda: AMT(gdr=0.0),
    "hft": HFT,
    "hft rounds": lambda: HFT(rounds=3),
    "hft block norms": lambda: HFT(scope="block", norms=True),
    "peft lora": lambda: Peft(config={"r": 4}),
}
LANGUAGE = (
    "full",
    "bitfit",
    "lora",
    "snell",
    "snell dropout",
    "shira",
    "super_tuning branch",
    "lift",
    "id3",
    "lt_sft",
    "sparse",
    "hft rounds",
    "spiel",
    "sara",
    "spt",
    "snella",
    "amt",
)
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
