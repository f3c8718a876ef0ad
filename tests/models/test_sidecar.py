"""Folders whose layers are stored as structures: what is read, and what a stranger's file cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.config import plugins
from finetune.config.settings import ModelConfig
from finetune.core.site import find_sites
from finetune.errors import ConfigError
from finetune.models.load import load, original_parameters, save
from finetune.models.sidecar import FILE, fit, multiply_out, replace_module
from finetune.models.stored import fingerprint
from finetune.passes.svd import Svd
from finetune.structures.low_rank import LowRank
from finetune.testing import new
from finetune.testing.sessions import tiny

IDS = torch.arange(4, 10)[None]
QUERY = "model.layers.0.self_attn.q_proj"


def compress(folder: Path, out: Path, rank: int = 4, targets: tuple[str, ...] = ("all",)) -> Path:
    """Write the model of a folder with low-rank layers."""
    task = "image_classification" if "ViT" in folder.name else "causal_lm"
    labels = tuple("abcde") if "ViT" in folder.name else ()
    base = load(ModelConfig("hf", str(folder)), task, labels, 0)
    for site in find_sites(base.model, targets):
        structure = LowRank(site.shape[1], site.shape[0], site.has_bias, min(rank, *site.shape))
        replace_module(base.model, site.name, fit(structure, site.module))
    save(base.model, base.processor, out)
    return out


@pytest.fixture
def small(llama: Path, tmp_path: Path) -> Path:
    return compress(llama, tmp_path / "small")


def read(folder: Path, **options: Any) -> Any:
    return load(ModelConfig("hf", str(folder), **options), "causal_lm", (), 0)


def faults(folder: Path, **options: Any) -> list[str]:
    """Return the faults of a folder, which must be found before any module of a structure is built."""
    with pytest.raises(ConfigError) as error:
        read(folder, **options)
    named = f"model.path={folder}: "
    return [fault.removeprefix(named) for fault in error.value.faults]


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entries of the file of structures in place."""
    content = json.loads((folder / FILE).read_text())
    change(content["structures"])
    (folder / FILE).write_text(json.dumps(content))


def test_everything_but_the_structures_is_as_transformers_reads_it(llama: Path, tmp_path: Path) -> None:
    """At full rank, the logits agree; buffers that are not stored and tied weights are right."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    base = read(compress(llama, tmp_path / "full", 99))
    assert type(base.model) is transformers.LlamaForCausalLM
    assert torch.allclose(base.model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5)
    assert torch.equal(base.model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(base.model.model.norm.weight, plain.model.norm.weight)
    assert json.loads((tmp_path / "full/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_multiplied_out_it_is_a_model_of_the_plain_class(name: str, folder: Any, text: Any) -> None:
    """GPT-2 stores its weights transposed, and has biases."""
    if name.startswith("GPT2"):
        model = tiny("gpt2")
    else:
        model = read(folder(name, {}, **{**text, "pad_token_id": None})).model
    plain_names = set(model.state_dict())
    for site in find_sites(model, ("all",)):
        structure = LowRank(site.shape[1], site.shape[0], site.has_bias, 4)
        replace_module(model, site.name, fit(structure, site.module))
    expected = model(input_ids=IDS).logits
    multiply_out(model)
    assert set(model.state_dict()) == plain_names
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)


def test_tied_weights_stay_tied(folder: Any, text: dict[str, Any], tmp_path: Path) -> None:
    tied = folder("LlamaForCausalLM", {}, **{**text, "pad_token_id": None}, tie_word_embeddings=True)
    model = read(compress(tied, tmp_path / "tied")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_a_plain_folder_is_read_as_before(llama: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    found = read(llama).model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_dtype_fingerprint_and_originals(small: Path) -> None:
    assert {p.dtype for p in read(small, dtype="bfloat16").model.parameters()} == {torch.bfloat16}
    base = read(small)
    base.fingerprint = fingerprint(base.model, ())
    found = dict(original_parameters(base))
    assert base.stored is not None  # one tensor at a time
    for name, parameter in base.model.named_parameters():
        assert torch.equal(found[name], parameter)


def test_a_head_is_kept_and_a_new_one_is_that_of_the_plain_model(vit: Path, tmp_path: Path) -> None:
    """The names of ViT's tensors on disk are other ones than in the model."""
    labels = tuple("abcde")
    small = compress(vit, tmp_path / "small-ViT", 4)
    assert json.loads((small / "config.json").read_text())["id2label"] == dict(
        zip("01234", "abcde", strict=True)
    )
    stored = load_file(small / "model.safetensors")
    for layer in json.loads((small / FILE).read_text())["structures"]:
        assert f"{layer}.first.weight" in stored
    task = "image_classification"
    kept = load(ModelConfig("hf", str(small)), task, labels, 0)
    assert not kept.new_head
    assert torch.equal(kept.model.classifier.weight, stored["classifier.weight"])
    turned = load(ModelConfig("hf", str(small)), task, labels[::-1], 0)
    assert torch.equal(turned.model.classifier.weight, stored["classifier.weight"].flip(0))
    config = {"head": "new"}
    new_head = load(ModelConfig("hf", str(small), **config), task, ("x", "y"), 3)
    of_plain = load(ModelConfig("hf", str(vit), **config), task, ("x", "y"), 3)
    assert torch.equal(new_head.model.classifier.weight, of_plain.model.classifier.weight)


def test_names_are_those_of_the_files_that_are_written(folder: Any, text: Any, tmp_path: Path) -> None:
    """A checkpoint of a body alone names its layers without the prefix that a model with a head writes."""
    body = folder("BertModel", {"pad_token": "<pad>"}, **text)
    run(Request(Svd(rank=4), str(body), tmp_path / "small"))
    base = load(ModelConfig("hf", str(tmp_path / "small")), "sequence_classification", ("a", "b"), 0)
    save(base.model, base.processor, tmp_path / "saved")
    layers = [json.loads((tmp_path / name / FILE).read_text())["structures"] for name in ("small", "saved")]
    assert {f"bert.{layer}": entry for layer, entry in layers[0].items()} == layers[1]
    again = load(ModelConfig("hf", str(tmp_path / "saved")), "sequence_classification", ("a", "b"), 0)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)


def test_random_weights_are_those_of_the_plain_model_fitted(small: Path, llama: Path) -> None:
    drawn, plain = read(small, init="random").model, read(llama, init="random").model
    layer, other = drawn.get_submodule(QUERY), plain.get_submodule(QUERY)
    expected = fit(layer.structure, other).state_dict()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert torch.equal(drawn.lm_head.weight, plain.lm_head.weight)
    (small / "model.safetensors").unlink()
    assert torch.equal(read(small, init="random").model.get_submodule(QUERY).weight, layer.weight)


def test_random_weights_of_another_width_do_not_fit(small: Path) -> None:
    found = faults(small, init="random", config={"hidden_size": 8, "num_attention_heads": 1})
    assert "the layer that config.json describes has 8, 8 and False" in " ".join(found)


ENTRY = {"structure": "low_rank", "inputs": 16, "outputs": 16, "bias": False, "rank": 4}


@pytest.mark.parametrize(
    ("layer", "entry", "reason"),
    [
        (QUERY, {**ENTRY, "structure": "os.system"}, "structure='os.system' is not known. Known: low_rank."),
        (QUERY, {**ENTRY, "structure": "low_rnk"}, "Did you mean 'low_rank'?"),
        (QUERY, {**ENTRY, "rank": 2**40}, "rank=1099511627776 is not a size from 1 to 2,147,483,647."),
        (QUERY, {**ENTRY, "rank": 2**31 - 1}, "its rank 2147483647 is more than 16."),
        (QUERY, {**ENTRY, "rank": 0}, "rank=0 is not a size from 1"),
        (QUERY, {**ENTRY, "rank": -4}, "rank=-4 is not a size from 1"),
        (QUERY, {**ENTRY, "rank": True}, "rank should be a int and is True."),
        (QUERY, {**ENTRY, "rank": 4.0}, "rank should be a int and is 4.0."),
        (QUERY, {**ENTRY, "bias": 0}, "bias should be a bool and is 0."),
        (QUERY, {**ENTRY, "file": "/etc/passwd"}, "a low_rank has the sizes inputs, outputs, bias, rank"),
        (QUERY, {"structure": "low_rank"}, "a low_rank has the sizes inputs, outputs, bias, rank"),
        (QUERY, {**ENTRY, "rank": 5}, "should have the tensors first.weight [5, 16], second.weight [16, 5]"),
        (QUERY, {**ENTRY, "bias": True}, "second.bias [16]"),
        (f"{QUERY}.first", ENTRY, f"it lies inside '{QUERY}', which is named as well."),
        ("model.layers.9.self_attn.q_proj", ENTRY, "and the weights have none."),
        ("../model", ENTRY, "'../model': this is not the dotted name of a module."),
        ("model..layers", ENTRY, "this is not the dotted name of a module."),
        ("", ENTRY, "this is not the dotted name of a module."),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(
    small: Path, layer: str, entry: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(small, lambda entries: entries.update({layer: entry}))
    monkeypatch.setattr(LowRank, "build", lambda self: pytest.fail("a module was built"))
    (fault,) = faults(small)
    assert fault.startswith(FILE)
    assert reason in fault


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10_000 + "]" * 10_000, "cannot be read (it is nested more than 64 levels deep)"),
        ("{}", "cannot be read (it has no structures)"),
        ('{"structures": {"a": 5}}', "cannot be read (structures.a should be a mapping and is 5)"),
        ('{"structures": {"a": {"structure": 5}}}', "structures.a.structure should be a str and is 5"),
        ('{"format": 7, "layers": {}}', "has format 7"),
        ('{"structures": NaN}', "NaN is not JSON"),
    ],
)
def test_a_file_that_is_no_list_of_structures_is_refused(small: Path, text: str, reason: str) -> None:
    (small / FILE).write_text(text)
    (fault,) = faults(small)
    assert reason in fault


def test_every_fault_is_named_and_their_number_is_bounded(small: Path) -> None:
    edit(small, lambda entries: entries.update({f"x{number}": {"structure": "x"} for number in range(99)}))
    found = faults(small)
    assert len(found) == 21
    assert found[-1] == "There are 79 more faults of this kind."


def add_tensors(folder: Path, layer: str, inputs: int, outputs: int) -> None:
    """Store the tensors of a low-rank layer that the model does not have, and name it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {f"{layer}.first.weight": torch.ones(4, inputs)}
    tensors |= {f"{layer}.second.weight": torch.ones(outputs, 4)}
    tensors.pop(f"{layer}.weight", None)
    save_file(tensors, file, {"format": "pt"})
    edit(folder, lambda entries: entries.update({layer: {**ENTRY, "inputs": inputs, "outputs": outputs}}))


@pytest.mark.parametrize(
    ("layer", "inputs", "outputs", "reason"),
    [
        ("model.layers.0.no_proj", 16, 16, "is no linear layer of the model"),
        ("model.norm", 16, 16, "is no linear layer of the model"),
        ("model.embed_tokens", 16, 20, "is no linear layer of the model"),
        ("lm_head", 16, 20, "belongs to the model's head, which has no structures"),
        (
            QUERY,
            16,
            24,
            "has inputs=16, outputs=24 and bias=False; the layer that config.json describes has 16",
        ),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_refused(
    small: Path, layer: str, inputs: int, outputs: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tensors(small, layer, inputs, outputs)
    monkeypatch.setattr(LowRank, "build", lambda self: pytest.fail("a module was built"))
    (fault,) = faults(small)
    assert reason in fault


def test_tensors_of_another_type_or_beside_the_structure_are_refused(small: Path) -> None:
    tensors = load_file(small / "model.safetensors")
    tensors[f"{QUERY}.first.weight"] = tensors[f"{QUERY}.first.weight"].to(torch.int8)
    tensors[f"{QUERY}.weight"] = torch.ones(16, 16)
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    first, second = faults(small)
    assert f"{QUERY}.first.weight is stored as I8" in first
    assert "weight [16, 16]" in second


def test_a_structure_of_a_plug_in_needs_the_plug_in(small: Path, tmp_path: Path) -> None:
    new.write("structure", "repeating", new.DEFAULT_FAMILY, tmp_path / "plug")
    stored = load_file(small / "model.safetensors")
    layer = "model.layers.1.self_attn.q_proj"
    del stored[f"{layer}.first.weight"], stored[f"{layer}.second.weight"]
    stored[f"{layer}.rows.weight"] = torch.randn(8, 16)
    save_file(stored, small / "model.safetensors", {"format": "pt"})
    entry = {"structure": "repeating", "inputs": 16, "outputs": 16, "bias": False, "repeats": 2}
    edit(small, lambda entries: entries.update({layer: entry}))
    (fault,) = faults(small)
    assert "structure='repeating' is not known" in fault
    plugins.load([tmp_path / "plug"])
    try:
        weight = read(small).model.get_submodule(layer).weight
        assert torch.equal(weight, stored[f"{layer}.rows.weight"].repeat(2, 1))
    finally:
        plugins.unload()
