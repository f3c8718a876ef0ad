"""A whole run passes every point; each planted fault fails at its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune.artifacts.verify import verify
from finetune.config.load import load
from finetune.errors import ConfigError
from finetune.storage import manifest
from finetune.storage.run_folder import RunFolder
from finetune.training import run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format-1"
WORDS = [
    "model=hf",
    "model.path=model",
    "method=lora",
    "method.rank=2",
    "train.steps=6",
    "train.batch_size=8",
    "train.eval_every=3",
    "name=a",
]
POINTS = ["files", "predictions", "evaluation", "resume", "merge"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the model of the fixture."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(FIXTURES / "model", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load(
            [
                *WORDS,
                "optimizer.lr=0.02",
                "train.save_every=2",
                "train.keep_last=null",
                "train.device=cpu",
                "train.threads=1",
            ]
        )
        run.train(config, Path("run"), lambda line: None, lambda done, steps, words: None)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of it to damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path("run"))


def verdicts(files: RunFolder) -> tuple[dict[str, str], dict[str, str]]:
    found = verify(files.path, lambda line: None)
    assert [point["point"] for point in found["points"]] == POINTS
    assert (found["verdict"] == "fail") == any(point["verdict"] == "fail" for point in found["points"])
    return {p["point"]: p["verdict"] for p in found["points"]}, {
        p["point"]: p["words"] for p in found["points"]
    }


def test_a_whole_run_passes_every_point_and_is_only_read(files: RunFolder) -> None:
    before = {file: file.read_bytes() for file in files.path.rglob("*") if file.is_file()}
    found, words = verdicts(files)
    assert found == dict.fromkeys(POINTS, "pass"), words
    assert "4 folders have the sizes and SHA-256" in words["files"]
    assert "597 rows" in words["predictions"]
    assert "val, test, retention" in words["evaluation"]
    assert "from step 2 to step 6" in words["resume"]
    assert {file: file.read_bytes() for file in files.path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_without_a_checkpoint_of_its_middle_a_run_is_trained_from_the_beginning(files: RunFolder) -> None:
    shutil.rmtree(files.path / "checkpoints")
    found, words = verdicts(files)
    assert found == dict.fromkeys(POINTS, "pass"), words
    assert "from the beginning" in words["resume"]


def tensors(
    folder: str, name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> Callable[[RunFolder], None]:
    """Change the tensors of a file, and its manifest with them."""

    def act(files: RunFolder) -> None:
        file = files.path / folder / name
        held = load_file(file)
        change(held)
        save_file(held, file)
        manifest.write(file.parent)

    return act


def value(name: str, change: Callable[[Any], object]) -> Callable[[RunFolder], None]:
    def act(files: RunFolder) -> None:
        content = json.loads((files.path / name).read_text())
        change(content)
        (files.path / name).write_text(json.dumps(content))

    return act


def nudge(held: dict[str, torch.Tensor]) -> None:
    next(
        t
        for name, t in sorted(held.items())
        if t.is_floating_point() and t.ndim > 1 and "exp_avg" not in name
    ).view(-1)[0] += 0.5


def moment(held: dict[str, torch.Tensor]) -> None:
    next(t for name, t in sorted(held.items()) if name.startswith("optimizer/") and t.ndim > 1).view(-1)[
        0
    ] += 1e-3


def answer(files: RunFolder) -> None:
    table = pq.read_table(files.predictions).to_pydict()
    was, label = table["prediction"][0], table["label"][0]
    table["prediction"][0] = label if was != label else (label + 1) % 10
    pq.write_table(pa.table(table), files.predictions)


def line(files: RunFolder) -> None:
    rows = [json.loads(text) for text in files.metrics.read_text().splitlines()]
    rows[-2]["loss"] += 1e-9
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_line(files: RunFolder) -> None:
    rows = files.metrics.read_text().splitlines()
    files.metrics.write_text("".join(f"{row}\n" for row in rows[1:]))


def seed(files: RunFolder) -> None:
    tree = yaml.safe_load(files.config.read_text())
    tree["optimizer"]["lr"] *= 2
    files.config.write_text(yaml.safe_dump(tree))


def torn(files: RunFolder) -> None:
    for name in ("delta/delta.json", "checkpoints/step-4/state.safetensors"):
        data = (files.path / name).read_bytes()
        (files.path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


FAULTS: list[tuple[str, Callable[[RunFolder], None], dict[str, str]]] = [
    (
        "torn files",
        torn,
        {
            "files": r"delta/delta\.json is damaged.*step-4/state\.safetensors is damaged",
            "evaluation": "",
            "merge": "",
        },
    ),  # resumes from step 2
    (
        "a moment of the optimizer in the middle",
        tensors("checkpoints/step-2", "state.safetensors", moment),
        {"resume": "metrics.jsonl differs"},
    ),
    (
        "a better result than it was",
        value("result.json", lambda r: r["metrics"]["test"].update(accuracy=0.99)),
        {
            "predictions": r"and result\.json says 0\.99",
            "evaluation": "accuracy 0.99 before",
            "resume": r"metrics of result\.json was",
        },
    ),
    (
        "another change, with its manifest",
        tensors("delta", "delta.safetensors", nudge),
        {"evaluation": r"gives other numbers \(.*test: .*loss", "resume": "stored tensors differ"},
    ),
    ("an answer", answer, {"predictions": "gives a test accuracy", "resume": "the predictions differ"}),
    ("a line of metrics", line, {"resume": "metrics.jsonl differs"}),
    ("a lost line of metrics", lose_line, {"files": "does not have one loss for each of 6 steps"}),
    (
        "another configuration",
        seed,
        {
            point: r"config\.yaml is not what \S+ was trained with: optimizer\.lr"
            for point in POINTS
            if point[0] != "p"
        },
    ),
]


QUICK = 3  # of the faults are planted in the quick suite


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        pytest.param(act, expected, id=name, marks=[pytest.mark.slow] if i >= QUICK else [])
        for i, (name, act, expected) in enumerate(FAULTS)
    ],
)
def test_a_planted_fault_fails_where_it_matters(
    files: RunFolder, act: Callable[[RunFolder], None], expected: dict[str, str]
) -> None:
    act(files)
    found, words = verdicts(files)
    assert {point for point, verdict in found.items() if verdict == "fail"} == {*expected}, words
    assert all(re.search(pattern, words[point]) for point, pattern in expected.items()), words


def test_what_means_nothing_for_a_run_is_skipped_with_its_reason(files: RunFolder) -> None:
    value("result.json", lambda r: r.update(processes=2))(files)
    found, words = verdicts(files)
    assert (found["resume"], words["resume"]) == ("skipped", "the run had 2 processes, and this is one")
    files.result.unlink()
    found, words = verdicts(files)
    assert found == {"files": "pass"} | dict.fromkeys(POINTS[1:], "skipped")
    assert {*list(words.values())[1:]} == {"the run has not finished"}
    assert verify(files.path, lambda line: None)["verdict"] == "unfinished"
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        verify(Path("model"), pytest.fail)
