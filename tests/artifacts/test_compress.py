"""Compressed folders from the command line: what is written, restarted, read, tuned and refused."""

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
import transformers
from safetensors.torch import load_file, save_file

from finetune.artifacts import structured_output
from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.config.settings import ModelConfig
from finetune.errors import ConfigError, RunFailed
from finetune.models.folder import BUILTIN
from finetune.models.load import load
from finetune.models.sidecar import FILE
from finetune.passes.magnitude import Magnitude
from finetune.passes.svd import Svd

from ..support.command import call

LM = BUILTIN / "tiny_lm"
IDS = torch.arange(20, 60)[None]
SMALL = Svd(keep=0.3, targets=("attention",))


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@torch.no_grad()
def logits(folder: Path | str) -> torch.Tensor:
    model = load(ModelConfig("hf", str(folder)), "causal_lm", (), 0).model
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in language model in float32, so that products of factors are not rounded to float16."""
    folder = tmp_path_factory.mktemp("wide")
    for file in LM.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.float() for name, tensor in load_file(LM / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_is_compressed_and_all_else_is_kept_to_the_bit(wide: Path, tmp_path: Path) -> None:
    said = call("compress", "method=svd", "keep=0.8", f"model={wide}", "out=small", "--json", folder=tmp_path)
    assert said.code == 0, said.err
    about = json.loads(said.out)
    assert names(tmp_path) == [
        "small/config.json",
        "small/finetune/manifest.json",
        "small/finetune/pass.json",
        "small/finetune/structure.json",
        "small/generation_config.json",
        "small/model.safetensors",
        "small/tokenizer.json",
        "small/tokenizer_config.json",
    ]
    before, after = load_file(wide / "model.safetensors"), load_file(tmp_path / "small/model.safetensors")
    sidecar = json.loads((tmp_path / "small" / FILE).read_text())
    assert (sidecar["format"], sidecar["manifest"]) == (1, "manifest.json")
    assert len(sidecar["structures"]) == len(about["sites"]) == 35
    for row in about["sites"]:
        layer, weight = row["site"], before.pop(row["tensor"]).double()
        first, second = after.pop(f"{layer}.first.weight"), after.pop(f"{layer}.second.weight")
        rank = len(first)
        entry = {"inputs": weight.shape[1], "outputs": weight.shape[0], "bias": False, "rank": rank}
        assert row["structure"] == sidecar["structures"][layer] == {"structure": "low_rank", **entry}
        assert row["parameters"] == first.numel() + second.numel() <= 0.8 * row["entries"]
        values = torch.linalg.svdvals(weight)
        expected = values[rank:].square().sum().sqrt() / weight.norm()
        assert row["relative_change"] == pytest.approx(float(expected), rel=1e-4)
    assert after.keys() == before.keys()  # embeddings, norms
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name])
    assert about["share_kept"] == pytest.approx(735_840 / 921_600)


def test_at_full_rank_the_model_computes_the_same(wide: Path, tmp_path: Path) -> None:
    """The keys and values have 64 outputs."""
    run(Request(Svd(rank=64, targets=("k", "v")), str(wide), tmp_path / "full"))
    assert torch.allclose(logits(tmp_path / "full"), logits(wide), atol=1e-5, rtol=1e-6)


def test_transformers_reads_the_dense_folder_which_computes_as_the_structured_one(
    wide: Path, tmp_path: Path
) -> None:
    structured = run(Request(SMALL, str(wide), tmp_path / "small"))
    words = ["method=svd", "keep=0.3", "targets=[attention]", f"model={wide}", "out=dense", "--dense"]
    said = call("compress", *words, "--json", folder=tmp_path)
    assert said.code == 0, said.err
    dense = json.loads(said.out)
    assert "dense/finetune/structure.json" not in names(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    expected = logits(tmp_path / "small")
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(expected, logits(wide), atol=1e-2)
    for row, other in zip(dense["sites"], structured["sites"], strict=True):
        for key in ("site", "structure", "parameters", "relative_change"):
            assert row[key] == other[key]


@pytest.mark.slow
def test_a_model_in_several_files(wide: Path, tmp_path: Path) -> None:
    """The index names the new tensors, and only the files that have the sites change."""
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="1MB")
    for file in LM.glob("tokenizer*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    parts = run(Request(SMALL, str(folder), tmp_path / "parts"))
    whole = run(Request(SMALL, str(wide), tmp_path / "whole"))
    assert parts["fingerprint"] == whole["fingerprint"]
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))
    found = {}
    for file in (tmp_path / "parts").glob("*.safetensors"):
        found |= dict.fromkeys(load_file(file), file.name)
    assert json.loads((tmp_path / "parts" / structured_output.INDEX).read_text())["weight_map"] == found


class Killed(BaseException):
    pass


def test_a_write_that_was_cut_short_is_done_again(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Request(SMALL, str(wide), tmp_path / "whole"))
    write = structured_output.StructuredOutput.write

    def stop(output: Any, site: Any, new: Any) -> Any:
        found = write(output, site, new)
        if site.name.endswith("2.self_attn.k_proj"):
            raise Killed  # the tensors are there, and the journal lacks their row
        return found

    monkeypatch.setattr(structured_output.StructuredOutput, "write", stop)
    with pytest.raises(Killed):
        run(Request(SMALL, str(wide), tmp_path / "out"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unfinished pass with other settings"):
        run(Request(SMALL, str(wide), tmp_path / "out", dense=True))
    monkeypatch.setattr(structured_output, "write_entries", lambda structures, folder: _raise(Killed()))
    with pytest.raises(Killed):  # behind the last site, the weights are written
        run(Request(SMALL, str(wide), tmp_path / "out"))
    monkeypatch.undo()
    finished: list[str] = []
    run(Request(SMALL, str(wide), tmp_path / "out"), finished.append)
    assert finished == []
    for name in ("model.safetensors", FILE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".out.pass").exists()


def _raise(error: BaseException) -> None:
    raise error


def test_a_structure_that_is_not_written_as_computed_is_found(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = structured_output.write_entries
    monkeypatch.setattr(
        structured_output, "write_entries", lambda structures, folder: write({}, folder) and None
    )
    with pytest.raises(RunFailed, match=r"structure.json differs from what was written"):
        run(Request(SMALL, str(wide), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    words = ["compress", "method=svd", "keep=0.5", "model=builtin:tiny_deep"]
    assert call(*words, "out=whole", folder=tmp_path).code == 0
    command = [sys.executable, "-m", "finetune", *words, "out=out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, limit = tmp_path / ".out.pass" / "sites.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 9):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    said = call(*words, "out=out", folder=tmp_path)
    assert said.code == 0, said.err
    for name in ("model.safetensors", FILE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_passes_go_on_with_a_compressed_folder(wide: Path, tmp_path: Path) -> None:
    """Other layers are compressed, factors are pruned, and both folders keep the structures."""
    run(Request(SMALL, str(wide), tmp_path / "first"))
    second = tmp_path / "second"
    run(Request(Svd(rank=9, targets=("down",)), str(tmp_path / "first"), second))
    structures = json.loads((second / FILE).read_text())["structures"]
    assert len(structures) == 25
    chain = json.loads((second / "finetune/pass.json").read_text())["chain"]
    assert [step["settings"]["targets"] for step in chain] == [["attention"], ["down"]]
    pruned = Magnitude(sparsity=0.5, targets=("q.first", "mlp"))
    about = run(Request(pruned, str(second), tmp_path / "third"))
    assert {row["role"] for row in about["sites"]} == {"q.first", "up", "gate", "down.first", "down.second"}
    assert (tmp_path / "third" / FILE).read_bytes() == (second / FILE).read_bytes()
    layer = load(ModelConfig("hf", str(tmp_path / "third")), "causal_lm", (), 0).model.model.layers[0]
    first = layer.self_attn.q_proj.first.weight
    assert int((first == 0).sum()) == first.numel() // 2
    assert layer.self_attn.q_proj.second.weight.all()


STEPS = ["dataset=stdlib", "dataset.length=32", "dataset.train_bytes=20000", "train.eval_every=null"]
STEPS += [f"dataset.{split}_bytes=2000" for split in ("val", "test", "retention")]
STEPS += ["train.batch_size=2", "train.device=cpu", "train.threads=1", "name=n"]


@pytest.mark.slow
def test_the_factors_are_tuned_evaluated_resumed_and_merged(wide: Path, tmp_path: Path) -> None:
    run(Request(SMALL, str(wide), tmp_path / "small"))
    words = ["train", "method=lora", "model=hf", "model.path=small", *STEPS, "train.save_every=2"]
    said = call(*words, "train.steps=4", "run=whole", folder=tmp_path)
    assert said.code == 0, said.err
    said = call("verify", "outputs/n/whole", folder=tmp_path)  # evaluation, resume and merge, to the bit
    assert said.code == 0, said.out + said.err
    said = call("merge", "ckpt=outputs/n/whole", "out=merged", folder=tmp_path)
    assert said.code == 0, said.err
    assert (tmp_path / "merged" / FILE).read_bytes() == (tmp_path / "small" / FILE).read_bytes()
    listed = json.loads((tmp_path / "merged/finetune/manifest.json").read_text())["files"]
    assert set(listed) == {"merge.json", "structure.json"}
    assert not torch.equal(logits(tmp_path / "merged"), logits(tmp_path / "small"))
    said = call("merge", "ckpt=outputs/n/whole", "out=dense", "--dense", folder=tmp_path)
    assert said.code == 0, said.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, logits(tmp_path / "merged"), atol=1e-4)
    words = ["train", "method=full", "model=hf", "model.path=dense", *STEPS, "run=full", "train.steps=1"]
    said = call(*words, folder=tmp_path)
    assert said.code == 0, said.err
    said = call("merge", "ckpt=outputs/n/full", "out=x", "--dense", folder=tmp_path)
    assert said.code == 2
    assert "--dense has no effect: the base of outputs/n/full, dense, has no structures." in said.err


@pytest.mark.slow
def test_a_sparse_run_on_factors_is_merged_and_unmerged(wide: Path, tmp_path: Path) -> None:
    run(Request(SMALL, str(wide), tmp_path / "small"))
    words = ["train", "method=shira", "model=hf", "model.path=small", *STEPS, "run=r", "train.steps=2"]
    assert call(*words, folder=tmp_path).code == 0
    assert call("merge", "ckpt=outputs/n/r", "out=merged", folder=tmp_path).code == 0
    assert call("merge", "--unmerge", "ckpt=merged", "out=back", folder=tmp_path).code == 0
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "small" / FILE).read_bytes()
    tensors = load_file(tmp_path / "back/model.safetensors")
    expected = load_file(tmp_path / "small/model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=svd"], ["compress needs", "compress needs", "How much is kept is not set"]),
        (["method=svd", "keep=1.5", "model=builtin:tiny_lm", "out=x"], ["keep=1.5"]),
        (
            ["method=svd", "keep=0.5", "rank=3", "model=builtin:tiny_lm", "out=x"],
            ["has no effect with rank=3"],
        ),
        (
            ["method=svd", "rank=65", "targets=[k]", "model=builtin:tiny_lm", "out=x"],
            ["more than the 64"] * 5,
        ),
        (["method=svd", "keep=0.01", "targets=[k]", "model=builtin:tiny_lm", "out=x"], ["a rank of 0"] * 5),
        (["method=magnitude", "sparsity=0.5", "model=builtin:tiny_lm", "out=x"], ["run by `finetune prune`"]),
        (["method=svd", "keep=0.5", "model=builtin:tiny_lm", "out=x", "dataset=stdlib"], ["has no effect"]),
        (
            ["method=svd", "keep=0.5", "targets=[lm_head]", "model=builtin:tiny_lm", "out=x"],
            ["lm_head shares"],
        ),
    ],
)
def test_faults_are_named_and_nothing_is_written(
    tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    said = call("compress", *words, folder=tmp_path)
    assert said.code == 2, said.err
    lines = said.err.splitlines()
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line
    assert names(tmp_path) == []


def test_a_factor_is_not_compressed_again(tmp_path: Path) -> None:
    run(Request(Svd(rank=3, targets=("q",)), "builtin:tiny_lm", tmp_path / "small"))
    said = call("compress", "method=svd", "rank=2", "model=small", "out=x", folder=tmp_path)
    assert said.code == 2
    assert "q_proj.first belongs to a structure already (finetune/structure.json of the folder)" in said.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["train", "prune"])
def test_a_structure_that_is_not_registered_is_refused_with_nothing_written(
    tmp_path: Path, command: str
) -> None:
    run(Request(Svd(rank=3, targets=("q",)), "builtin:tiny_lm", tmp_path / "small"))
    content = json.loads((tmp_path / "small" / FILE).read_text())
    content["structures"]["model.layers.0.self_attn.q_proj"]["structure"] = "os.system"
    (tmp_path / "small" / FILE).write_text(json.dumps(content))
    before = names(tmp_path)
    words = ["method=lora", "model=hf", "model.path=small", *STEPS]
    if command == "prune":
        words = ["method=magnitude", "sparsity=0.5", "model=small", "out=x"]
    said = call(command, *words, folder=tmp_path)
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "structure='os.system' is not known. Known: low_rank." in said.err
    assert names(tmp_path) == before
