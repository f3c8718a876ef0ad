"""For all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage() -> None:
    """Every session ends with a full collection, which would look through all of torch and transformers each time."""
    from finetune.testing import contract

    contract.tiny()  # imports them
    gc.freeze()
