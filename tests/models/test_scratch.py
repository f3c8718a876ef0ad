"""Check models with random weights against what transformers initializes from the same settings and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from finetune.artifacts.export import export
from finetune.artifacts.merge import merge
from finetune.artifacts.reopen import evaluate
from finetune.config.load import load as load_config
from finetune.config.settings import ModelConfig
from finetune.errors import ConfigError
from finetune.models.load import Base, load, original_parameters
from finetune.models.stored import fingerprint
from finetune.storage.run_folder import RunFolder, run_folder
from finetune.training import run

LABELS = ("a", "b", "c")
TINY_LM = "builtin:tiny_lm"


def read(path: Any, task: str = "causal_lm", seed: int = 0, dtype: Any = "float32", **config: Any) -> Base:
    labels = () if task == "causal_lm" else LABELS
    return load(ModelConfig("hf", str(path), dtype=dtype, init="random", config=config), task, labels, seed)


def faults(path: Any, task: str = "causal_lm", **config: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(path, task, **config)
    return caught.value.faults


def remove_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def test_the_weights_are_those_that_transformers_draws_from_the_seed(llama: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(llama, num_hidden_layers=3, intermediate_size=24)
    torch.manual_seed(7)
    oracle = transformers.LlamaForCausalLM(config)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    base = read(remove_weights(llama), seed=7, num_hidden_layers=3, intermediate_size=24)
    assert torch.equal(state, torch.get_rng_state())
    expected = dict(oracle.named_parameters())
    assert expected.keys() == dict(base.model.named_parameters()).keys()
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (base.head, base.model.training) == ((), False)
    assert base.notes[-1] == "model.init=random: every weight is drawn from seed=7, and none is pretrained."
    mark = fingerprint(base.model, ())
    assert mark != fingerprint(read(llama, seed=8, num_hidden_layers=3, intermediate_size=24).model, ())
    for name, tensor in original_parameters(base):
        assert torch.equal(tensor, expected[name]), name


def test_a_classifier_gets_the_new_head_of_every_run(vit: Path) -> None:
    pretrained = load(ModelConfig("hf", str(vit), head="new"), "image_classification", LABELS, 4)
    base = read(vit, "image_classification", seed=4, hidden_size=16)
    assert base.head == pretrained.head
    assert base.new_head
    assert torch.equal(base.model.classifier.weight, pretrained.model.classifier.weight)
    body = [model.vit.layers[0].mlp.fc1.weight for model in (base.model, pretrained.model)]
    assert not torch.equal(*body)
    assert base.model.config.id2label == dict(enumerate(LABELS))


def test_the_dtype_is_the_configured_one(llama: Path) -> None:
    assert {p.dtype for p in read(llama, dtype="bfloat16").model.parameters()} == {torch.bfloat16}


def test_a_folder_without_weights_is_refused_unless_they_are_drawn(llama: Path) -> None:
    remove_weights(llama)
    with pytest.raises(
        ConfigError, match=r"has no model\.safetensors.*, or draw the weights: model\.init=ran"
    ):
        load(ModelConfig("hf", str(llama)), "causal_lm", (), 0)
    read(llama)


def test_settings_go_by_either_of_their_names(folder: Any, text: Any) -> None:
    path = folder("GPT2LMHeadModel", {"pad_token": "<pad>"}, **text)
    for key in ("n_layer", "num_hidden_layers"):
        assert len(read(path, **{key: 3}).model.transformer.h) == 3
    both = faults(path, n_layer=3, num_hidden_layers=2)
    assert both == ("model.config.num_hidden_layers and model.config.n_layer are one setting; keep one.",)


def test_a_setting_inside_a_mapping_leaves_the_others() -> None:
    base = read(TINY_LM, rope_parameters={"rope_theta": 500})
    assert base.model.config.rope_parameters["rope_theta"] == 500
    assert base.model.config.rope_parameters["rope_type"] == "default"


def test_every_setting_that_does_not_fit_is_named() -> None:
    assert faults(
        TINY_LM,
        num_hidden_layer=2,
        hidden_size="wide",
        num_attention_heads=True,
        model_type="gpt2",
        torch_dtype="float16",
        id2label={},
        _attn_implementation="someone/kernels",
        rope_parameters={"rope_thetas": 5.0},
    ) == (
        "model.config.num_hidden_layer is not a setting of this model. Did you mean 'num_hidden_layers'?",
        "model.config.hidden_size='wide' is of another type than the model's 128.",
        "model.config.num_attention_heads=True is of another type than the model's 4.",
        "model.config.model_type cannot be set: model.path decides it.",
        "model.config.torch_dtype cannot be set: model.dtype decides it.",
        "model.config.id2label cannot be set: dataset decides it.",
        "model.config._attn_implementation cannot be set: it can name code that would be fetched and run.",
        "model.config.rope_parameters.rope_thetas is not a setting of this model. Did you mean 'rope_theta'?",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers=1,000,000 is more than 1,000. Set model.config.num",
        ),
        ({"vocab_size": 10**12}, "the weights would take 512,"),
        ({"hidden_size": 10**9}, "the weights would take "),
        ({"hidden_size": 10**18}, "cannot be built"),
        ({"hidden_size": -16}, "cannot be built"),
        ({"num_attention_heads": 0}, "cannot be built"),
        ({"hidden_act": "nonsense"}, "cannot be built"),
    ],
)
@pytest.mark.parametrize("where", ["the command line", "config.json"])
def test_absurd_sizes_are_refused(llama: Path, settings: dict[str, Any], message: str, where: str) -> None:
    given = settings
    if where == "config.json":
        file = remove_weights(llama) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        given = {}
    if "vocab_size" in settings:
        message = "the weights would take"
    assert message in faults(llama, **given)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.config.num_hidden_layers=2"], "model.config.num_hidden_layers has no effect on pretrained"),
        (["model.init=random", "model.head=keep"], "model.head=keep: model.init=random leaves no head"),
        (["model.init=drawn"], "model.init='drawn'"),
    ],
)
def test_settings_that_contradict_each_other(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    assert message in str(caught.value)


def test_a_run_from_scratch_is_evaluated_merged_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "model=tiny_lm",
        "model.init=random",
        "model.config.num_hidden_layers=1",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=48",
    ]
    lines = "".join(f"the cat sat on mat {i} and the dog ran\n" for i in range(40))
    (tmp_path / "texts.csv").write_text("text\n" + lines)
    words += ["dataset=csv", "dataset.task=causal_lm", "dataset.path=texts.csv", "method=full", "seed=3"]
    words += ["train.steps=4", "train.batch_size=8", "train.eval_every=null", "train.save_every=2", "name=t"]
    words += ["train.threads=1", "run=r"]
    config = load_config(words)
    place = RunFolder(run_folder(config))
    told: list[str] = []
    result = run.train(config, place.path, told.append, lambda done, total, text: None)
    assert "model.init=random: every weight is drawn from seed=3, and none is pretrained." in told
    assert not result["suspect"]
    trained = load_file(place.delta / "delta.safetensors")
    place.result.unlink()
    for file in place.checkpoint(4).iterdir():
        file.unlink()
    place.checkpoint(4).rmdir()
    frozen = load_config([], None, place.config)
    assert frozen == config
    again = run.train(frozen, place.path, told.append, lambda done, total, text: None)
    assert any("Resuming from step 2" in line for line in told)
    assert again["metrics"] == result["metrics"]
    resumed = load_file(place.delta / "delta.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in trained.items())
    assert evaluate(place.path)["metrics"]["test"] == result["metrics"]["test"]
    merge(place.path, tmp_path / "merged")
    plain = ["model=hf", "model.path=merged", *(w for w in words[5:] if not w.startswith("run="))]
    next_one = load_config([*plain, "run=n"])
    found = run.train(next_one, run_folder(next_one), told.append, lambda done, total, text: None)
    assert found["metrics"]["base"] == pytest.approx(result["metrics"]["test"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"was drawn by model\.init=random, and no folder has its weights"):
        export(place.path, "peft", tmp_path / "peft")
