"""The anatomy of the installed transformers' own tiny models, built at random.

The oracle is what the modules compute: a sub-layer's last layer gives what is added to the residual stream.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from finetune.core.anatomy import Anatomy
from finetune.core.attach import attach
from finetune.core.lowrank import LowRank
from finetune.core.site import find_sites
from finetune.errors import ConfigError
from finetune.testing.sessions import tiny

T: Any = transformers
BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = {**BERT, "num_key_value_heads": 2}


def make(kind: str) -> Any:
    """Make a tiny model of a type."""
    if kind in ("vit", "gpt2", "llama"):
        return tiny(kind)  # type: ignore[arg-type]
    if kind == "deit":
        sizes = {**BERT, "image_size": 16, "patch_size": 8}
        del sizes["vocab_size"]
        return T.DeiTForImageClassification(T.DeiTConfig(**sizes)).eval()
    if kind == "distilbert":
        config = T.DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        return T.DistilBertForSequenceClassification(config).eval()
    name = {"bert": "Bert", "roberta": "Roberta", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[
        kind
    ]
    if kind in ("bert", "roberta"):
        return getattr(T, f"{name}ForSequenceClassification")(getattr(T, f"{name}Config")(**BERT)).eval()
    more = {"head_dim": 16} if kind == "qwen3" else {}
    return getattr(T, f"{name}ForCausalLM")(getattr(T, f"{name}Config")(**GROUPED, **more)).eval()


# attention, mlp, norms of attention and mlp inside block 1; embedding; final norm; head
PARTS = {
    "vit": (
        "vit.layers.1",
        ("attention", "mlp", "layernorm_before", "layernorm_after"),
        ("vit.embeddings.patch_embeddings", "vit.layernorm", "classifier"),
    ),
    "deit": (
        "deit.layers.1",
        ("attention", "mlp", "layernorm_before", "layernorm_after"),
        ("deit.embeddings.patch_embeddings", "deit.layernorm", "classifier"),
    ),
    "bert": (
        "bert.encoder.layer.1",
        ("attention", None, "attention.output.LayerNorm", "output.LayerNorm"),
        ("bert.embeddings.word_embeddings", None, "classifier"),
    ),
    "roberta": (
        "roberta.encoder.layer.1",
        ("attention", None, "attention.output.LayerNorm", "output.LayerNorm"),
        ("roberta.embeddings.word_embeddings", None, "classifier.out_proj"),
    ),
    "distilbert": (
        "distilbert.transformer.layer.1",
        ("attention", "ffn", "sa_layer_norm", "output_layer_norm"),
        ("distilbert.embeddings.word_embeddings", None, "classifier"),
    ),
    "gpt2": (
        "transformer.h.1",
        ("attn", "mlp", "ln_1", "ln_2"),
        ("transformer.wte", "transformer.ln_f", "lm_head"),
    ),
}
for _kind in ("llama", "mistral", "qwen2", "qwen3"):
    PARTS[_kind] = (
        "model.layers.1",
        ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        ("model.embed_tokens", "model.norm", "lm_head"),
    )
# heads, heads of keys and values, width of a head, width of the stream
SIZES = {
    **dict.fromkeys(["vit", "gpt2"], (2, 2, 16, 32)),
    **dict.fromkeys(["deit", "bert", "roberta", "distilbert"], (4, 4, 8, 32)),
    **dict.fromkeys(["llama", "mistral", "qwen2"], (4, 2, 8, 32)),
    "qwen3": (4, 2, 16, 32),
}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind in ("vit", "deit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(1, 40, (2, 7))}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_have_the_names_that_transformers_gives_them(kind: str) -> None:
    model = make(kind)
    anatomy = Anatomy.of(model)
    prefix, (attention, mlp, *norms), outside = PARTS[kind]
    block = anatomy.blocks[1]
    assert len(anatomy.blocks) == 2
    assert block.name == prefix
    assert block.module is model.get_submodule(prefix)
    assert block.attention.place is not None
    assert block.attention.place.name == f"{prefix}.{attention}"
    assert (block.mlp.place.name if block.mlp.place else None) == (f"{prefix}.{mlp}" if mlp else None)
    assert [norm.name for norm in block.norms] == [f"{prefix}.{name}" for name in norms]
    found = []
    for place in (anatomy.embedding, anatomy.final_norm, anatomy.head):
        found.append(place.name if place else None)
        assert place is None or place.module is model.get_submodule(place.name)
    assert tuple(found) == outside
    assert (anatomy.heads, anatomy.kv_heads, anatomy.head_dim, anatomy.width) == SIZES[kind]


@pytest.mark.parametrize("kind", PARTS)
def test_the_last_layer_of_a_sublayer_gives_what_is_added_to_the_stream(kind: str) -> None:
    """Without both outputs, a block that normalizes inputs passes the stream on; the other one norms it."""
    model = make(kind)
    anatomy = Anatomy.of(model)
    block = anatomy.blocks[1]
    for part in (block.attention, block.mlp):
        model.get_submodule(part.last.name).register_forward_hook(lambda _m, _a, y: torch.zeros_like(y))
    seen: list[Any] = []
    block.module.register_forward_hook(lambda _m, args, y: seen.extend([args[0], y]))
    with torch.no_grad():
        model(**inputs(kind))
        entered, left = (each[0] if isinstance(each, tuple) else each for each in seen)
        expected = entered
        if not anatomy.norm_first:
            for norm in block.norms:
                expected = norm.module(expected)
    torch.testing.assert_close(left, expected)


@pytest.mark.parametrize("kind", PARTS)
def test_the_first_layer_of_a_sublayer_reads_what_its_norm_gives(kind: str) -> None:
    model = make(kind)
    anatomy = Anatomy.of(model)
    block = anatomy.blocks[1]
    given: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    # In a block that normalizes sums, the norm of the attention gives what the MLP reads.
    norm = block.mlp.norm if anatomy.norm_first else block.attention.norm
    norm.module.register_forward_hook(lambda _m, _a, y: given.append(y))
    block.mlp.first.module.register_forward_hook(lambda _m, args, _y: read.append(args[0]))
    with torch.no_grad():
        model(**inputs(kind))
    assert torch.equal(given[0], read[0])


@pytest.mark.parametrize("kind", [kind for kind in PARTS if kind not in ("vit", "deit")])
def test_a_causal_model_ignores_later_tokens(kind: str) -> None:
    model = make(kind)
    tokens = inputs(kind)["input_ids"]
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 40
    with torch.no_grad():
        first, second = (
            model(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, 0] for ids in (tokens, other)
        )
    assert torch.equal(first, second) == Anatomy.of(model).causal


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama"])
def test_patched_layers_change_nothing(kind: str) -> None:
    model = make(kind)
    plain = Anatomy.of(model)
    for site in find_sites(model, ("all",)):
        attach(model, site.name, LowRank(site.shape, rank=1, alpha=1.0, dropout=0.0))
    found = Anatomy.of(model)
    assert (found.heads, found.kv_heads, found.head_dim) == (plain.heads, plain.kv_heads, plain.head_dim)
    for one, other in zip(plain.blocks, found.blocks, strict=True):
        assert one.name == other.name
        assert one.attention.sites.keys() == other.attention.sites.keys()
        assert one.mlp.last.module is other.mlp.last.module


def test_what_is_unknown_is_refused_with_the_type_of_the_model() -> None:
    swin = T.SwinForImageClassification(T.SwinConfig(image_size=8, patch_size=2, depths=[1], num_heads=[1]))
    with pytest.raises(ConfigError, match=r"blocks and heads of a swin model are unknown\. Use .* vit, deit"):
        Anatomy.of(swin)
    with pytest.raises(ConfigError, match=r"of a Linear model are unknown"):
        Anatomy.of(nn.Linear(2, 2))
    model = tiny("llama")
    del model.model.layers[1].input_layernorm
    with pytest.raises(ConfigError, match=r"Block 1 of this llama model lacks two norms \(there are 1\)"):
        Anatomy.of(model)
    model = tiny("llama")
    model.config.head_dim = 7
    with pytest.raises(
        ConfigError, match=r"heads of this llama model are unknown: .* 4 heads .* width 7, .* 32 x 32"
    ):
        Anatomy.of(model)
