"""Test the linear probe."""

from __future__ import annotations

import pytest

from finetune.errors import ConfigError
from finetune.methods.baseline.head import Head
from finetune.testing import contract
from finetune.testing.cases import Case, contract_test

CASES = [Case("head", Head, selectable=False, budget=0)]

test_contract = contract_test(CASES)


def test_trains_the_head_and_nothing_else() -> None:
    session = contract.begin(Head())
    assert {n for n, p in session.model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert sum(p.numel() for p in session.states.parameters()) == 3 * 32 + 3


def test_a_language_model_has_no_head_to_train() -> None:
    with pytest.raises(ConfigError, match="method=head has nothing to train"):
        contract.begin(Head(), "llama")
