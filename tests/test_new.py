"""scripts/new.py: the skeleton of every kind works as it stands, and writing it changes no other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.registry import KINDS
from finetune.testing import new

from .support.checkout import Checkout

# No name is one that a user who follows the documentation gives.
NAMES = {kind: f"try_{kind}" for kind in new.kinds_with_skeletons()}
SCORED = ["method=sparse", f"method.score={NAMES['score']}"]
# One option of each kind that goes with these two.
WITH_OPTIONS = [
    f"{kind}={name}"
    for kind, name in NAMES.items()
    if KINDS[kind].place and not KINDS[kind].is_value and kind not in ("method", "model", "dataset")
]


def files_of(kind: str) -> list[str]:
    """Return the files that a skeleton of ``kind`` should write into a checkout."""
    name, folder = NAMES[kind], "".join(KINDS[kind].folders[:1])
    if kind == "method":
        folder += "/reparam"
    places = {
        "py": f"finetune/{folder}/{name}.py",
        "test": f"tests/{folder}/test_{name}.py",
        "yaml": f"conf/{kind}/{name}.yaml",
    }
    return [places[part.name.split(".")[1]] for part in new.SKELETONS.glob(f"{kind}.*.txt")]


def test_every_kind_with_classes_or_a_section_has_a_skeleton() -> None:
    assert set(NAMES) == {kind.name for kind in KINDS.values() if kind.folders or kind.place}


def test_a_class_of_a_kind_is_a_module_a_yaml_file_and_a_test() -> None:
    """A score is a value of a method's settings, a structure one of a model folder; a model is a file."""
    for kind in NAMES:
        expected = {"score": {".py"}, "structure": {".py"}, "model": {".yaml"}}.get(kind, {".py", ".yaml"})
        files = new.files_of(KINDS[kind], NAMES[kind], "reparam", None)
        assert {file.suffix for file in files} == expected, kind
        assert len(files) == {"score": 2, "structure": 2, "model": 1}.get(kind, 3), kind


@pytest.mark.slow
def test_a_skeleton_of_every_kind_in_a_checkout(tmp_path: Path) -> None:
    """Their own tests pass, and so do those that look at every registered thing; git shows nothing else."""
    checkout = Checkout(tmp_path)
    run, python = checkout.run, checkout.python
    (tmp_path / ".gitignore").write_text(
        "__pycache__/\n.pytest_cache/\n.hypothesis/\n.mypy_cache/\n.ruff_cache/\n"
    )
    run("git", "init", "-q")
    run("git", "add", ".")
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "copy")
    for kind, name in NAMES.items():
        python("scripts/new.py", kind, name)
    changed = run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    files = sorted(file for kind in NAMES for file in files_of(kind))
    assert changed == [f"?? {file}" for file in files]
    assert "finetune/methods/reparam/try_method.py" in files
    python("-m", "ruff", "check", ".")
    python("-m", "ruff", "format", "--check", ".")
    python("-m", "mypy", "finetune")
    own = [file for file in files if file.startswith("tests/")]
    about_all = [
        "tests/test_registry.py",
        "tests/test_imports.py",
        "tests/config/test_load.py",
        "tests/test_pages.py",
    ]
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *about_all)
    shown = python("-m", "finetune", "show", *SCORED, *WITH_OPTIONS)
    assert 'method.score: "try_score"' in shown
    assert run("git", "status", "--porcelain", "--untracked-files=all").splitlines() == changed


def test_skeletons_of_a_plug_in(tmp_path: Path) -> None:
    """The files are there, and the code is compiled; tests/test_wheel.py runs them."""
    for kind, name in NAMES.items():
        for file in new.write(kind, name, "reparam", tmp_path / kind):
            text = file.read_text(encoding="utf-8")
            assert "$" not in text
            assert max(map(len, text.splitlines())) <= 110
            if file.suffix == ".py":
                compile(text, file, "exec")
    assert (tmp_path / "model/conf/model/try_model.yaml").is_file()


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("methd", "a", r"methd has no skeleton\. Did you mean 'method'\? There is: method, "),
        ("sweep", "a", "sweep has no skeleton"),
        ("method", "Row", "'Row' is not a name: use lower-case letters"),
        ("method", "row-scale", "'row-scale' is not a name"),
        ("method", "lora", r"method=lora is there already, in finetune\.methods\.reparam\.lora"),
    ],
)
def test_what_is_refused(kind: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        new.write(kind, name, "reparam", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_try_method.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"test_try_method.py exists\. Take another name"):
        new.write("method", "try_method", "reparam", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["test_try_method.py"]
