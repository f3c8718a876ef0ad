"""Folding runs into their base, against the closed formula, ``finetune merge``, and runs from before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts import graft
from finetune.artifacts.merge import merge
from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.config.settings import ModelConfig
from finetune.errors import RunFailed
from finetune.models.load import load
from finetune.passes.linear import Linear

from ..support.command import call

RUNS = Path(__file__).parents[1] / "frozen" / "runs"  # trained on the folders model and gpt2 beside them
READABLE = ["amt", "id3", "ist", "language", "lift", "lora", "off_principal", "s2ft", "sara", "shira", "sm3"]
READABLE += ["sparse", "sparse_cubic", "spiel", "super_tuning", "unfinished"]


@pytest.fixture(autouse=True)
def _beside_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name runs and bases relative to the folder that they lie in, as they were named in training."""
    monkeypatch.chdir(RUNS)


def fold(out: Path, weights: tuple[float, ...], *runs: str | Path, base: str = "model") -> dict[str, Tensor]:
    """Fold runs, and return the tensors of the result."""
    run(Request(Linear(weights=weights), base, out, runs=tuple(map(Path, runs))))
    return load_file(out / "model.safetensors")


def refuse(folder: Path, *words: object, verb: str = "fold") -> list[str]:
    """Return the faults of a command, which must write nothing."""
    said = call(verb, *words, f"out={folder / 'out'}", folder=RUNS)
    assert said.code == 2, said.out
    assert not list(folder.glob("out*"))
    assert not list(folder.glob(".out*"))
    return said.err.splitlines()


def test_one_run_of_lora_is_the_base_plus_the_product_of_its_factors(tmp_path: Path) -> None:
    base, delta = load_file("model/model.safetensors"), load_file("lora/delta/delta.safetensors")
    scale = yaml.safe_load(Path("lora/config.yaml").read_text())["method"]
    found = fold(tmp_path / "out", (1.0,), "lora")
    about = json.loads((tmp_path / "out/finetune/pass.json").read_text())["chain"][-1]
    tensors = {row["site"]: row["tensor"] for row in about["sites"]}
    factors = [name for name in delta if name.endswith(".a")]
    assert len(factors) == len(tensors) == 12
    for name in factors:
        tensor = tensors[name.removeprefix("method.").removesuffix(".a").replace("/", ".")]
        product = scale["alpha"] / scale["rank"] * (delta[name[:-1] + "b"] @ delta[name])
        assert torch.equal(found[tensor], (base[tensor].double() + product.double()).float()), tensor
    for name in base:
        if name not in tensors.values() and not name.startswith("classifier"):
            assert torch.equal(found[name], base[name]), name


@pytest.mark.parametrize(
    "name",
    [n if n == "lora" else pytest.param(n, marks=pytest.mark.slow) for n in READABLE],
)
def test_one_run_with_weight_one_is_what_merging_writes(name: str, tmp_path: Path) -> None:
    base = yaml.safe_load(Path(name, "config.yaml").read_text())["model"]["path"]
    merge(Path(name), tmp_path / "merged")
    merged, found = (
        load_file(tmp_path / "merged/model.safetensors"),
        fold(tmp_path / "out", (1.0,), name, base=base),
    )
    assert found.keys() == merged.keys()
    for tensor, value in merged.items():
        assert torch.equal(found[tensor], value), tensor
    labels = [
        json.loads((tmp_path / at / "config.json").read_text()).get("id2label") for at in ("merged", "out")
    ]
    assert labels[0] == labels[1]


def test_weights_of_zero_and_halves_of_one_run(tmp_path: Path) -> None:
    base = load_file("gpt2/model.safetensors")
    none = fold(tmp_path / "none", (0.0,), "language", base="gpt2")
    assert none.keys() == base.keys()
    assert all(torch.equal(none[name], base[name]) for name in base)
    whole = fold(tmp_path / "whole", (1.0,), "lora")
    halves = fold(tmp_path / "halves", (0.5, 0.5), "lora", "lora")
    for name, tensor in whole.items():
        assert torch.equal(halves[name], tensor)


@pytest.mark.slow
def test_two_runs_of_which_one_is_sparse_and_the_head(tmp_path: Path) -> None:
    """Each layer is the base plus the weighted changes; the head is the last one's, or that of head=."""
    base = load_file("model/model.safetensors")
    parts = [fold(tmp_path / name, (1.0,), name) for name in ("lora", "shira")]
    both = fold(tmp_path / "both", (0.5, 2.0), "lora", "shira")
    words = ["method=linear", "weights=0.5,2", "model=model", "runs=lora,shira", "head=lora"]
    said = call("fold", *words, f"out={tmp_path / 'first'}", "--json", folder=RUNS)
    assert said.code == 0, said.err
    first = load_file(tmp_path / "first/model.safetensors")
    for name, tensor in both.items():
        if name.startswith("classifier"):
            assert torch.equal(tensor, parts[1][name])
            assert torch.equal(first[name], parts[0][name])
            continue
        w, a, b = (t[name].double() for t in (base, *parts))
        torch.testing.assert_close(tensor.double(), w + 0.5 * (a - w) + 2 * (b - w), rtol=0, atol=1e-7)
        assert torch.equal(first[name], tensor)
    about = json.loads((tmp_path / "first/finetune/pass.json").read_text())
    (step,) = about["chain"]
    assert (step["verb"], step["head"], step["settings"]["weights"]) == ("fold", 0, [0.5, 2.0])
    assert [parent["method"] for parent in step["parents"]] == ["lora", "shira"]
    assert len({parent["fingerprint"] for parent in step["parents"]}) == 2
    assert str(tmp_path) not in json.dumps(about)
    assert '"lora/' not in json.dumps(about)


@pytest.mark.slow
def test_the_result_keeps_the_head_when_it_is_read(tmp_path: Path) -> None:
    labels = tuple(json.loads(Path("lora/delta/delta.json").read_text())["labels"])
    tensors = fold(tmp_path / "out", (), "lora", "shira")
    read = load(ModelConfig("hf", str(tmp_path / "out")), "image_classification", labels, 0)
    assert not read.new_head
    for name, parameter in read.model.named_parameters():
        if name.startswith("classifier"):
            assert torch.equal(parameter, tensors[name])


@pytest.mark.slow
def test_a_folder_counts_as_the_run_that_it_was_merged_from(tmp_path: Path) -> None:
    merge(Path("lora"), tmp_path / "merged")
    runs = fold(tmp_path / "runs", (0.5, 1.0), "lora", "shira")
    mixed = fold(tmp_path / "mixed", (0.5, 1.0), tmp_path / "merged", "shira")
    for name, tensor in runs.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=0, atol=float(tensor.abs().max()) * 2**-23)
    words = ["method=linear", "model=model", f"runs={tmp_path / 'merged'},shira", f"out={tmp_path / 'said'}"]
    said = call("fold", *words, folder=RUNS)
    assert said.code == 0, said.err
    assert "shira" in said.out
    alone = fold(tmp_path / "alone", (1.0,), tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(alone[name], merged[name]) for name in merged)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_lm", "tiny_vit"])
def test_runs_on_a_compressed_model_keep_its_structures(model: str, tmp_path: Path) -> None:
    words = ["method=svd", "keep=0.8", f"model=builtin:{model}", "out=base"]
    said = call("compress", *words, folder=tmp_path)
    assert said.code == 0, said.err
    settings = ["method=lora", "model=hf", "model.path=base", "train.steps=2", "train.batch_size=4", "run=r"]
    if model == "tiny_lm":
        settings += ["dataset=stdlib", "dataset.length=64", "dataset.train_bytes=4000"]
        settings += [f"dataset.{split}_bytes=2000" for split in ("val", "test", "retention")]
    said = call("train", *settings, "name=n", folder=tmp_path)
    assert said.code == 0, said.err
    said = call(
        "merge", "ckpt=outputs/n/r", "out=merged", "--dtype=float16", "--tolerance=1", folder=tmp_path
    )
    assert said.code == 0, said.err
    said = call("fold", "method=linear", "model=base", "runs=outputs/n/r", "out=out", folder=tmp_path)
    assert said.code == 0, said.err
    merged, found = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "out"))
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], merged[name]) for name in merged)
    structures = [(tmp_path / name / "finetune/structure.json").read_text() for name in ("base", "out")]
    assert structures[0] == structures[1]


class Stopped(BaseException):
    pass


def stop_after(sites: int) -> object:
    done = 0

    def report(line: str) -> None:
        nonlocal done
        done += 1
        if done == sites:
            raise Stopped

    return report


@pytest.mark.slow
def test_a_fold_that_is_stopped_goes_on_and_other_runs_are_refused(tmp_path: Path) -> None:
    whole = fold(tmp_path / "whole", (0.5, 0.5), "lora", "shira")
    request = Request(
        Linear(weights=(0.5, 0.5)), "model", tmp_path / "out", runs=(Path("lora"), Path("shira"))
    )
    for sites in (1, 11):
        with pytest.raises(Stopped):
            run(request, stop_after(sites))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    others = ["method=linear", "weights=0.5,0.5", "model=model", f"out={tmp_path / 'out'}"]
    said = call("fold", *others, "runs=lora,sara", folder=RUNS)
    assert said.code == 2
    assert "an unfinished pass with other settings or of another model" in said.err
    found = fold(tmp_path / "out", (0.5, 0.5), "lora", "shira")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not (tmp_path / ".out.pass").exists()


@pytest.mark.slow
def test_a_head_that_was_damaged_on_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(Linear(), "model", tmp_path / "out", runs=(Path("lora"),))
    write = graft.write_tensor_file

    def write_and_damage(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(graft, "write_tensor_file", write_and_damage)
    with pytest.raises(RunFailed, match=r"grafted/model\.safetensors differs from what was written to it"):
        run(request)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(graft, "write_tensor_file", write)
    run(request)


def write_other_base(folder: Path) -> Path:
    """Write a model that differs from the base of the runs in one value of a norm."""
    folder.mkdir()
    for file in Path("model").glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file("model/model.safetensors")
    tensors["vit.layernorm.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=linear", "model=model"], ["method=linear works on runs of one base. Name them by runs="]),
        (["method=linear", "model=lora", "runs=lora"], ["model=lora is a run, not a model"]),
        (
            ["method=linear", "model=OTHER", "runs=lora"],
            ["runs=lora was trained on another base than model="],
        ),
        (["method=linear", "model=model", "runs=OTHER"], ["differs from model=model in vit.layernorm.bias"]),
        (
            ["method=linear", "model=gpt2", "runs=lora"],
            ["for image_classification, which model=gpt2 cannot do"],
        ),
        (["method=linear", "model=model", "runs=gpt2"], ["GPT2LMHeadModel whose tensors are not those of"]),
        (["method=linear", "model=model", "runs=full"], ["method=full cannot be read layer by layer. Write"]),
        (["method=linear", "model=model", "runs=lora/checkpoints/step-4"], ["step-4 is a checkpoint"]),
        (
            ["method=linear", "weights=1", "model=model", "runs=lora,nowhere", "head=shira"],
            ["weights=1: the number", "runs=nowhere is not the folder of a run", "head=shira is not one of"],
        ),
        (["method=linear", "targets=q", "model=model", "runs=lora"], ["layers that targets leaves out"]),
        (["method=linear", "model=model", "runs=lora", "seed=1"], ["seed=1 has no effect"]),
        (["method=magnitude", "sparsity=0.5", "model=model"], ["is run by `finetune prune`, not by fold"]),
        (["method=linear", "weights=1,x", "runs=lora", "model=model"], ["method.weights.1='x'"]),
        (["method=linear", "weights=inf", "runs=lora", "model=model"], ["method.weights"]),
    ],
)
def test_what_is_refused(words: list[str], expected: list[str], tmp_path: Path) -> None:
    other = str(write_other_base(tmp_path / "other"))
    faults = refuse(tmp_path, *[word.replace("OTHER", other) for word in words])
    assert len(faults) == len(expected), faults
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault


def break_delta(run: Path) -> None:
    file = run / "delta/delta.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def name_another_head(run: Path, name: str, labels: int) -> None:
    file = run / "delta/delta.json"
    about = json.loads(file.read_text()) | {"head": [name], "labels": [str(i) for i in range(labels)]}
    file.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (break_delta, "delta.safetensors is missing, damaged or cut short"),
        (
            lambda run: name_another_head(run, "vit.layernorm.bias", 3),
            "names a head that its change does not",
        ),
        (lambda run: name_another_head(run, "no.such.head", 3), "names a head that its change does not hold"),
        (lambda run: name_another_head(run, "classifier.weight", 2000), "names a head that its change does"),
        (lambda run: (run / "delta/delta.json").write_text("[]"), "does not describe a stored change"),
    ],
)
def test_a_damaged_or_hostile_run_is_refused(
    spoil: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    shutil.copytree("lora", tmp_path / "run")
    spoil(tmp_path / "run")
    (fault,) = refuse(tmp_path, "method=linear", "model=model", f"runs={tmp_path / 'run'}")
    assert expected in fault


def test_a_folder_of_other_shapes_or_labels_is_refused(tmp_path: Path) -> None:
    folder = write_other_base(tmp_path / "other")
    tensors = load_file("model/model.safetensors")
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    save_file(tensors | {name: tensors[name][:-1]}, folder / "model.safetensors", {"format": "pt"})
    (fault,) = refuse(tmp_path, "method=linear", "model=model", f"runs={folder}")
    assert "mlp.fc1.weight as F32 of shape" in fault
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "a", "7": "b", "8": "c"}}
    (folder / "config.json").write_text(json.dumps(config))
    (fault,) = refuse(tmp_path, "method=linear", "model=model", f"runs={folder}")
    assert "id2label" in fault


def test_a_pass_over_one_model_takes_no_runs(tmp_path: Path) -> None:
    words = ["method=magnitude", "sparsity=0.5", "model=model", "runs=lora", "head=lora"]
    faults = refuse(tmp_path, *words, verb="prune")
    assert ["works on one model" in fault for fault in faults] == [True, True]


def test_a_dry_run_names_the_runs_and_writes_nothing(tmp_path: Path) -> None:
    words = [
        "method=linear",
        "model=model",
        "runs=lora,shira",
        f"out={tmp_path / 'out'}",
        "--dry-run",
        "--json",
    ]
    said = call("fold", *words, folder=RUNS)
    assert said.code == 0, said.err
    planned = json.loads(said.out)
    assert [parent["path"] for parent in planned["parents"]] == ["lora", "shira"]
    assert planned["head"] == "shira"
    assert not list(tmp_path.iterdir())
