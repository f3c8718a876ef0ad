"""Every method has the published defaults, which its test file lists as ``PUBLISHED``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from finetune import registry
from finetune.core.method import Method
from finetune.testing.cases import find_published

PUBLISHED = find_published(Path(__file__).parent)
# Faults that no test of the methods themselves found.
PLANTED = {
    "lift": {"schedule": registry.get("schedule", "redraw")(every=5000), "decay": "base"},
    "spt": {"alpha": 1.0},
    "sara": {"penalty": 5e-4},
    "lora": {"alpha": 1.0},
}


def defaults(method: str) -> dict[str, Any]:
    """Return the default of each field of a method."""
    made = registry.get("method", method)()
    return {each.name: getattr(made, each.name) for each in fields(made)}


def differing(method: str, found: dict[str, Any]) -> list[str]:
    """Name the fields that do not have the default that they must have."""
    expected = PUBLISHED[method].expected()
    return [name for name, value in expected.items() if found[name] != value]


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_defaults_are_those_that_were_published(method: str) -> None:
    assert differing(method, defaults(method)) == []


def test_every_method_with_a_paper_and_a_setting_has_its_defaults_listed() -> None:
    expected = set()
    for name in registry.catalog("method"):
        cls = registry.get("method", name)
        if cls.paper and len(fields(cls)) > len(fields(Method)):
            expected.add(name)
    assert set(PUBLISHED) == expected


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_departure_differs_from_what_was_published_and_gives_a_reason(method: str) -> None:
    published = PUBLISHED[method]
    for name, (default, reason) in published.departures.items():
        assert default != published.values[name], name
        assert reason, name


@pytest.mark.parametrize("method", PLANTED)
def test_a_planted_fault_is_found(method: str) -> None:
    for name, value in PLANTED[method].items():
        assert differing(method, {**defaults(method), name: value}) == [name]
