"""The commands as a user types them: exit codes, messages, what is written and what is not.

The real ``main`` is called in this process; tests/cli/test_start.py starts it in a new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.registry import catalog

from ..support.command import Said, call
from ..support.tiny_model import TINY

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
MODEL = Path(finetune.__file__).parent / "models" / "tiny_vit"
SMALL = [
    "method=head",
    "train.steps=2",
    "train.eval_every=null",
    "train.batch_size=8",
    "train.threads=1",
    "dataset.retention_images=0",
    *TINY,
]


Command = Callable[..., Said]


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """Run ``finetune`` with the given words, in ``folder``, on a terminal of 160 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        yield call


Refuse = Callable[..., list[str]]


@pytest.fixture
def refuse(command: Command, tmp_path: Path) -> Refuse:
    """Run a command that must be refused: exit 2, only messages, nothing written. Returns the messages."""

    def run(*words: object, folder: Path | None = None) -> list[str]:
        folder = folder or tmp_path
        before = contents(folder)
        said = command(*words, folder=folder)
        assert (said.code, said.out) == (2, ""), said
        lines = said.err.splitlines()
        assert lines
        assert all(line.startswith("Error: ") for line in lines), lines
        assert contents(folder) == before
        return lines

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b""
        for file in folder.rglob("*")
    }


def real(*words: str, folder: Path) -> Said:
    """Run ``finetune`` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words], cwd=folder, env=ENV, capture_output=True, text=True
    )
    return Said(done.returncode, done.stdout, done.stderr)


def test_methods(command: Command, tmp_path: Path) -> None:
    rows = json.loads(command("methods", "--json", folder=tmp_path).out)
    assert [row["name"] for row in rows] == list(catalog("method"))
    table = command("methods", folder=tmp_path).out
    for row in rows:
        assert row["family"]
        assert row["trains"]
        assert row["name"] in table
        assert row["paper"] in table


def test_show(command: Command, tmp_path: Path) -> None:
    shown = json.loads(command("show", "method=lora", "method.rank=3", "--json", folder=tmp_path).out)
    assert shown["method.rank"] == {"value": 3, "from": "command line"}
    assert shown["method.name"] == {"value": "lora", "from": "conf/method/lora.yaml:4"}
    lines = command("show", "method=lora", "method.rank=3", folder=tmp_path).out.splitlines()
    assert len(lines) == len(shown)
    assert any(line.startswith("method.rank: 3 ") and line.endswith("# command line") for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["method.sparsty=0.1"],
            [
                "method.sparsty=0.1 (command line) is not a setting of method=snell. "
                "Did you mean 'method.sparsity'?"
            ],
        ),
        (["method=snel"], ["method=snel is not an option (command line). Did you mean 'snell'?"]),
        (["logger=wadb"], ["logger=wadb is not an option (command line). Did you mean 'wandb'?"]),
        (["train.steps=abc"], ["train.steps='abc' (command line) should be a valid integer."]),
        (["method.rnk=1", "train.steps=0", "--fast"], ["--fast", "method.rnk=1", "train.steps=0"]),
        (["sparsity=1.2"], ["method.sparsity=1.2 (command line) should be less than 1."]),
        (
            ["method=lora", "sparsity=0.1"],
            ["method.sparsity=0.1 (command line) is not a setting of method=lora."],
        ),
        (["method.targets=[nowhere]"], ["nowhere"]),
        (["--multirun", "seed=1"], ["--multirun is not an option here"]),
        (["-m", "seed=1"], ["-m is not an option here"]),
        (["method=[lora,snell]"], ["method=[lora,snell]: method takes exactly one option"]),
        (["method=lora,snell"], ["method=lora,snell names several values"]),
        (["+method.extra=1"], ["+method.extra=1: settings are neither added nor removed"]),
        (["model=hf"], ["model.path is not set (conf/model/hf.yaml:2 leaves it open)."]),
        (["model=hf", "model.path=nowhere"], ["nowhere"]),
        (["--config", "no.yaml"], ["--config no.yaml: there is no such file."]),
        (["--config-dir", "no"], ["--config-dir no: there is no such folder."]),
        (["name=a/b"], ["name='a/b'"]),
    ],
)
def test_bad_settings(refuse: Refuse, words: list[str], messages: list[str]) -> None:
    lines = refuse("train", *words)
    assert len(lines) == len(messages), lines
    assert all(message in line for line, message in zip(lines, messages, strict=True)), lines


@pytest.mark.processes
def test_bad_settings_in_a_fresh_process(tmp_path: Path) -> None:
    said = real("train", "method=snel", folder=tmp_path)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert not list(tmp_path.iterdir())


def test_bad_data(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.csv").write_text("text,label\na,x\nb,y\n")
    assert "empty" in refuse("train", "dataset=imagefolder", "dataset.path=empty")[0]
    assert "nope" in refuse("train", "dataset=csv", "dataset.path=some.csv", "dataset.text_column=nope")[0]
    assert "gone" in refuse("train", "dataset=csv", "dataset.path=gone.csv")[0]


def test_truncated_model(refuse: Refuse, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (line,) = refuse("train", "model=hf", "model.path=model")
    assert "model.safetensors" in line


@pytest.fixture(scope="module")
def place(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the user's and one finished run on it, ``outputs/first/run``."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(MODEL, folder / "model")
    said = command("train", *SMALL, "model=hf", "model.path=model", "name=first", "run=run", folder=folder)
    assert said.code == 0, said
    assert "step 2/2" in said.err
    assert "outputs/first/run" in said.out
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of ``place`` to spoil; returns the folder to work in."""
    return Path(shutil.copytree(place, tmp_path / "copy"))


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outputs/first/run/result.json").read_text())
    return found


def test_train_again_runs_nothing(command: Command, run: Path) -> None:
    before = contents(run)
    said = command(
        "train", *SMALL, "model=hf", "model.path=model", "name=first", "run=run", "--json", folder=run
    )
    assert "nothing was trained" in said.err
    assert json.loads(said.out) == result(run)
    assert contents(run) == before


def test_frozen_config_repeats_the_run(command: Command, run: Path) -> None:
    said = command("train", "--config", "outputs/first/run/config.yaml", "run=again", "--json", folder=run)
    again = json.loads(said.out)
    assert (again["metrics"], again["config_hash"]) == (result(run)["metrics"], result(run)["config_hash"])
    assert (run / "outputs/first/again/result.json").is_file()


def test_run_folder_of_another_config(refuse: Refuse, run: Path) -> None:
    lines = refuse(
        "train", *SMALL, "model=hf", "model.path=model", "name=first", "run=run", "seed=1", folder=run
    )
    assert len(lines) == 1
    assert "outputs/first/run" in lines[0]
    assert "seed" in lines[0]


def test_dry_run_writes_nothing(command: Command, tmp_path: Path) -> None:
    planned = json.loads(
        command("train", "method=lora", "method.rank=2", "--dry-run", "--json", folder=tmp_path).out
    )
    assert planned["params"]["trained"] == sum(layer["trained"] for layer in planned["layers"])
    assert planned["stored_bytes"] > 0
    assert planned["expected_peak_memory_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_eval_gives_the_same_numbers(command: Command, run: Path) -> None:
    """By a path that Hydra's grammar refuses, and on a data set named anew."""
    wanted = result(run)["metrics"]["test"]
    (run / "outputs/first/run").rename(run / "epoch=3.pt")
    found = json.loads(command("eval", "--ckpt", "epoch=3.pt", "--json", folder=run).out)
    assert found["metrics"]["test"] == wanted
    assert (
        f"accuracy: {wanted['accuracy']:.6g}"
        in command("eval", "ckpt=epoch=3.pt", "dataset=digits", folder=run).out
    )


def test_merge(command: Command, refuse: Refuse, run: Path) -> None:
    said = command("merge", "ckpt=outputs/first/run", "out=merged", folder=run)
    assert said.code == 0
    assert (run / "merged" / "config.json").is_file()
    assert "merged" in refuse("merge", "ckpt=outputs/first/run", "out=merged", folder=run)[0]


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(refuse: Refuse, run: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (run / "two" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(run / "two" / label / f"{number}.png")
    assert (
        "labels"
        in refuse("eval", "ckpt=outputs/first/run", "dataset=imagefolder", "dataset.path=two", folder=run)[0]
    )
    delta = run / "outputs/first/run/delta/delta.safetensors"
    whole = delta.read_bytes()
    delta.write_bytes(whole[:-100])
    assert "delta.safetensors" in refuse("eval", "ckpt=outputs/first/run", folder=run)[0]
    delta.write_bytes(whole)
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-200] ^= 1
    weights.write_bytes(bytes(content))
    assert "not the model that" in refuse("eval", "ckpt=outputs/first/run", folder=run)[0]


def test_faults_of_the_run_and_of_the_words_come_together(refuse: Refuse) -> None:
    expected = [
        "Name one run",
        "x=1: export takes ckpt=RUN format=peft out=DIR.",
        "needs one out=DIR, a folder",
    ]
    lines = refuse("export", "format=peft", "x=1")
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line
    assert len(refuse("eval", "ckpt=nowhere", "seed=1")) == 2
    lines = refuse("analyze", "what=geometri", "what.rank=", "nowhere", "neither/here")
    assert len(lines) == 3, lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval"], "Name one run by ckpt=RUN"),
        (["eval", "ckpt=nowhere"], "ckpt=nowhere: there is no such folder"),
        (["eval", "ckpt=.", "--ckpt", "."], "not 2"),
        (["eval", "ckpt=.", "train.steps=3"], "train.steps=3: eval takes ckpt=RUN"),
        (["eval", "ckpt=."], "not the folder of a run"),
        (["merge", "ckpt=."], "merge needs one out=DIR"),
        (["inspect", ".", "rank=4"], "not 2"),
        (["merge", "ckpt=.", "out=x", "--force"], "--force: merge takes"),
        (["sweep", "run=x", "seed=0,1"], "run=x: a sweep names its runs"),
        (["show", "seed=x"], "seed='x'"),
        (["show", "--config-dir", "x" * 999], "x... is too long for the name of a file or folder"),
        (["eval", f"ckpt={'x' * 999}"], "x... is too long for the name of a file or folder"),
        (["show", "model.path=\udcff"], "model.path=\\udcff is not UTF-8"),
        (["sweep", "seed=0,1", "model.path=\udcff"], "model.path=\\udcff is not UTF-8"),
    ],
)
def test_bad_words_of_other_commands(refuse: Refuse, words: list[str], message: str) -> None:
    lines = refuse(*words)
    assert len(lines) == 1
    assert message in lines[0]
