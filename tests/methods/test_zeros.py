"""Every method keeps the zeros of a pruned model to the bit, or is refused in words before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.testing import contract
from finetune.testing.cases import Case, find_cases
from finetune.testing.sessions import Kind, begin, tiny_pruned

CASES = find_cases(Path(__file__).parent)
# Methods that have not been shown to keep zeros.
REFUSED = {"peft", "s2ft", "spt"}
BY_NAME = {case.name: case for case in CASES}
QUICK = ("lora", "shira", "spiel")  # tests/core/test_zeros.py has others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(c, k, id=f"{c.name}-{k}") for c in CASES for k in c.kinds]
)
def test_zeros_stay(case: Case, kind: Kind) -> None:
    contract.check_zeros(contract.Trial(case.make, kind, optimizer=case.optimizer))


@pytest.mark.parametrize("name", QUICK)
def test_zeros_stay_with_one_method_of_each_sort(name: str) -> None:
    case = BY_NAME[name]
    contract.check_zeros(contract.Trial(case.make, "llama", optimizer=case.optimizer))


@pytest.mark.slow
def test_only_these_methods_are_refused() -> None:
    accepted, cures = set(), dict[str, bool]()
    for case in CASES:
        try:
            begin(case.make(), case.kinds[0], model=tiny_pruned(case.kinds[0]), optimizer=case.optimizer)
        except ConfigError as error:
            cures[case.name] = "model.zeros=free" in str(error)
        else:
            accepted.add(case.method)
    assert {case.method for case in CASES} - accepted == REFUSED
    assert all(cures.values())
