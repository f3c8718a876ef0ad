"""The table of roles against the installed transformers' own tiny models, built at random."""

import pytest
import transformers
from torch import nn

from finetune.core.layer import Patched
from finetune.core.roles import block_of, in_head, is_matrix, is_recognised, roles

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**TINY, "vocab_size": 20, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "bos_token_id": 2, "eos_token_id": 3}
SPLIT = {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 2}  # two blocks
MODELS = {
    "vit": (
        "ViTForImageClassification",
        {**TINY, "image_size": 8, "patch_size": 4},
        {**SPLIT, "embedding": 1, "norm": 5, "head": 1},
    ),
    "deit": (
        "DeiTForImageClassification",
        {**TINY, "image_size": 8, "patch_size": 4},
        {**SPLIT, "embedding": 1, "norm": 5, "head": 1},
    ),
    "bert": (
        "BertForSequenceClassification",
        TEXT,
        {**SPLIT, "embedding": 3, "norm": 5, "head": 1, "other": 1},
    ),
    "roberta": ("RobertaForSequenceClassification", TEXT, {**SPLIT, "embedding": 3, "norm": 5, "head": 2}),
    "xlm-roberta": (
        "XLMRobertaForSequenceClassification",
        TEXT,
        {**SPLIT, "embedding": 3, "norm": 5, "head": 2},
    ),
    "camembert": (
        "CamembertForSequenceClassification",
        TEXT,
        {**SPLIT, "embedding": 3, "norm": 5, "head": 2},
    ),
    "electra": (
        "ElectraForSequenceClassification",
        {**TEXT, "embedding_size": 16},
        {**SPLIT, "embedding": 3, "norm": 5, "head": 2},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 20},
        {**SPLIT, "embedding": 2, "norm": 5, "head": 2},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2,
        {"qkv": 2, "o": 2, "up": 2, "down": 2, "embedding": 2, "norm": 5, "head": 1},
    ),
    "llama": ("LlamaForCausalLM", TEXT, {**SPLIT, "gate": 2, "embedding": 1, "norm": 5, "head": 1}),
    "mistral": ("MistralForCausalLM", TEXT, {**SPLIT, "gate": 2, "embedding": 1, "norm": 5, "head": 1}),
    "gemma": (
        "GemmaForCausalLM",
        {**TEXT, "head_dim": 8},
        {**SPLIT, "gate": 2, "embedding": 1, "norm": 5, "head": 1},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**TEXT, "num_key_value_heads": 1},
        {**SPLIT, "gate": 2, "embedding": 1, "norm": 5, "head": 1},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**TEXT, "num_key_value_heads": 1, "head_dim": 8},
        {**SPLIT, "gate": 2, "embedding": 1, "norm": 9, "head": 1},
    ),
}


def make(name):
    kind, options, _ = MODELS[name]
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**options))


@pytest.mark.parametrize("name", MODELS)
def test_roles_of_every_known_architecture(name):
    model = make(name)
    found = roles(model)
    counts = {role: list(found.values()).count(role) for role in set(found.values())}
    assert is_recognised(model)
    assert counts == MODELS[name][2]
    assert {n for n, m in model.named_modules() if is_matrix(m)} <= found.keys()


@pytest.mark.parametrize("name", MODELS)
def test_shapes_agree_with_the_roles(name):
    model = make(name)
    for module, role in roles(model).items():
        shape = getattr(model.get_submodule(module), "weight", None)
        if role in ("up", "gate", "down"):
            wide, narrow = max(shape.shape), min(shape.shape)
            out, into = shape.T.shape if name == "gpt2" else shape.shape
            assert (out, into) == ((narrow, wide) if role == "down" else (wide, narrow))
        if role in ("q", "k", "v", "o", "up", "down"):
            assert block_of(module) in (0, 1)


def test_a_patched_layer_keeps_its_role_and_hides_what_is_inside():
    for name in ("vit", "gpt2", "bert"):
        model = make(name)
        before = roles(model)
        for module in [m for m, role in before.items() if role in ("o", "up", "qkv")]:
            parent, _, leaf = module.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, Patched(getattr(owner, leaf)))
        assert roles(model) == before


def test_an_unknown_architecture_has_linear_layers_and_a_head():
    config = transformers.OPTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        vocab_size=20,
        word_embed_proj_dim=16,
    )
    model = transformers.OPTForSequenceClassification(config)
    found = roles(model)
    matrices = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not is_recognised(model)
    assert {n for n, role in found.items() if role == "linear"} == matrices - {"score"}
    assert found["score"] == "head"
    assert "embedding" in found.values()


def test_a_plain_module_works_too():
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(3, 3))
    model.add_module("norm", nn.LayerNorm(3))
    model.add_module("classifier", nn.Linear(3, 2))
    assert roles(model) == {"hidden": "linear", "norm": "norm", "classifier": "head"}


def test_what_lies_in_the_head():
    model = make("roberta")
    assert in_head(model, "classifier.out_proj.weight")
    assert not in_head(model, "roberta.encoder.layer.0.output.dense.weight")


def test_the_block_is_the_first_number_in_a_name():
    assert [block_of(n) for n in ("a.b.3.c", "h.11.attn.2.x", "0.weight", "layer1.conv", "norm")] == [
        3,
        11,
        0,
        -1,
        -1,
    ]
