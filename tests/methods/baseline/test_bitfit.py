"""Test BitFit."""

from __future__ import annotations

import pytest

from finetune.errors import ConfigError
from finetune.methods.baseline.bitfit import BitFit
from finetune.testing import contract
from finetune.testing.cases import Case, contract_test

CASES = [Case("bitfit", BitFit, ("vit", "gpt2"), selectable=False, budget=7_936)]

test_contract = contract_test(CASES)


def test_trains_every_bias_and_nothing_else() -> None:
    session = contract.begin(BitFit())
    trained = {n for n, p in session.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in contract.tiny().named_parameters() if n.endswith(".bias")} | {
        "classifier.weight"
    }


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no bias terms"):
        contract.begin(BitFit(), "llama")
