"""Passes over stored weights, from the command line: what is written, restarted, proved and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.artifacts import passes
from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import relative_output_error, run
from finetune.config.settings import ModelConfig
from finetune.core.statistics import SiteStatistics
from finetune.errors import ConfigError
from finetune.models.folder import BUILTIN
from finetune.models.load import load
from finetune.models.stored import fingerprint
from finetune.passes.magnitude import Magnitude

from ..support.command import call

LM = BUILTIN / "tiny_lm" / "model.safetensors"
HALF = Magnitude(sparsity=0.5)


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def refuse(folder: Path, *words: object) -> list[str]:
    """Return the faults of ``finetune prune WORDS``, which must write nothing."""
    before = names(folder)
    said = call("prune", *words, folder=folder)
    assert said.code == 2
    assert names(folder) == before
    return said.err.splitlines()


def test_a_language_model_is_pruned_and_all_else_is_kept_to_the_bit(tmp_path: Path) -> None:
    words = ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_lm", "out=pruned"]
    said = call("prune", *words, "--json", folder=tmp_path)
    assert said.code == 0, said.err
    about = json.loads(said.out)
    assert names(tmp_path) == [
        "pruned/config.json",
        "pruned/finetune/manifest.json",
        "pruned/finetune/masks.safetensors",
        "pruned/finetune/pass.json",
        "pruned/generation_config.json",
        "pruned/model.safetensors",
        "pruned/tokenizer.json",
        "pruned/tokenizer_config.json",
    ]
    before, after = load_file(LM), load_file(tmp_path / "pruned" / "model.safetensors")
    assert after.keys() == before.keys()
    rows = {row["tensor"]: row for row in about["sites"]}
    assert len(rows) == 35
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in rows:
            assert torch.equal(tensor, before[name]), name
            continue
        gone = tensor == 0
        assert int(gone.sum()) == rows[name]["zeros"] == tensor.numel() // 2
        assert torch.equal(tensor[~gone], before[name][~gone])
        assert before[name][gone].abs().max() <= tensor[~gone].abs().min()
    base = load(ModelConfig("hf", "builtin:tiny_lm", dtype="float16"), "causal_lm", (), 0)
    assert about["parent"] == fingerprint(base.model, ())


def test_the_chain_names_every_pass_and_no_path(tmp_path: Path) -> None:
    first = run(Request(HALF, "builtin:tiny_lm", tmp_path / "first"))
    second = run(Request(Magnitude(pattern="3:4"), str(tmp_path / "first"), tmp_path / "second"))
    content = json.loads((tmp_path / "second/finetune/pass.json").read_text())
    assert [step["settings"]["pattern"] for step in content["chain"]] == [None, "3:4"]
    assert second["parent"] == first["fingerprint"] != first["parent"]
    assert content["chain"][0]["fingerprint"] == first["fingerprint"]
    assert str(tmp_path) not in json.dumps(content)
    again = run(Request(HALF, str(tmp_path / "first"), tmp_path / "again"))
    assert again["fingerprint"] == first["fingerprint"]
    assert sum(row["changed"] for row in again["sites"]) == 0


def sharded(folder: Path) -> Path:
    """Write the language model as two files with an index."""
    folder.mkdir()
    for file in LM.parent.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(LM)
    middle = sorted(tensors)[len(tensors) // 2]
    weight_map = {}
    for number, part in enumerate(
        ({n: t for n, t in tensors.items() if n < middle}, {n: t for n, t in tensors.items() if n >= middle})
    ):
        name = f"model-{number}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_model_in_several_files_gives_the_same_weights(tmp_path: Path) -> None:
    whole = run(Request(HALF, "builtin:tiny_lm", tmp_path / "whole"))
    parts = run(Request(HALF, str(sharded(tmp_path / "model")), tmp_path / "parts"))
    assert parts["fingerprint"] == whole["fingerprint"]


class Killed(BaseException):
    pass


def test_a_write_and_a_line_that_were_cut_short_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Request(HALF, "builtin:tiny_lm", tmp_path / "whole"))
    work = tmp_path / ".out.pass"
    overwrite = passes.TensorFile.overwrite
    done = 0

    def cut_short(file: Any, name: str, tensor: Any) -> None:
        nonlocal done
        done += 1
        if done == 18:  # a mask and a weight for each layer
            overwrite(file, name, torch.full_like(tensor, 7))
            raise Killed
        overwrite(file, name, tensor)

    monkeypatch.setattr(passes.TensorFile, "overwrite", cut_short)
    with pytest.raises(Killed):
        run(Request(HALF, "builtin:tiny_lm", tmp_path / "out"))
    monkeypatch.undo()
    journal = work / "sites.jsonl"
    lines = journal.read_text()
    assert lines.count("\n") == 8
    journal.write_text(lines[:-20])
    with pytest.raises(ConfigError, match="unfinished pass with other settings"):
        run(Request(Magnitude(sparsity=0.4), "builtin:tiny_lm", tmp_path / "out"))
    written = []
    run(Request(HALF, "builtin:tiny_lm", tmp_path / "out"), written.append)
    assert len(written) == 35 - 7
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    assert not work.exists()


@pytest.mark.processes
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    words = ["prune", "method=wanda", "sparsity=0.5", "model=builtin:tiny_lm", "dataset=stdlib"]
    words += ["dataset.train_bytes=20000", "dataset.length=64", "calibration=8"]
    said = call(*words, "out=whole", folder=tmp_path)
    assert said.code == 0, said.err
    command = [sys.executable, "-m", "finetune", *words, "out=out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.pass" / "sites.jsonl"
    limit = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 9):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    said = call(*words, "out=out", folder=tmp_path)
    assert said.code == 0, said.err
    assert 0 < len(said.err.splitlines()) <= 35 - 9
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_pruned_classifier_keeps_its_head_and_is_tuned_evaluated_and_merged(tmp_path: Path) -> None:
    words = ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_vit", "out=pruned"]
    assert call("prune", *words, folder=tmp_path).code == 0
    before = load_file(BUILTIN / "tiny_vit" / "model.safetensors")
    after = load_file(tmp_path / "pruned" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(after[name], before[name])
    settings = ["method=lora", "model=hf", "model.path=pruned", "run=tuned", "name=n", "train.steps=2"]
    settings += ["train.batch_size=4", "dataset.retention_images=0"]
    said = call("train", *settings, folder=tmp_path)
    assert said.code == 0, said.err
    said = call("eval", "ckpt=outputs/n/tuned", "--json", folder=tmp_path)
    assert said.code == 0, said.err
    assert "test" in json.loads(said.out)["metrics"]
    said = call("merge", "ckpt=outputs/n/tuned", "out=merged", folder=tmp_path)
    assert said.code == 0, said.err
    assert (
        "run, not a model"
        in refuse(tmp_path, "method=magnitude", "sparsity=0.5", "model=outputs/n/tuned", "out=x")[0]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=magnitude"], ["prune needs one model=", "prune needs one out=", "How much is pruned"]),
        (
            ["method=magnitude", "sparsity=1.5", "model=nowhere/at/all", "out=used", "seed=", "dataset.x=1"],
            [
                "seed= has no value",
                "method.sparsity=1.5",
                "dataset.x=1 (command line) is not a setting",
                "out=used exists",
                "model=nowhere/at/all: there is no",
            ],
        ),
        (
            ["method=magnitude", "pattern=2:7", "model=builtin:tiny_vit", "targets=q", "calibration=8"],
            ["needs one out=", "calibration=8 has no effect", *["inputs of vit.layers."] * 6],
        ),
        (
            ["method=wanda", "pattern=2:7", "model=builtin:tiny_vit", "targets=classifier", "out=x"],
            ["Add dataset=NAME", "classifier belongs to the head"],
        ),
        (
            ["method=magnitude", "sparsity=1.5", "model=builtin:tiny_lm", "out=x", "calibration=0"],
            ["calibration=0 should be", "method.sparsity=1.5"],
        ),
        (
            ["method=magnitude", "sparsity=0.5", "model=nowhere/at/all", "out=used", "dataset=stdlib"],
            ["dataset=stdlib has no effect", "out=used exists", "model=nowhere/at/all: there is no"],
        ),
        (["method=wanda", "sparsity=0.5", "model=builtin:tiny_lm", "out=x"], ["Add dataset=NAME"]),
        (
            ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_lm", "model.head=keep", "out=x"],
            ["model.head=keep: prune takes the model as model=PATH"],
        ),
        (
            ["method=wanda", "sparsity=0.5", "model=builtin:tiny_lm", "out=x", "dataset=digits"],
            ["model=builtin:tiny_lm is a llama, which does not fit"],
        ),
        (
            ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_vit", "targets=[classifier]", "out=x"],
            ["classifier belongs to the head"],
        ),
        (
            ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_vit", "targets=[gate]", "out=x"],
            ["targets: 'gate' matches no linear layer"],
        ),
        (
            ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_lm", "out=x", "seed=1"],
            ["seed=1 has no effect"],
        ),
    ],
)
def test_what_is_refused(words: list[str], expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    faults = refuse(tmp_path, *words)
    assert len(faults) == len(expected)
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault


@pytest.mark.parametrize(
    "text", ["[]", '{"chain": 1}', '{"chain": [1]}', "nan", '{"format": 99, "chain": []}']
)
def test_a_damaged_description_of_the_model_is_refused(text: str, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / "finetune").mkdir()
    (model / "finetune" / "pass.json").write_text(text)
    faults = refuse(tmp_path, "method=magnitude", "sparsity=0.5", "model=model", "out=x")
    assert len(faults) == 1
    assert "pass.json" in faults[0]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    words = ["method=magnitude", "sparsity=0.5", "model=builtin:tiny_lm", "out=x", "--dry-run", "--json"]
    said = call("prune", *words, folder=tmp_path)
    assert said.code == 0, said.err
    assert len(json.loads(said.out)["sites"]) == 35
    assert not list(tmp_path.iterdir())


def test_the_output_error_is_that_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    new = weight.clone()
    new[:, 1] = 0
    expected = float((x @ (new - weight).T).norm() / (x @ weight.T).norm())
    known = SiteStatistics(50, {"input_gram": x.T @ x})
    assert relative_output_error(weight, new, known) == pytest.approx(expected)
    apart = torch.linalg.qr(x)[0] * torch.arange(1, 5)
    expected = float((apart @ (new - weight).T).norm() / (apart @ weight.T).norm())
    known = SiteStatistics(50, {"input_squares": (apart**2).sum(0)})
    assert relative_output_error(weight, new, known) == pytest.approx(expected)
    assert relative_output_error(weight, new, None) is None
