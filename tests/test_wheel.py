"""The built wheel, away from the checkout, runs the main job: conf/ and the built-in models travel in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_docs import example
from .test_new import NAMES, SCORED, WITH_OPTIONS

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("finetune_bench-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def python(site: Path, tmp_path: Path) -> Callable[..., str]:
    """Run Python with the package of the wheel, in a folder of the test's own, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place = Path(run("-c", "import finetune; print(finetune.__file__)").strip())
    assert place.is_relative_to(site)
    return run


def test_the_wheel_runs_the_main_job(site: Path, python: Callable[..., str], tmp_path: Path) -> None:
    result = json.loads(
        python(
            "-m", "finetune", "train", "--json", "method=snell", "sparsity=0.1", "train.steps=2", "name=wheel"
        )
    )
    assert result["status"] == "finished"
    (run,) = (tmp_path / "outputs" / "wheel").iterdir()
    assert (
        json.loads(python("-m", "finetune", "eval", "--json", f"ckpt={run}"))["metrics"]["test"]
        == result["metrics"]["test"]
    )
    assert "tiny_lm" in {path.name for path in (site / "finetune" / "models").iterdir()}


def test_the_example_of_the_documentation_is_a_plug_in(python: Callable[..., str], tmp_path: Path) -> None:
    """A user of the installed wheel adds a method without touching the package."""
    name = "scratch_rows"  # a user may have added the name that the page gives to this checkout
    folder = str(example(tmp_path, name))
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", folder)
    assert name in python("-m", "finetune", "methods", "--plugins", folder)
    words = [f"method={name}", "train.steps=2", "train.eval_every=null", "name=n", "run=r"]
    result = json.loads(python("-m", "finetune", "train", "--json", "--plugins", folder, *words))
    assert [record["name"] for record in result["plugins"]] == ["mine"]
    again = json.loads(python("-m", "finetune", "eval", "--json", "--plugins", folder, "ckpt=outputs/n/r"))
    assert again["metrics"]["test"] == result["metrics"]["test"]


def test_a_skeleton_of_every_kind_is_a_plug_in(
    site: Path, python: Callable[..., str], tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in site.rglob("*") if "__pycache__" not in str(file)}
    for kind, name in NAMES.items():
        python("-m", "finetune.testing.new", kind, name, "--plugins", "mine")
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "mine")
    words = [
        *SCORED,
        *WITH_OPTIONS,
        "train.steps=2",
        "schedule.every=1",
        "train.eval_every=null",
    ]
    result = json.loads(python("-m", "finetune", "train", "--json", "--plugins", "mine", *words))
    assert result["status"] == "finished"
    shown = python(
        "-m",
        "finetune",
        "show",
        "--plugins",
        "mine",
        f"model={NAMES['model']}",
        "model.path=x",
        f"method={NAMES['method']}",
    )
    assert f'model.name: "{NAMES["model"]}"' in shown
    after = {file: file.stat().st_mtime_ns for file in site.rglob("*") if "__pycache__" not in str(file)}
    assert after == before
