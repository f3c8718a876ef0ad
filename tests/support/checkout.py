"""A copy of this checkout, in which a test can add files and start commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("finetune", "conf", "scripts", "tests", "docs", "pyproject.toml", "README.md", "Makefile")


class Checkout:
    """A copy in ``folder``; the package is imported from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("PYTEST_ADDOPTS", None)

    def start(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy to its end."""
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def run(self, *words: str) -> str:
        """Run a command that must succeed, and return what it prints."""
        done = self.start(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, *words: str) -> str:
        """Run Python with ``words``; it must succeed."""
        return self.run(sys.executable, *words)

    def refuse(self, *words: str) -> str:
        """Run the command line with ``words``, which it must refuse, and return the message."""
        done = self.start(sys.executable, "-m", "finetune", *words)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    def write(self, name: str, text: str) -> None:
        """Write a file of the copy."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
