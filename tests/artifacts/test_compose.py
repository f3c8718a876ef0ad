"""Adding runs, against dense sums of their changes. The numbered invariants are those of LT-SFT's card."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from finetune.artifacts import merge
from finetune.artifacts import reopen as finished
from finetune.artifacts.compose import compose, conflicts, sparse_changes
from finetune.cli import artifacts as cli
from finetune.config.load import load
from finetune.core.attach import patched
from finetune.core.changes import SparseChange
from finetune.core.sparse.switch import Switch
from finetune.errors import ConfigError
from finetune.models.load import load as load_model
from finetune.storage.delta import read_description
from finetune.storage.run_folder import run_folder
from finetune.testing import contract
from finetune.training import run

SMALL = [
    "train.steps=3",
    "train.batch_size=8",
    "train.eval_every=null",
    "train.threads=1",
    "name=t",
    "model=hf",
    "optimizer.lr=0.05",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs on one base, and one on another."""
    folder = tmp_path_factory.mktemp("runs")
    base, other = contract.tiny(), contract.tiny()
    base.save_pretrained(folder / "base")
    other.vit.layernorm.bias.data += 1
    other.save_pretrained(folder / "other")
    for i in range(40):
        place = folder / "pictures" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 120, (16, 16, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(pixels).save(place / f"{i}.png")
    small = [*SMALL, "dataset=imagefolder", f"dataset.path={folder / 'pictures'}"]
    wanted = {
        "a": ["method=shira", "sparsity=0.7", "seed=1"],
        "b": ["method=shira", "sparsity=0.5", "seed=2", "method.targets=[q,mlp]"],
        "c": ["method=shira", "sparsity=0.6", "seed=3", "method.targets=[o,v]"],
        "lora": ["method=lora"],
        "head": ["method=head"],
        "elsewhere": ["method=shira"],
    }
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in wanted.items():
            config = load(
                [
                    *small,
                    f"run={name}",
                    f"model.path={folder / ('other' if name == 'elsewhere' else 'base')}",
                    *words,
                ]
            )
            run.train(config, run_folder(config), lambda line: None, lambda done, total, text: None)
            made[name] = folder / run_folder(config)
    return made


def plain(folder: Path) -> Any:
    import transformers

    return transformers.ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).requires_grad_(
        False
    )


@functools.cache
def changes(path: Path) -> dict[str, Tensor]:
    """The dense float64 change of each layer, by the deltas' own ``forward``."""
    setup = finished.rebuild(path)
    with torch.no_grad():
        layers = patched(setup.session.model)
        return {
            n: torch.stack([d(layer.original).double() for d in layer.deltas]).sum(0)
            for n, layer in layers.items()
        }


def head(path: Path) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(path / "delta" / "delta.safetensors").items() if k.startswith("head.")}


def test_changes_add_with_their_weights_and_the_head_is_the_last_ones(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """Invariant 5: overlapping entries add up."""
    a, b = changes(runs["a"]), changes(runs["b"])
    out = tmp_path / "sum"
    told = compose([runs["a"], runs["b"]], out, [1.0, 0.5])
    found = changes(out)
    assert set(found) == set(a) | set(b)
    union = overlap = opposite = 0
    for name, total in found.items():
        x, y = a[name], 0.5 * b.get(name, torch.zeros_like(a[name]))
        torch.testing.assert_close(total, x + y, rtol=0, atol=float((x + y).abs().max()) * 2**-23)
        union += int(((x != 0) | (y != 0)).sum())
        overlap += int(((x != 0) & (y != 0)).sum())
        opposite += int((x * y < 0).sum())
    assert 0 < opposite < overlap
    assert (told["conflicts"], told["opposite_signs"]) == (overlap, opposite)
    assert 0 <= union - told["entries"] <= 2  # two changes may cancel
    assert sum(row["conflicts"] for row in told["layers"]) == overlap
    assert told["head"] == str(runs["b"])
    assert all(torch.equal(t, head(runs["b"])[k]) for k, t in head(out).items())
    assert head(out).keys() == head(runs["b"]).keys() != set()
    assert not any(torch.equal(t, head(runs["a"])[k]) for k, t in head(out).items() if "weight" in k)
    assert any("that of" in note or "those of" in note for note in told["notes"])


def test_eval_merge_and_a_second_sum_take_the_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum"
    compose([runs["b"], runs["c"]], out)  # not one layer in common
    metrics = finished.evaluate(out)["metrics"]
    merged = merge.merge(out, tmp_path / "merged")
    assert merged["same_predictions"] == 1
    base, sums = (
        dict(plain(folder).named_parameters())
        for folder in (runs["a"].parents[2] / "base", tmp_path / "merged")
    )
    b, c = changes(runs["b"]), changes(runs["c"])
    assert not set(b) & set(c)
    for name, change in {**b, **c}.items():
        assert torch.equal(sums[f"{name}.weight"], base[f"{name}.weight"] + change.float())
    assert set(metrics) == {"val", "test"}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"]["name"] == "sparse"
    assert set(config["method"]["targets"]) == set(b) | set(c)
    assert json.loads((out / "compose.json").read_text())["conflicts"] == 0
    assert read_description(out / "delta")["composed"]["head"] == str(runs["c"])
    again = tmp_path / "again"
    compose([out, runs["a"]], again)
    three = tmp_path / "three"
    compose([runs["b"], runs["c"], runs["a"]], three)
    assert (again / "delta" / "delta.safetensors").read_bytes() == (
        three / "delta" / "delta.safetensors"
    ).read_bytes()


def test_the_order_does_not_matter_but_for_the_head(runs: dict[str, Path], tmp_path: Path) -> None:
    """Invariant 5."""
    compose([runs["a"], runs["b"], runs["c"]], tmp_path / "one")
    compose([runs["c"], runs["a"], runs["b"]], tmp_path / "two", head=runs["c"])
    one, two = (load_file(tmp_path / name / "delta" / "delta.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_sum_is_what_a_switch_makes_of_both(runs: dict[str, Path], tmp_path: Path) -> None:
    compose([runs["a"], runs["b"]], tmp_path / "sum")
    setup = finished.rebuild(tmp_path / "sum")
    model: Any = load_model(setup.config.model, setup.base.task, setup.labels, 0).model
    before = {n: p.clone() for n, p in model.named_parameters()}
    switch = Switch(model)
    for name in ("a", "b"):
        switch.load(name, sparse_changes(finished.rebuild(runs[name])))
    switch.to("b", "a")
    for name, layer in patched(setup.session.model).items():
        assert torch.equal(model.get_submodule(name).weight, layer.weight)
    switch.revert()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_run_named_twice_counts_twice_and_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    told = compose([runs["a"], runs["a"]], tmp_path / "sum")
    assert any("more than once" in note for note in told["notes"])
    assert told["opposite_signs"] == 0
    assert told["conflicts"] == told["entries"]
    once, twice = changes(runs["a"]), changes(tmp_path / "sum")
    assert all(torch.equal(twice[n], 2 * once[n]) for n in once)


def test_opposite_weights_cancel_to_the_base(runs: dict[str, Path], tmp_path: Path) -> None:
    told = compose([runs["a"], runs["a"]], tmp_path / "sum", [1.0, -1.0])
    assert told["entries"] == 0
    assert all(not change.any() for change in changes(tmp_path / "sum").values())


def test_what_does_not_fit_is_refused_all_at_once_and_nothing_is_written(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        compose([runs["a"], runs["elsewhere"], tmp_path], full, [1.0, float("nan")], runs["b"])
    said = "\n".join(caught.value.faults)
    for words in (
        "2 numbers for 3 runs",
        "nan is not a finite",
        "not empty",
        "different bases",
        "no config.yaml",
        "is not one of the runs",
    ):
        assert words in said
    assert len(caught.value.faults) == 6
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    for name, what in (("lora", "a low-rank change"), ("head", "the head only")):
        with pytest.raises(ConfigError, match=f"{name}: method={name} has no sparse change.*{what}"):
            compose([runs["a"], runs[name]], tmp_path / "out")
    with pytest.raises(ConfigError, match="at least two runs"):
        compose([runs["a"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_change_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["a"], tmp_path / "damaged")
    file = tmp_path / "damaged" / "delta" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged or cut short"):
        compose([runs["b"], tmp_path / "damaged"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_runs_and_settings_in_any_order(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sum"
    cli.compose(
        [f"out={out}", str(runs["b"]), f"head={runs['b']}", str(runs["c"]), "weights=2,-1"], as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    assert [(line["run"], line["weight"]) for line in told["runs"]] == [
        (str(runs["b"]), 2.0),
        (str(runs["c"]), -1.0),
    ]
    assert told["head"] == str(runs["b"])
    assert len(told["layers"]) == len(changes(runs["b"])) + len(changes(runs["c"]))
    with pytest.raises(ConfigError) as caught:
        cli.compose([str(runs["a"]), "nowhere", "weights=1,x", "weights=1"])
    assert [fault.split()[0] for fault in caught.value.faults] == [
        "weights=1:",
        "compose",
        "weights=1",
        "nowhere",
    ]
    with pytest.raises(ConfigError, match="weights=1,x is not a list"):
        cli.compose([str(runs["a"]), str(runs["b"]), f"out={out}", "weights=1,x"])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(0, 9), st.sampled_from([-2.0, -1.0, 0.0, 1.0]), max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_conflicts_are_counted_entry_by_entry(parts: list[dict[int, float]]) -> None:
    made = [
        SparseChange(torch.tensor(sorted(p), dtype=torch.int64), torch.tensor([p[i] for i in sorted(p)]))
        for p in parts
    ]
    meet = {i: [p[i] for p in parts if p.get(i)] for i in range(10)}
    wanted = (
        sum(len(v) > 1 for v in meet.values()),
        sum(any(x < 0 for x in v) and any(x > 0 for x in v) for v in meet.values()),
    )
    assert conflicts(made) == wanted
