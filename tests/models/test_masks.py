"""Masks in a model's folder: the format bit by bit, and files that do not belong to the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.config.settings import ModelConfig
from finetune.core.zeros import layers_with_zeros, stored_mask
from finetune.errors import ConfigError
from finetune.models.load import Base, load
from finetune.models.masks import FILE, MANIFEST, pack_mask, unpack_mask
from finetune.passes.magnitude import Magnitude
from finetune.storage import manifest
from finetune.testing.sessions import tiny

from ..support.plain_runs import tokenizer

NAME = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned GPT-2, whose layers are stored transposed."""
    root = tmp_path_factory.mktemp("masks")
    tiny("gpt2").save_pretrained(root / "dense")
    tokenizer().save_pretrained(root / "dense")
    run(Request(Magnitude(sparsity=0.5), str(root / "dense"), root / "pruned"))
    return root / "pruned"


def opened(folder: Path, zeros: str | None = None) -> Base:
    return load(ModelConfig("hf", str(folder), zeros=zeros), "causal_lm", (), 0)  # type: ignore[arg-type]


def test_the_file_says_bit_by_bit_what_is_pruned(pruned: Path) -> None:
    weights, masks = load_file(pruned / "model.safetensors"), load_file(pruned / FILE)
    assert len(masks) == 8
    for name, mask in masks.items():
        rows, columns = weights[name].shape
        assert mask.dtype == torch.uint8
        assert mask.shape == (rows, (columns + 7) // 8)
        for row in (0, rows - 1):
            for column in range(columns):
                live = mask[row, column // 8].item() >> (7 - column % 8) & 1
                assert live == (weights[name][row, column] != 0)
    listed = json.loads((pruned / MANIFEST).read_text())["files"]
    assert set(listed) == {"masks.safetensors", "pass.json"}


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 17])
def test_packing_is_undone(columns: int) -> None:
    pruned = torch.rand(5, columns) < 0.5
    packed = pack_mask(pruned)
    assert torch.equal(unpack_mask(packed, columns), pruned)
    if columns % 8:
        with pytest.raises(ValueError, match=r"behind the end"):
            unpack_mask(packed | 1, columns)


def test_a_loaded_model_holds_them_unless_told_otherwise(pruned: Path, tmp_path: Path) -> None:
    for zeros in (None, "keep"):
        base = opened(pruned, zeros)
        found = dict(layers_with_zeros(base.model))
        assert len(found) == 8
        for layer in found.values():
            mask = stored_mask(layer)
            assert mask is not None
            assert torch.equal(mask, layer.get_parameter("weight") == 0)
        assert any("stay 0, 50.0%" in note for note in base.notes)
    assert not list(layers_with_zeros(opened(pruned, "free").model))
    dense = pruned.parent / "dense"
    assert not list(layers_with_zeros(opened(dense).model))
    with pytest.raises(ConfigError, match=r"model.zeros=keep: .* has no finetune/masks.safetensors"):
        opened(dense, "keep")
    with pytest.raises(ValueError, match=r"model.zeros=keep: model.init=random"):
        ModelConfig("hf", str(pruned), init="random", zeros="keep")
    assert opened(pruned, "keep").model.state_dict().keys() == opened(dense).model.state_dict().keys()


def test_zeros_that_no_mask_names_are_free(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pruned, folder)
    shutil.rmtree(folder / "finetune")
    assert not list(layers_with_zeros(opened(folder).model))


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
HOSTILE: dict[str, tuple[Change, str]] = {
    "unknown name": (lambda m: m | {"h.9.weight": m[NAME].clone()}, "the weights have no such tensor"),
    "a bias": (
        lambda m: m | {"transformer.h.0.mlp.c_fc.bias": torch.zeros(1, 16, dtype=torch.uint8)},
        "the weight has the shape",
    ),
    "an embedding": (
        lambda m: m | {"transformer.wte.weight": torch.full((40, 4), 255, dtype=torch.uint8)},
        "belongs to no linear layer",
    ),
    "another shape": (lambda m: m | {NAME: m[NAME][:-1].clone()}, "the weight has the shape"),
    "another type": (lambda m: m | {NAME: m[NAME].view(torch.int8)}, "is I8 of shape"),
    "of another model": (lambda m: m | {NAME: ~m[NAME]}, "is not of these weights"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_masks_that_do_not_belong_to_the_weights_are_refused(pruned: Path, tmp_path: Path, kind: str) -> None:
    change, words = HOSTILE[kind]
    folder = tmp_path / "copy"
    shutil.copytree(pruned, folder)
    save_file(change(load_file(folder / FILE)), folder / FILE)
    (folder / MANIFEST).unlink()
    manifest.write(folder / "finetune")
    with pytest.raises(ConfigError) as caught:
        opened(folder)
    assert len(caught.value.faults) == 1
    assert words in str(caught.value)
    assert "model.zeros=free" in str(caught.value)
    opened(folder, "free")
    if kind == "an embedding":
        return  # a pass does not look at the model's modules, and nothing is pruned there
    with pytest.raises(ConfigError) as caught:
        run(Request(Magnitude(sparsity=0.6), str(folder), tmp_path / "out"))
    assert words in str(caught.value)
    assert "model.zeros" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_file_that_is_lost_or_damaged_is_refused(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pruned, folder)
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"SHA-256 is not that of finetune/manifest.json"):
        opened(folder)
    (folder / MANIFEST).unlink()
    (folder / FILE).write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"its tensors have"):
        opened(folder)
    shutil.copy(pruned / MANIFEST, folder / MANIFEST)
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match=r"lists it, and it is missing"):
        opened(folder)
    (folder / MANIFEST).write_text('{"files": 3}')
    with pytest.raises(ConfigError, match=r"should be a mapping"):
        opened(folder)
