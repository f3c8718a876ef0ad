"""Exported folders, read by the installed peft as its users do, against the live run's logits."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts import export as module
from finetune.artifacts.export import export
from finetune.artifacts.merge import live_logits, logits
from finetune.artifacts.reopen import rebuild
from finetune.cli import app as cli
from finetune.core.attach import attach, patched
from finetune.core.lowrank import LowRank
from finetune.core.site import find_sites
from finetune.errors import ConfigError
from finetune.testing import contract

from ..support.plain_runs import Runs

peft: Any = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def loaded(base: Path, out: Path, **options: Any) -> Any:
    """What a user of peft does."""
    import transformers

    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    return adapted(
        kind.from_pretrained(base, dtype=torch.float32, ignore_mismatched_sizes=True, **options), out
    )


def adapted(model: Any, out: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it will rename
        return peft.PeftModel.from_pretrained(model, str(out)).eval()


def difference(run: Path, again: Any) -> float:
    setup = rebuild(run)
    plain = logits(again, setup, setup.session.accelerator.autocast())
    return max(float((a - b).abs().max()) for a, b in zip(live_logits(setup), plain, strict=True))


@pytest.mark.parametrize(
    ("kind", "words", "type_"),
    [
        ("vit", ["method=lora", "method.rank=4"], "LORA"),
        (
            "gpt2",
            ["method=lora", "method.alpha=3.5"],
            "LORA",
        ),  # layers that are stored transposed, and alpha / rank no power of two
        ("llama", ["method=lora", "method.targets=[q,up]"], "LORA"),
        ("vit", ["method=shira", "sparsity=0.9"], "SHIRA"),
        (
            "llama",
            ["method=sparse", "sparsity=0.97", "method.scope=model", "method.score=magnitude"],
            "SHIRA",
        ),  # unequal counts per layer
        ("llama", ["method=peft", "method.type=LOHA"], "LOHA"),
        ("vit", ["method=super_tuning", "sparsity=0.9", "method.branch=3"], "SUPERTUNING"),
        (
            "llama",
            ["method=super_tuning", "sparsity=0.97", "method.branch=2", "method.scope=model"],
            "SUPERTUNING",
        ),  # unequal counts per layer
        ("vit", ["method=ia3"], "IA3"),
        ("gpt2", ["method=ia3"], "IA3"),  # keys and values are parts of one layer
        (
            "vit",
            [
                "method=peft",
                "method.type=VERA",
                "method.config={r: 4, d_initial: 0.1}",
                "method.targets=[q,k]",
            ],
            "VERA",
        ),
    ],
)
def test_peft_loads_what_was_exported_with_equal_logits(
    runs: Runs, tmp_path: Path, kind: str, words: list[str], type_: str
) -> None:
    run, out = runs(kind, *words), tmp_path / "out"
    told = export(run, "peft", out)
    assert (told["type"], told["format"]) == (type_, "peft")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    options = {"num_labels": 2} if kind == "vit" else {}
    again = loaded(runs.base(kind), out, **options)
    assert difference(run, again) < 1e-5
    assert told["largest_logit_difference"] < 1e-5
    with again.disable_adapter():
        assert difference(run, again) > 1e-4  # the adapter is what makes them equal
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs.base(kind))
    assert config["modules_to_save"] == (["classifier"] if kind == "vit" else None)


def test_ranks_and_scales_may_differ_by_layer(tmp_path: Path) -> None:
    """Against the very layers, on GPT-2, whose weights are stored transposed."""
    model = contract.tiny("gpt2")
    torch.manual_seed(0)
    for i, site in enumerate(find_sites(model, ("all",))):
        delta = LowRank(site.shape, 1 + i % 3, 2.5 * (1 + i % 2), 0.0)
        torch.nn.init.normal_(delta.b, std=0.1)
        attach(model, site.name, delta)
    layers = patched(model)
    factors = module._factors(layers)
    assert factors is not None
    config, tensors = module._as_lora(layers, factors)
    assert set(config.rank_pattern.values()) | {config.r} == {1, 2, 3}
    assert config.alpha_pattern
    config.save_pretrained(tmp_path)
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    again = adapted(contract.tiny("gpt2"), tmp_path)
    live = contract.logits(model, "gpt2")
    assert not torch.allclose(live, contract.logits(contract.tiny("gpt2"), "gpt2"), atol=1e-2)
    torch.testing.assert_close(contract.logits(again, "gpt2"), live, atol=1e-5, rtol=0)


def test_every_entry_is_there_and_the_rest_is_zero(runs: Runs, tmp_path: Path) -> None:
    run = runs("vit", "method=shira", "sparsity=0.9")
    export(run, "peft", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rank = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    values = sum(int((t != 0).sum()) for name, t in tensors.items() if name.endswith("shira_weight"))
    assert values == int((load_file(run / "delta" / "delta.safetensors")["method.bank.values"] != 0).sum())
    for name, index in tensors.items():
        if name.endswith("shira_indices"):
            assert (
                len({tuple(pair) for pair in index.T.tolist()})
                == index.shape[1]
                == rank * (64 if "mlp" not in name else 80)
            )


@pytest.mark.parametrize(
    ("kind", "words", "why"),
    [
        ("llama", ["method=snell"], "a kernel change is neither two factors nor single entries per layer"),
        ("vit", ["method=snell"], "it trains parameters in place, such as vit.embeddings.cls_token"),
        ("vit", ["method=head"], "it changes no layer but the head"),
        (
            "gpt2",
            ["method=shira", "sparsity=0.9"],
            "its SHiRA supports nn.Linear only, and transformer.h.0.attn.c_attn is a Conv1D",
        ),
        (
            "gpt2",
            ["method=super_tuning", "method.branch=2"],
            "its Super-Tuning supports nn.Linear only, and transformer.h.0.attn.c_attn is a Conv1D",
        ),
        (
            "vit",
            ["method=shira", "sparsity=0.02"],
            "its SHiRA requires .* entries in every layer, and .* has 1024",
        ),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_what_is_nearest(
    runs: Runs, tmp_path: Path, kind: str, words: list[str], why: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"peft has no such format: {why}.* "
        rf"Nearest is a plain Hugging Face folder: finetune merge ckpt=",
    ):
        export(runs(kind, *words), "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_change_that_cannot_be_merged_is_not_sent_to_merge(runs: Runs, tmp_path: Path) -> None:
    words = ["method=adapter", "method.train_norms=false"]
    with pytest.raises(ConfigError, match=r"a bottleneck adapter\. It cannot be merged either; pass on"):
        export(runs("llama", *words), "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_peft_does_not_read_back_is_not_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that scales one factor of one layer."""

    def scaled(tensors: dict[str, Tensor], file: Path) -> None:
        name = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, name: 3 * tensors[name]}, file)

    monkeypatch.setattr(module, "save_file", scaled)
    with pytest.raises(ConfigError, match=r"The exported model's logits differ .* nothing was written"):
        export(runs("vit", "method=lora", "method.rank=4"), "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", "export", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return (int(ended.code or 0), *capsys.readouterr())
        raise AssertionError("main always exits")

    run = runs("vit", "method=lora", "method.rank=4")
    code, out, _ = say(f"ckpt={run}", "format=peft", f"out={tmp_path / 'out'}", "--json")
    assert (code, json.loads(out)["type"]) == (0, "LORA")
    for words, fault in (
        (["format=peft", f"out={tmp_path / 'out'}"], "exists and is not empty"),
        (["format=gguf", f"out={tmp_path / 'x'}"], "format=gguf: no such format; there is peft. Nearest is"),
        ([f"out={tmp_path / 'x'}"], "export needs one format=peft"),
        (
            ["format=peft", f"out={tmp_path / 'x'}", "--force"],
            "--force: export takes ckpt=RUN format=peft out=DIR",
        ),
    ):
        code, _, err = say(f"ckpt={run}", *words)
        assert (code, err.count("\n"), fault in err) == (2, 1, True), err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
