"""Test that every registered method has cases in its own test file, and that the file tests the contract."""

from __future__ import annotations

from pathlib import Path

from finetune import registry
from finetune.testing.cases import find_cases

FOLDER = Path(__file__).parent
CASES = find_cases(FOLDER)


def test_every_registered_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(registry.catalog("method"))


def test_every_case_has_a_name_of_its_own_that_begins_with_its_method() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.name.split()[0] == case.method


def test_every_file_with_cases_tests_the_contract() -> None:
    for path in FOLDER.glob("*/test_*.py"):
        text = path.read_text(encoding="utf-8")
        assert ("\nCASES = [" in text) == ("\ntest_contract = contract_test(CASES)\n" in text), path.name
