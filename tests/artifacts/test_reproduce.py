"""A run repeated: to the bit on the same machine, and judged by its seeds where it is not."""

from __future__ import annotations

import json
import shutil
import statistics
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from finetune.artifacts import reproduce as reproducing
from finetune.artifacts.reproduce import reproduce
from finetune.config.load import load
from finetune.errors import ConfigError, RunFailed
from finetune.launch.start import StartOptions
from finetune.storage.atomic import write_json_atomic
from finetune.training import run as running

from ..support.tiny_model import TINY

SMALL = [
    "method=bitfit",
    "train.steps=2",
    "train.eval_every=null",
    "train.batch_size=8",
    "train.threads=1",
    "train.device=cpu",
    *TINY,
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("here") / "outputs" / "sweep" / "run0"
    running.train(
        load([*SMALL, "dataset.retention_images=0", "name=sweep", "run=run0"]),
        folder,
        lambda line: None,
        lambda done, total, words: None,
    )
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Path(shutil.copytree(made, tmp_path / "outputs" / "sweep" / "run0"))


@pytest.fixture
def repeated(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetition is the run itself, at once."""

    def copy_run(path: Path, folder: Path, options: StartOptions) -> dict[str, Any]:
        shutil.copytree(made, folder)
        return dict(json.loads((folder / "result.json").read_text()))

    monkeypatch.setattr(reproducing, "_train_again", copy_run)


def change(run: Path, **told: Any) -> dict[str, Any]:
    result = json.loads((run / "result.json").read_text()) | told
    write_json_atomic(run / "result.json", result)
    return dict(result)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.processes
def test_the_same_bits_again(run: Path, tmp_path: Path) -> None:
    """In a real process; a path in its settings is meant from where the run was started."""
    before = files(tmp_path)
    found = reproduce(run)
    assert found["verdict"] == "identical", found
    assert (found["changed_tensors"], found["differs"], found["kept"]) == ([], {}, None)
    assert found["words"].startswith(
        "Identical: test metrics and stored change agree to the bit (accuracy 0."
    )
    assert files(tmp_path) == before  # the scratch folder is gone, and the run untouched


@pytest.mark.slow
def test_relative_paths_and_kept_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f"word{i % 2} number {i},{'ab'[i % 2]}\n" for i in range(60))
    )
    monkeypatch.chdir(tmp_path)
    words = ["model=tiny_lm", "dataset=csv", "dataset.path=t.csv", "dataset.task=causal_lm", "method=lora"]
    config = load([*SMALL[1:], *words, "logger=none"])
    running.train(config, Path("outputs/n/r"), lambda line: None, lambda done, total, what: None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = reproduce(Path("../outputs/n/r"), Path("kept"))
    assert (found["verdict"], found["metric"], found["kept"]) == ("identical", "bits_per_byte", "kept")
    assert Path("kept/result.json").is_file()
    with pytest.raises(ConfigError, match="--keep kept exists"):
        reproduce(Path("../outputs/n/r"), Path("kept"))


@pytest.mark.usefixtures("repeated")
def test_one_bit_of_the_change(run: Path) -> None:
    file = run / "delta" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    found = reproduce(run)
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    last = max(
        (name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1]
    )
    assert (found["verdict"], found["changed_tensors"]) == ("different", [last])
    assert "no other seeds of this setting" in found["words"]


@pytest.mark.usefixtures("repeated")
@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "inside"), (0.5, "different")])
def test_judged_by_the_seeds_beside_it(run: Path, made: Path, shift: float, verdict: str) -> None:
    """Where 95 % of further seeds would lie, from four seeds.

    They are the run's own and three others of the same group.
    """
    now = json.loads((made / "result.json").read_text())
    value = now["metrics"]["test"]["accuracy"]
    values = [value + shift + d for d in (0.01, -0.02, 0.02, 0.0)]
    for number, each in enumerate(values):
        folder = run.with_name(f"run{number}")
        if number:
            folder.mkdir()
        write_json_atomic(folder / "result.json", now | {"metrics": {"test": {"accuracy": each}}})
    for name, told in {
        "other": {"group_hash": "x"},
        "failed": {"status": "failed"},
        "torn": {"metrics": None},
    }.items():
        run.with_name(name).mkdir()
        write_json_atomic(run.with_name(name) / "result.json", now | told)
    found = reproduce(run)
    reach = scipy.stats.t.ppf(0.975, 3) * statistics.stdev(values) * (5 / 4) ** 0.5
    assert (found["verdict"], found["seeds"]) == (verdict, 4)
    assert found["interval"] == pytest.approx(
        [statistics.mean(values) - reach, statistics.mean(values) + reach]
    )
    assert ("but inside" if verdict == "inside" else "and outside") in found["words"]


@pytest.mark.usefixtures("repeated")
def test_what_differs_is_named(run: Path) -> None:
    result = change(run, git_commit="0" * 40, device="cuda:0")
    change(run, versions={**result["versions"], "torch": "1.0", "gone": "3"})
    found = reproduce(run)
    assert set(found["differs"]) == {"git_commit", "device", "torch", "gone"}
    assert (found["differs"]["torch"][0], found["differs"]["gone"]) == ("1.0", ["3", None])


def test_only_finished_runs(run: Path, tmp_path: Path) -> None:
    change(run, status="failed", error="out of memory")
    with pytest.raises(ConfigError, match=r"has not finished .failed: out of memory"):
        reproduce(run)
    with pytest.raises(ConfigError, match="no such folder"):
        reproduce(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        reproduce(tmp_path)


@pytest.mark.processes
def test_a_repetition_that_fails(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("method: 1\n")
    with pytest.raises(RunFailed, match=r"could not be run again .exit code 2"):
        reproduce(run)
    assert "Error: " in capfd.readouterr().err
    assert not list((tmp_path / "temporary").iterdir())
