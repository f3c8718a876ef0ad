"""scripts/new.py: the skeleton of every kind works as it stands, and writing it changes no other file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.registry import KINDS
from finetune.testing import new

ROOT = Path(__file__).parents[1]
COPIED = ("finetune", "conf", "scripts", "tests", "docs", "pyproject.toml", "README.md", "Makefile")
NAMES = {
    "method": "row_scale",
    "score": "square",
    "schedule": "rounds",
    "optimizer": "descent",
    "selector": "everything",
    "dataset": "greys",
    "model": "mine",
}
FILES = {
    "method": [
        "conf/method/row_scale.yaml",
        "finetune/methods/reparam/row_scale.py",
        "tests/methods/reparam/test_row_scale.py",
    ],
    "score": ["finetune/scores/square.py", "tests/scores/test_square.py"],
    "schedule": [
        "conf/schedule/rounds.yaml",
        "finetune/schedules/rounds.py",
        "tests/schedules/test_rounds.py",
    ],
    "optimizer": ["conf/optimizer/descent.yaml", "finetune/optim/descent.py", "tests/optim/test_descent.py"],
    "selector": [
        "conf/selector/everything.yaml",
        "finetune/selectors/everything.py",
        "tests/selectors/test_everything.py",
    ],
    "dataset": ["conf/dataset/greys.yaml", "finetune/data/greys.py", "tests/data/test_greys.py"],
    "model": ["conf/model/mine.yaml"],
}


def test_every_kind_of_a_run_has_a_skeleton() -> None:
    assert set(NAMES) == {kind.name for kind in KINDS.values() if kind.place}


@pytest.mark.slow
def test_a_skeleton_of_every_kind_in_a_checkout(tmp_path: Path) -> None:
    """Their own tests pass, and so do those that look at every registered thing; git shows nothing else."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(*words: str) -> str:
        return run(sys.executable, *words)

    (tmp_path / ".gitignore").write_text(
        "__pycache__/\n.pytest_cache/\n.hypothesis/\n.mypy_cache/\n.ruff_cache/\n"
    )
    run("git", "init", "-q")
    run("git", "add", ".")
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "copy")
    for kind, name in NAMES.items():
        python("scripts/new.py", kind, name)
    changed = run("git", "status", "--porcelain", "--untracked-files=all").splitlines()
    assert changed == [f"?? {file}" for file in sorted(file for files in FILES.values() for file in files)]
    python("-m", "ruff", "check", ".")
    python("-m", "ruff", "format", "--check", ".")
    python("-m", "mypy", "finetune")
    own = [file for files in FILES.values() for file in files if file.startswith("tests/")]
    about_all = [
        "tests/test_registry.py",
        "tests/test_imports.py",
        "tests/config/test_load.py",
        "tests/test_pages.py",
    ]
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *about_all)
    shown = python(
        "-m",
        "finetune",
        "show",
        "method=sparse",
        "method.score=square",
        "schedule=rounds",
        "optimizer=descent",
    )
    assert 'method.score: "square"' in shown
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
    assert (tmp_path / "model/conf/model/mine.yaml").is_file()


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("methd", "a", r"methd has no skeleton\. Did you mean 'method'\? There is: method, "),
        ("sweep", "a", "sweep has no skeleton"),
        ("method", "Row", "'Row' is not a name: take small letters"),
        ("method", "row-scale", "'row-scale' is not a name"),
        ("method", "lora", r"method=lora is there already, in finetune\.methods\.reparam\.lora"),
    ],
)
def test_what_is_refused(kind: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        new.write(kind, name, "reparam", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_row_scale.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"test_row_scale.py exists\. Take another name"):
        new.write("method", "row_scale", "reparam", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["test_row_scale.py"]
