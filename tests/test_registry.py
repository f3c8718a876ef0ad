"""The table of kinds, and the classes that are registered."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from finetune import registry
from finetune.config import classes, grammar, later, load

WITH_CLASSES = [name for name, kind in registry.KINDS.items() if kind.folders]


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_every_registered_class_is_of_its_kind(name: str) -> None:
    """What the source says agrees with what is imported."""
    kind = registry.KINDS[name]
    module, _, base_name = kind.base.rpartition(".")
    base = getattr(importlib.import_module(module), base_name)
    assert name == base.KIND
    entries = registry.catalog(name)
    assert entries
    for entry in entries.values():
        cls = registry.get(name, entry.name)
        assert issubclass(cls, base)
        assert (cls.KIND, cls.name) == (name, entry.name)
        assert entry.doc
        for fact, value in entry.facts.items():
            assert fact == "class" or getattr(cls, fact) == value


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_every_registered_class_is_named_in_a_test(name: str) -> None:
    """By its class or, as in a configuration, by its name."""
    texts = [
        file.read_text(encoding="utf-8")
        for file in Path(__file__).parent.rglob("test_*.py")
        if file != Path(__file__)
    ]
    words = set(re.findall(r"\w+", " ".join(texts)))
    unnamed = [e.name for e in registry.catalog(name).values() if not {e.name, e.facts["class"]} & words]
    assert not unnamed


def test_the_table_is_the_only_one() -> None:
    """A row decides what a configuration, a sweep and Hydra's groups know of a kind."""
    assert {"method", "dataset", "optimizer", "selector"} <= set(classes.CHOSEN)
    assert grammar.PLACED["schedule"] == "method.schedule"
    assert registry.choices()["schedule"] == "method.schedule.name"
    assert {"model": "model.name", "selector": "selector.name"}.items() <= registry.choices().items()
    assert "score" not in registry.choices()
    assert {"sweep", "launcher"} <= set(registry.outside_runs())
    folders = {path.name for path in load.conf_dir().iterdir() if path.is_dir()}
    groups = {kind.name for kind in registry.KINDS.values() if not kind.is_value}
    assert folders - groups == {"train", "logger"}  # sections that hold no kind of thing


@pytest.mark.parametrize("kind", [kind for kind in registry.KINDS.values() if kind.absent])
def test_settings_of_the_class_that_an_absent_section_means_came_later_too(kind: registry.Kind) -> None:
    """Otherwise a configuration from before the kind came would change its hash."""
    assert kind.absent
    for field in fields(registry.get(kind.name, kind.absent)):
        assert later.LATER[f"{kind.place}[{kind.absent}].{field.name}"] == field.default


def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        'from finetune.core.method import Method\n\n@register("one")\n'
        'class {}(Method):\n    """A method."""\n'
    )
    (tmp_path / "methods/family").mkdir(parents=True)
    (tmp_path / "methods/a.py").write_text(text.format("A"))
    (tmp_path / "methods/family/b.py").write_text(text.format("B"))
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    registry.clear()
    try:
        with pytest.raises(
            ValueError, match=r"method 'one' is registered in .*\.methods\.a and in .*family\.b"
        ):
            registry.catalog("method")
    finally:
        monkeypatch.undo()
        registry.clear()
