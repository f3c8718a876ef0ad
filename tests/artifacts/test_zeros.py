"""A pruned folder through training, merging, evaluation and further passes: the same entries stay 0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts import passes
from finetune.artifacts.export import export
from finetune.artifacts.merge import merge
from finetune.artifacts.pass_subject import Request
from finetune.artifacts.passes import run
from finetune.artifacts.reopen import evaluate, rebuild
from finetune.artifacts.unmerge import unmerge
from finetune.config.settings import ModelConfig
from finetune.core.zeros import layers_with_zeros
from finetune.errors import ConfigError
from finetune.models.load import load
from finetune.models.masks import FILE, MANIFEST, unpack_mask
from finetune.passes.linear import Linear
from finetune.passes.magnitude import Magnitude
from finetune.passes.svd import Svd
from finetune.storage import manifest

from ..support.plain_runs import Runs

HALF = Magnitude(sparsity=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pruned(runs: Runs) -> Path:
    out = runs.folder / "pruned"
    run(Request(HALF, str(runs.base("llama")), out))
    return out


def read_pattern(folder: Path) -> dict[str, Tensor]:
    """Return which entries the masks prune. They are the zeros of the weights, with the bits of 0."""
    weights, found = load_file(folder / "model.safetensors"), dict[str, Tensor]()
    for name, packed in load_file(folder / FILE).items():
        found[name] = unpack_mask(packed, weights[name].shape[1])
        assert not weights[name][found[name]].view(torch.uint8).any()
        assert (weights[name][~found[name]] != 0).all()
    return found


def same_pattern(folder: Path, other: Path) -> None:
    one, two = read_pattern(folder), read_pattern(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())


def test_a_second_pass_adds_to_the_masks(pruned: Path, tmp_path: Path) -> None:
    whole = run(Request(Magnitude(sparsity=0.75, targets=("mlp",)), str(pruned), tmp_path / "second"))
    first, second = read_pattern(pruned), read_pattern(tmp_path / "second")
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert (second[name] | ~mask).all()  # what was pruned stays so
        share = 0.75 if "mlp" in name else 0.5
        assert int(second[name].sum()) == int(share * mask.numel())
    assert whole["held"] == sum(int(m.sum()) for n, m in second.items() if "mlp" in n)
    run(Request(Magnitude(sparsity=0.25), str(pruned), tmp_path / "less"))
    same_pattern(tmp_path / "less", pruned)


def test_a_pass_that_gives_a_pruned_entry_a_value_frees_it(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def regrow(self: Any, site: Any, weight: Tensor, statistics: Any) -> Tensor:
        grown = weight.clone()
        grown[0] = 1.0
        return grown

    monkeypatch.setattr(Magnitude, "tensor", regrow)
    about = run(Request(HALF, str(pruned), tmp_path / "grown"))
    before, after = read_pattern(pruned), read_pattern(tmp_path / "grown")
    for name, mask in before.items():
        assert not after[name][0].any()
        assert torch.equal(after[name][1:], mask[1:])
    assert sum(row["freed"] for row in about["sites"]) == sum(int(mask[0].sum()) for mask in before.values())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8))])
def test_a_mask_that_was_cut_short_is_written_again(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    more = Magnitude(sparsity=0.7)
    run(Request(more, str(pruned), tmp_path / "whole"))
    overwrite, done = passes.TensorFile.overwrite, 0

    def cut_short(file: Any, name: str, tensor: Tensor) -> None:
        nonlocal done
        done += 1
        if done == at:
            overwrite(file, name, torch.zeros_like(tensor))
            raise Killed
        overwrite(file, name, tensor)

    monkeypatch.setattr(passes.TensorFile, "overwrite", cut_short)
    with pytest.raises(Killed):
        run(Request(more, str(pruned), tmp_path / "out"))
    monkeypatch.undo()
    run(Request(more, str(pruned), tmp_path / "out"))
    for file in ("model.safetensors", FILE):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


WORDS = {
    "lora": ("method=lora", "method.rank=2"),
    "full": ("method=full",),
    "spiel": ("method=spiel", "sparsity=0.8", "method.window=1", "method.schedule.every=2"),
    "lt_sft": ("method=lt_sft", "sparsity=0.8", "method.schedule.dense=0.4"),
}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "lora")) for name in WORDS]
)
def test_a_pruned_folder_tuned_in_a_second_phase_keeps_its_zeros(
    runs: Runs, pruned: Path, tmp_path: Path, method: str
) -> None:
    tuned = runs("llama", f"model.path={pruned}", *WORDS[method])
    result = json.loads((tuned / "result.json").read_text())
    assert result["zeros"] == pytest.approx(0.5)
    assert result["suspect"] == []
    merge(tuned, tmp_path / "merged")
    same_pattern(tmp_path / "merged", pruned)
    manifest.check(tmp_path / "merged" / "finetune")
    assert evaluate(tuned)["metrics"]["test"] == pytest.approx(result["metrics"]["test"])


@pytest.mark.slow
@pytest.mark.parametrize("method", WORDS)
def test_a_merged_folder_is_tuned_again_or_freed(
    runs: Runs, pruned: Path, tmp_path: Path, method: str
) -> None:
    merge(runs("llama", f"model.path={pruned}", *WORDS[method]), tmp_path / "merged")
    again = runs("llama", f"model.path={tmp_path / 'merged'}", "method=lora", f"seed={len(method)}")
    merge(again, tmp_path / "again")
    same_pattern(tmp_path / "again", pruned)
    free = runs("llama", f"model.path={tmp_path / 'merged'}", "method=lora", "model.zeros=free")
    assert "zeros" not in json.loads((free / "result.json").read_text())
    merge(free, tmp_path / "free")
    assert not (tmp_path / "free" / FILE).exists()
    assert (load_file(tmp_path / "free" / "model.safetensors")[next(iter(read_pattern(pruned)))] != 0).all()


@pytest.mark.slow
def test_a_masked_lora_has_no_format_of_peft(runs: Runs, pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tuned = runs("llama", f"model.path={pruned}", *WORDS["lora"])
    with pytest.raises(ConfigError, match="a low-rank change that is 0 at pruned entries is neither"):
        export(tuned, "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_unmerging_gives_the_pruned_base_with_its_masks(runs: Runs, pruned: Path, tmp_path: Path) -> None:
    tuned = runs("llama", f"model.path={pruned}", "method=shira", "sparsity=0.9")
    merge(tuned, tmp_path / "merged")
    unmerge(tmp_path / "merged", tmp_path / "base")
    for file in ("model.safetensors", FILE):
        assert (tmp_path / "base" / file).read_bytes() == (pruned / file).read_bytes()
    manifest.check(tmp_path / "base" / "finetune")


def test_a_run_is_opened_only_with_the_masks_that_it_was_trained_with(
    runs: Runs, pruned: Path, tmp_path: Path
) -> None:
    tuned = runs("llama", f"model.path={pruned}", *WORDS["lora"])
    held = tmp_path / "held"
    shutil.move(pruned / "finetune", held)
    try:
        with pytest.raises(ConfigError, match="does not hold the same entries at 0"):
            rebuild(tuned)
        shutil.copytree(held, pruned / "finetune")
        masks = load_file(pruned / FILE)
        name = next(iter(masks))
        masks[name] = torch.full_like(masks[name], 255)
        save_file(masks, pruned / FILE)
        (pruned / MANIFEST).unlink()
        manifest.write(pruned / "finetune")
        with pytest.raises(ConfigError, match="does not hold the same entries at 0"):
            rebuild(tuned)
    finally:
        shutil.rmtree(pruned / "finetune", ignore_errors=True)
        shutil.move(held, pruned / "finetune")
    rebuild(tuned)


@pytest.mark.slow
def test_folded_runs_keep_the_zeros_of_their_base(runs: Runs, pruned: Path, tmp_path: Path) -> None:
    """The mean of two masked changes is that of the merged folders, and 0 where the base is pruned."""
    tuned = [runs("llama", f"model.path={pruned}", *WORDS["lora"], f"seed={seed}") for seed in (0, 1)]
    run(Request(Linear(), str(pruned), tmp_path / "folded", runs=tuple(tuned)))
    same_pattern(tmp_path / "folded", pruned)
    merged = []
    for i, each in enumerate(tuned):
        merge(each, tmp_path / f"merged{i}")
        merged.append(load_file(tmp_path / f"merged{i}" / "model.safetensors"))
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    for name in read_pattern(pruned):
        expected = (merged[0][name] + merged[1][name]) / 2
        torch.testing.assert_close(folded[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_weight_that_is_compressed_loses_its_mask_and_the_others_keep_theirs(
    pruned: Path, tmp_path: Path, dense: bool
) -> None:
    run(Request(Svd(keep=0.5, targets=("mlp",)), str(pruned), tmp_path / "small", dense=dense))
    before, after = load_file(pruned / FILE), load_file(tmp_path / "small" / FILE)
    manifest.check(tmp_path / "small" / "finetune")
    for name, packed in before.items():
        if "mlp" not in name:
            assert torch.equal(after[name], packed)
        elif dense:
            assert (after[name] == 255).all()  # widths are multiples of 8: every entry is live
        else:
            assert name not in after
    model = load(ModelConfig("hf", str(tmp_path / "small")), "causal_lm", (), 0).model
    assert len(list(layers_with_zeros(model))) == sum("mlp" not in name for name in before)
