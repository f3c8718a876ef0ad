"""The built wheel, away from the checkout, runs the main job: conf/ and the built-in models travel in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_the_main_job(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("finetune_bench-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(python("-c", "import finetune; print(finetune.__file__)").strip()).is_relative_to(
        tmp_path / "site"
    )
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
    assert "tiny_lm" in {path.name for path in (tmp_path / "site" / "finetune" / "models").iterdir()}
