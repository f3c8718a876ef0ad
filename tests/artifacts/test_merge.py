"""Merged folders against sums made by hand in float64 from the files of base and change.

Unmerged folders have the base's own bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts import merge as module
from finetune.artifacts import verify
from finetune.artifacts.merge import ABOUT, merge
from finetune.artifacts.reopen import rebuild
from finetune.artifacts.unmerge import unmerge
from finetune.cli import app as cli
from finetune.errors import ConfigError
from finetune.storage import manifest
from finetune.storage.run_folder import RunFolder

from ..support.plain_runs import Runs

WORDS = {"lora": ["method=lora"], "shira": ["method=shira", "sparsity=0.9"]}
BF16 = ["train.precision=bf16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def weights(folder: Path) -> dict[str, Tensor]:
    """A folder's parameters by the names that they have in the model, as transformers reads them."""
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return {
        name: parameter.detach()
        for name, parameter in kind.from_pretrained(folder, dtype="auto").named_parameters()
    }


def by_hand(run: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> base plus change in float64, from the files alone.

    The change is LoRA's product in float32 at alpha / rank = 2, or sparse entries.
    """
    delta = load_file(run / "delta" / "delta.safetensors")
    if "method.bank.values" not in delta:
        layers = {key.split(".")[1] for key in delta if key.startswith("method.")}
        changes = {
            layer.replace("/", "."): (2 * (delta[f"method.{layer}.b"] @ delta[f"method.{layer}.a"])).double()
            for layer in layers
        }
        return {layer: base[f"{layer}.weight"].double() + change for layer, change in changes.items()}
    code, place, shift, positions = delta["method.bank.gaps"].tolist(), 0, 0, list[int]()
    gap = 0
    for byte in code:
        gap, shift = gap + ((byte & 127) << shift), shift + 7
        if byte < 128:
            place += gap
            positions.append(place)
            gap = shift = 0
    names = [name for name in base if name.endswith(".weight") and base[name].ndim == 2 and "layers" in name]
    names.sort(key=lambda n: (int(n.split("layers.")[1].split(".")[0]), ORDER.index(n.split(".")[-2])))
    flat = torch.cat([base[name].double().reshape(-1) for name in names])
    flat[torch.tensor(positions)] += delta["method.bank.values"].double()
    parts = flat.split([base[name].numel() for name in names])
    return {
        name.removesuffix(".weight"): part.view(base[name].shape)
        for name, part in zip(names, parts, strict=True)
    }


ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", "float32"),
        ("lora", "bfloat16"),
        ("lora", "float16"),
        ("shira", "float32"),
        ("shira", "bfloat16"),
    ],
)
def test_each_weight_is_the_exact_sum_rounded_once(
    runs: Runs, tmp_path: Path, method: str, dtype: str
) -> None:
    run, out = runs("vit", *WORDS[method]), tmp_path / "out"
    told = merge(run, out, dtype)
    merged, base = weights(out), weights(runs.base("vit"))
    exact, kind = by_hand(run, base), getattr(torch, dtype)
    head = load_file(run / "delta" / "delta.safetensors")
    rows = {row["layer"]: row for row in told["layers"]}
    assert len(exact) == 12
    for layer, weight in exact.items():
        rounded, row = merged[f"{layer}.weight"], rows[layer]
        assert rounded.dtype == kind
        assert torch.equal(rounded, weight.to(kind))
        error = rounded.double() - weight
        assert row["largest_error"] == float(error.abs().max())
        assert row["relative_error"] == pytest.approx(float(error.norm() / weight.norm()))
        assert row["error_of_change"] == pytest.approx(
            float(error.norm() / (weight - base[f"{layer}.weight"].double()).norm())
        )
        assert row["relative_error"] < {"float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    assert torch.equal(merged["classifier.weight"], head["head.classifier/weight"].to(kind))
    rest = set(base) - {f"{layer}.weight" for layer in exact} - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(merged[name], base[name].to(kind)) for name in rest)
    assert json.loads((out / ABOUT).read_text())["layers"] == told["layers"]


@pytest.mark.parametrize(
    ("method", "limit", "dtype"),
    [
        ("snell", 1e-6, "float32"),
        ("full", 0.0, "float32"),
        ("peft", 1e-6, "float32"),
        ("peft", 5e-3, "float16"),
    ],
)
def test_the_written_folder_answers_as_the_run_did(
    runs: Runs, tmp_path: Path, method: str, limit: float, dtype: str
) -> None:
    """The oracle: transformers reads the folder, and the run's own predictions.parquet."""
    import transformers

    from finetune.data.encode import collate

    run, out = runs("vit", f"method={method}"), tmp_path / "out"
    told = merge(run, out, dtype)
    assert told["largest_logit_difference"] <= limit
    plain = transformers.AutoModelForImageClassification.from_pretrained(out, dtype=getattr(torch, dtype))
    data = rebuild(run).data["test"]
    pixels = collate([data[i] for i in range(len(data))]).inputs["pixel_values"]
    with torch.no_grad():
        logits = plain(pixel_values=pixels.to(plain.dtype)).logits.float()
    rows = pq.read_table(run / "predictions.parquet").to_pylist()
    same = sum(int(a) == row["prediction"] for a, row in zip(logits.argmax(-1), rows, strict=True)) / len(
        rows
    )
    assert told["same_predictions"] == same
    if dtype == "float32":
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(logits.softmax(-1).max(-1).values.double(), scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("words", [["method=ia3"], ["method=lofit", "method.share=0.5"]])
@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_edits_that_fold_are_in_the_written_weights(
    runs: Runs, tmp_path: Path, kind: str, words: list[str]
) -> None:
    """Merging compares the logits of the folder with those of the run."""
    run, out = runs(kind, *words), tmp_path / "out"
    told = merge(run, out)
    assert told["largest_logit_difference"] < 1e-5
    merged, base = weights(out), weights(runs.base(kind))
    changed = set()
    for name, tensor in base.items():
        if not torch.equal(merged[name], tensor):
            changed.add(name)
    assert any("classifier" not in name for name in changed)
    assert changed <= {row["layer"] for row in told["layers"]}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["method=adapter"], "method=adapter cannot be merged: it changes more than weights"),
        (["method=lofit", "method.share=0.5"], "attaches offsets .* before a projection without a bias"),
    ],
)
def test_edits_that_no_weight_can_hold_are_refused_with_nothing_written(
    runs: Runs, tmp_path: Path, words: list[str], why: str
) -> None:
    run = runs("llama", *words)
    with pytest.raises(ConfigError, match=why):
        merge(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(verify._Skipped, match="cannot be merged"):
        verify._check_merge(RunFolder(run), print)


@pytest.mark.parametrize("method", [["method=full"], ["method=lora", "method.targets=[all]"]])
def test_tied_embeddings_stay_one_tensor_that_both_ends_see(
    runs: Runs, tmp_path: Path, method: list[str]
) -> None:
    import transformers

    run, out = runs("gpt2", *method), tmp_path / "out"
    assert merge(run, out)["largest_logit_difference"] < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.lm_head.weight is again.transformer.wte.weight
    moved = not torch.equal(
        again.lm_head.weight,
        transformers.AutoModelForCausalLM.from_pretrained(runs.base("gpt2")).lm_head.weight,
    )
    assert moved == (method == ["method=full"])
    assert again.config.tie_word_embeddings
    assert again.config.use_cache


def test_a_base_in_bfloat16_is_merged_wide_and_rounded_once(runs: Runs, tmp_path: Path) -> None:
    run = runs("llama", "method=lora", *BF16, dtype="bfloat16")
    base = weights(runs.base("llama", "bfloat16"))
    for dtype in ("bfloat16", "float32"):
        merge(run, tmp_path / dtype, dtype)
        merged = weights(tmp_path / dtype)
        for layer, weight in by_hand(run, base).items():
            assert torch.equal(merged[f"{layer}.weight"], weight.to(getattr(torch, dtype)))


def test_nothing_is_written_above_the_tolerance(runs: Runs, tmp_path: Path) -> None:
    run = runs("vit", "method=lora")
    with pytest.raises(
        ConfigError,
        match=r"differ from the unmerged one's by .*, more than --tolerance 1e-05; "
        r"nothing was written. .*% of the",
    ):
        merge(run, tmp_path / "out", "bfloat16", 1e-5)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"out=.*file/out cannot be written: "):
        merge(run, tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_written_file_itself_is_tested(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that loses one entry of one weight, and one that leaves a tensor out."""
    write = module.save

    def loses(entry: bool, model: Any, processor: Any, out: Path) -> None:
        write(model, processor, out)
        tensors = read_tensors(out)
        name = next(name for name, t in tensors.items() if t.ndim == 2 and "layer" in name)
        if entry:
            tensors[name][0, 0] += 1e-3
        else:
            del tensors[name]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    for entry, words in (
        (True, "has other weights when it is read back .first: vit.layers"),
        (False, "not hold the whole model"),
    ):
        monkeypatch.setattr(module, "save", lambda *args, entry=entry: loses(entry, *args))
        with pytest.raises(ConfigError, match=words):
            merge(runs("vit", "method=lora"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "words", "dtypes"),
    [
        ("vit", ["method=shira", "sparsity=0.9"], ("float32", None)),
        ("vit", ["method=bitfit"], ("float32", None)),
        ("vit", ["method=snell"], ("float32", None)),
        ("llama", ["method=shira", "sparsity=0.95"], ("float32", None)),
        ("gpt2", ["method=shira", "sparsity=0.95"], ("float32", None)),
        ("llama", ["method=shira", "sparsity=0.9", *BF16], ("bfloat16", None)),
        ("llama", ["method=shira", "sparsity=0.9", *BF16], ("bfloat16", "float32")),
    ],
)
def test_unmerged_is_the_base_to_the_byte(
    runs: Runs, tmp_path: Path, kind: str, words: list[str], dtypes: tuple[str, str | None]
) -> None:  # fmt: skip
    run, (base_dtype, dtype) = runs(kind, *words, dtype=dtypes[0]), dtypes
    base = read_tensors(runs.base(kind, base_dtype))
    assert merge(run, tmp_path / "merged", dtype)["unmerge"] == "possible"
    assert not all(
        torch.equal(t, read_tensors(tmp_path / "merged")[name].to(t.dtype))
        for name, t in base.items()
        if not name.startswith("classifier")
    )
    unmerge(tmp_path / "merged", tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert back.keys() == base.keys()
    for name, tensor in base.items():
        if not name.startswith("classifier"):  # the run's head was new
            assert back[name].dtype == tensor.dtype
            assert (
                back[name].view(torch.uint8).numpy().tobytes() == tensor.view(torch.uint8).numpy().tobytes()
            ), name
    if kind != "vit":
        assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
            runs.base(kind, base_dtype) / "tokenizer.json"
        ).read_bytes()


@pytest.mark.parametrize(
    ("words", "dtype"),
    [(["method=lora"], None), (["method=full"], None), (["method=shira", "sparsity=0.9"], "bfloat16")],
)
def test_where_the_originals_would_be_the_base_unmerging_says_so(
    runs: Runs, tmp_path: Path, words: list[str], dtype: str | None
) -> None:
    merge(runs("vit", *words), tmp_path / "merged", dtype)
    assert sorted(p.name for p in (tmp_path / "merged" / "finetune").iterdir()) == [
        "manifest.json",
        "merge.json",
    ]
    with pytest.raises(
        ConfigError,
        match=r"cannot be unmerged: nearly every entry differs from the base; "
        r"the base itself is .*vit-float32",
    ):
        unmerge(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_merged_folder_that_was_changed_is_refused(runs: Runs, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    merge(runs("vit", "method=shira", "sparsity=0.9"), whole)

    def refused(words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            unmerge(tmp_path / "merged", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        shutil.rmtree(tmp_path / "merged")
        shutil.copytree(whole, tmp_path / "merged")

    refused("merge.json cannot be read") if shutil.copytree(runs.base("vit"), tmp_path / "merged") else None
    tensors = read_tensors(tmp_path / "merged")
    tensors["vit.layernorm.bias"][0] += 1
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    refused("cannot be unmerged: it was changed after merging")
    originals = tmp_path / "merged" / "finetune" / "originals.safetensors"
    originals.write_bytes(originals.read_bytes()[:-1])
    refused("originals.safetensors is damaged or cut short")
    for damage in ("bounds", "name", "type"):
        content = load_file(originals)
        key = next(k for k in content if k.startswith("values/"))
        if damage == "bounds":
            content[key.replace("values", "gaps")][0] += 100
            content[key.replace("values", "gaps")] = torch.cat(
                [content[key.replace("values", "gaps")][:-1], torch.tensor([127], dtype=torch.uint8)]
            )
        elif damage == "name":
            content["values/nowhere"] = content.pop(key)
        else:
            content[key] = content[key].double()
        save_file(content, originals)
        manifest.write(originals.parent)
        refused("does not fit the model beside it|cannot be unmerged")
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"short")
    refused("model.safetensors")
    about = tmp_path / "merged" / ABOUT
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 99}))
    refused("has format 99")


def test_the_commands(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return (int(ended.code or 0), *capsys.readouterr())
        raise AssertionError("main always exits")

    run, merged = runs("vit", "method=shira", "sparsity=0.9"), tmp_path / "a=b"
    code, out, _ = say("merge", f"ckpt={run}", f"out={merged}", "--dtype", "float32", "--json")
    assert (code, json.loads(out)["unmerge"]) == (0, "possible")
    code, out, _ = say("merge", f"ckpt={run}", f"out={tmp_path / 'half'}", "--dtype", "bf16")
    assert code == 0
    assert "bfloat16" in out
    assert "layers: 17, each in" in out
    code, out, _ = say("merge", "--unmerge", f"ckpt={merged}", f"out={tmp_path / 'back'}")
    assert (code, "entries_put_back" in out) == (0, True)
    code, _, err = say("merge", "--unmerge", "--dtype", "float16", f"ckpt={merged}", f"out={tmp_path / 'x'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "--dtype=float16 has no effect with merge --unmerge" in err
    assert say("merge", f"ckpt={run}", f"out={tmp_path / 'x'}", "--dtype", "int8")[0] == 2
    assert not (tmp_path / "x").exists()
