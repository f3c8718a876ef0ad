"""Points that cost nothing to make, and a child that trains nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.cli import app as cli
from finetune.config.settings import Config, LoggerConfig, ModelConfig, TrainConfig
from finetune.launch.start import NO_OPTIONS, StartOptions
from finetune.optim.adamw import AdamW
from finetune.storage.run_folder import RunFolder
from finetune.sweep import process, work
from finetune.sweep.grid import Point, freeze

STUB = Path(__file__).with_name("stub.py")
SMALL = [
    "method=bitfit",
    "train.steps=2",
    "train.eval_every=null",
    "train.batch_size=8",
    "train.threads=1",
    "train.device=cpu",
]
TUNED = [*SMALL, "tune=optimizer.lr", "--trials", "2", "name=t"]


@dataclass(frozen=True)
class Named:
    """A method or a data set, as far as a sweep looks at it."""

    name: str


def point(seed: int, name: str = "s", steps: int = 10) -> Point:
    """A run whose fate ``stub.py`` decides by its seed."""
    train = TrainConfig(steps=steps, device="cpu")
    config = Config(
        name,
        f"m-s{seed}-x",
        seed,
        ModelConfig("a", "b"),
        Named("m"),
        Named("d"),
        AdamW(),
        train,
        LoggerConfig(),
        objective=Named("task"),
    )
    return Point("method=m", config, RunFolder(Path("outputs", name, f"m-s{seed}-x")))


def stubbed(of: Point, options: StartOptions = NO_OPTIONS) -> list[str]:
    """In place of ``process.run_command``."""
    return [sys.executable, "-S", "-E", str(STUB), str(of.folder.config)]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Point]]:
    """Children are the stub; called with seeds it makes and freezes their points."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "run_command", stubbed)
    monkeypatch.setattr(process, "FORKS", False)

    def make(*seeds: int) -> list[Point]:
        made = [point(seed) for seed in seeds]
        freeze(made)
        return made

    return make


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command here, with children that train nothing; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "run_command", stubbed)
    monkeypatch.setattr(process, "FORKS", False)
    monkeypatch.setattr(work, "check", lambda runs, retry, options: None)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", "sweep", *words])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def starts(of: Point) -> int:
    """How often a point was started."""
    file = of.folder.path / "started"
    return len(file.read_text().splitlines()) if file.exists() else 0


def pid(of: Point) -> int:
    """Of the last process of a point."""
    return int((of.folder.path / "started").read_text().splitlines()[-1].split()[0])


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(of: Point, seconds: float = 5) -> bool:
    """Whether the last process of a point ends soon."""
    end = time.monotonic() + seconds
    while alive(pid(of)) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid(of))
