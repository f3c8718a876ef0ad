"""Models as ``load`` reads them, compared with what transformers reads from the same folder."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.config.settings import ModelConfig
from finetune.core.attach import attach
from finetune.core.part import Delta
from finetune.errors import ConfigError
from finetune.models.load import load, original_parameters, read_model, save
from finetune.models.stored import fingerprint

LABELS = ("a", "b", "c")


def config(folder, **options):
    return ModelConfig("hf", str(folder), **options)


def test_the_body_is_the_checkpoint_and_the_head_is_new(vit):
    base = load(config(vit), "image_classification", LABELS, seed=0)
    stored = dict(
        transformers.ViTForImageClassification.from_pretrained(vit, dtype=torch.float32).named_parameters()
    )
    for name, parameter in base.model.named_parameters():
        if name not in base.head:
            assert torch.equal(parameter, stored[name])
    assert base.head == ("classifier.weight", "classifier.bias")
    assert base.model.classifier.weight.shape == (3, 16)
    assert base.model.classifier.bias.eq(0).all()
    assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_the_head_depends_on_the_seed_alone(vit):
    def head(seed):
        base = load(config(vit), "image_classification", LABELS, seed)
        return base.model.classifier.weight

    first = head(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, head(3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, head(4))
    assert 0.01 < first.std() < 0.03


def test_the_head_is_new_even_where_the_label_count_agrees(vit):
    base = load(config(vit), "image_classification", tuple("vwxyz"), seed=0)
    assert not torch.equal(
        base.model.classifier.weight, load_file(vit / "model.safetensors")["classifier.weight"]
    )


def test_roberta_trains_its_whole_head(folder, text):
    path = folder("RobertaForMaskedLM", {"pad_token": "<pad>"}, **text)
    base = load(config(path), "sequence_classification", LABELS, seed=0)
    assert base.head == (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    )
    assert base.processor.model_max_length == 23  # positions start after the padding index


def test_a_pooler_belongs_to_the_body_unless_the_checkpoint_lacks_it(bert, folder, text):
    assert load(config(bert), "sequence_classification", LABELS, 0).head == (
        "classifier.weight",
        "classifier.bias",
    )
    base = load(
        config(folder("BertForMaskedLM", {"pad_token": "<pad>"}, **text)),
        "sequence_classification",
        LABELS,
        0,
    )
    assert base.head == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )
    assert any("no bert.pooler.dense.weight" in note for note in base.notes)


def test_a_language_model_has_no_head_and_its_tokenizer_can_pad(llama):
    base = load(config(llama), "causal_lm", (), seed=0)
    assert base.head == ()
    assert base.processor.pad_token_id == base.processor.eos_token_id == base.model.config.pad_token_id
    assert base.processor.model_max_length == 24
    oracle = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.tensor([[1, 4, 5]])
    assert torch.equal(base.model(input_ids=ids).logits, oracle(input_ids=ids).logits)


def test_a_decoder_classifies_the_last_token_before_the_padding(llama):
    base = load(config(llama), "sequence_classification", LABELS, seed=0)
    batch = base.processor(["the cat", "the cat sat on a mat"], padding=True, return_tensors="pt")
    alone = base.processor(["the cat"], return_tensors="pt")
    both = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(both[:1], base.model(input_ids=alone["input_ids"]).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_configured_one(vit, dtype):
    model = transformers.ViTForImageClassification.from_pretrained(vit).half()
    model.save_pretrained(vit)
    base = load(config(vit, dtype=dtype), "image_classification", LABELS, seed=0)
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
    stored = model.vit.layers[0].mlp.fc1.weight
    assert torch.equal(base.model.vit.layers[0].mlp.fc1.weight, stored.to(getattr(torch, dtype)))


def test_original_parameters_returns_the_loaded_tensors_after_the_model_has_changed(vit):
    base = load(config(vit), "image_classification", LABELS, seed=0)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    with torch.no_grad():
        for p in base.model.parameters():
            p.add_(1)
    again = dict(original_parameters(base))
    assert list(again) == list(before)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_the_fingerprint_covers_every_bit_but_the_head_and_ignores_patches(vit):
    base = load(config(vit), "image_classification", LABELS, seed=0)
    print_ = fingerprint(base.model, base.head)
    assert print_ == fingerprint(
        load(config(vit), "image_classification", ("x", "y"), seed=5).model, base.head
    )
    attach(base.model, "vit.layers.0.mlp.fc1", Delta())
    assert print_ == fingerprint(base.model, base.head)
    weight = base.model.vit.layernorm.weight
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert print_ != fingerprint(base.model, base.head)
    assert fingerprint(base.model, ()) != fingerprint(base.model, base.head)
    assert fingerprint(base.model.bfloat16(), base.head) != print_


def test_a_saved_folder_is_read_by_transformers(bert, tmp_path):
    base = load(config(bert), "sequence_classification", LABELS, seed=0)
    save(base.model, base.processor, tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat", return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert torch.equal(again(**batch).logits, base.model(**batch).logits)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_folder_without_an_image_processor_gets_a_plain_one_and_a_note(vit):
    base = load(config(vit), "image_classification", LABELS, seed=0)
    assert base.processor.size == {"height": 8, "width": 8}
    assert "resized to 8x8" in base.notes[0]
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(
        vit
    )
    base = load(config(vit), "image_classification", LABELS, seed=0)
    assert list(base.processor.image_mean) == [0.1] * 3
    assert not any("resized" in note for note in base.notes)


def test_an_unknown_architecture_has_a_note(folder):
    path = folder(
        "OPTForCausalLM",
        {"pad_token": "<pad>"},
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        vocab_size=20,
        word_embed_proj_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=24,
    )
    assert "every linear layer but the head" in load(config(path), "causal_lm", (), seed=0).notes[0]


def test_nothing_is_printed(vit, capfd):
    load(config(vit), "image_classification", LABELS, seed=0)
    assert capfd.readouterr() == ("", "")


def test_a_sharded_checkpoint_is_read_and_a_missing_shard_is_named(vit):
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    (vit / "model.safetensors").unlink()
    model.save_pretrained(vit, max_shard_size="8KB")
    shards = sorted(vit.glob("model-*.safetensors"))
    assert len(shards) > 1
    base = load(config(vit), "image_classification", LABELS, seed=0)
    assert torch.equal(base.model.vit.layernorm.weight, model.vit.layernorm.weight)
    shards[0].unlink()
    assert f"has no {shards[0].name}" in faults(vit)[0]


def faults(folder, task="image_classification"):
    with pytest.raises(ConfigError) as caught:
        load(config(folder), task, LABELS if task != "causal_lm" else (), seed=0)
    return caught.value.faults


def test_a_truncated_file_is_named(vit):
    file = vit / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut short" in faults(vit)[0]
    file.write_bytes(b"")
    assert "model.safetensors is damaged or cut short" in faults(vit)[0]


def test_pickles_are_not_read(vit):
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    assert "only as a pickle (pytorch_model.bin)" in faults(vit)[0]
    (vit / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in faults(vit)[0]


def test_a_checkpoint_that_lacks_a_layer_is_incomplete(vit):
    stored = load_file(vit / "model.safetensors")
    del stored["vit.layernorm.weight"]
    save_file(stored, vit / "model.safetensors", {"format": "pt"})
    fault = "1 weights of a ViTForImageClassification are missing or of another shape"
    assert f"{fault} (first: vit.layernorm.weight)" in faults(vit)[0]


def test_a_model_that_does_not_fit_the_task(vit, bert):
    assert (
        "is a vit, which does not fit the data set's task causal_lm. It can do image_classification"
        in faults(vit, "causal_lm")[0]
    )
    assert (
        "is a bert, which does not fit the data set's task causal_lm. It can do sequence_classification:"
        in faults(bert, "causal_lm")[0]
    )


def test_a_folder_that_holds_no_model(tmp_path, vit):
    assert "has no config.json" in faults(tmp_path)[0]
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in faults(tmp_path)[0]
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "is a nonsense" in faults(tmp_path)[0]
    assert "is a file" in faults(vit / "config.json")[0]


def test_a_text_model_without_its_tokenizer(folder, text):
    assert "has no tokenizer that can be read" in faults(folder("LlamaForCausalLM", **text), "causal_lm")[0]


def test_a_tokenizer_of_another_model(folder, text):
    path = folder("LlamaForCausalLM", {"pad_token": "<pad>"}, **{**text, "vocab_size": 5})
    assert "its tokenizer has 14 tokens, but the model embeds 5" in faults(path, "causal_lm")[0]


def test_a_config_that_contradicts_itself(vit):
    file = vit / "config.json"
    content = file.read_text()
    file.write_text(content.replace('"num_attention_heads": 2', '"num_attention_heads": 3'))
    assert "are missing or of another shape" in faults(vit)[0]
    file.write_text(content.replace('"hidden_act": "gelu"', '"hidden_act": "nonsense"'))
    assert "cannot be built" in faults(vit)[0]


def test_a_revision_of_a_folder_is_refused(vit):
    with pytest.raises(ConfigError, match=r"model\.revision=v2 has no effect"):
        load(config(vit, revision="v2"), "image_classification", LABELS, seed=0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        (
            "someone/nothing",
            r"neither a folder here nor in the local hub cache. Check the path, or set model\.download=true",
        ),
        ("builtin:nothing", "is not built in. Known: builtin:tiny_"),
        ("builtin:", "is not built in"),
    ],
)
def test_paths_without_a_model(path, message):
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig("hf", path), "image_classification", LABELS, seed=0)


def test_a_model_in_the_hubs_cache_is_found_without_the_network(vit, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub/models--someone--tiny/snapshots/abc123"
    snapshot.parent.mkdir(parents=True)
    vit.rename(snapshot)
    (tmp_path / "hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load(ModelConfig("hf", "someone/tiny"), "image_classification", LABELS, seed=0)
    assert base.source == "someone/tiny@abc123"


def test_the_built_in_image_model_is_read_in_full():
    base = load(ModelConfig("tiny_vit", "builtin:tiny_vit"), "image_classification", LABELS, seed=0)
    assert base.source == "builtin:tiny_vit"
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.processor.size == {"height": 32, "width": 32}
    assert sum(p.numel() for p in base.model.parameters()) > 500_000


@pytest.mark.parametrize(("name", "blocks"), [("tiny_lm", 5), ("tiny_deep", 12)])
def test_the_built_in_language_models_know_some_english(name, blocks):
    base = load(ModelConfig(name, f"builtin:{name}"), "causal_lm", (), seed=0)
    assert len(base.model.model.layers) == blocks
    assert sum(parameter.numel() for parameter in base.model.parameters()) < 1_600_000
    ids = base.processor("The man went to the house of the king and said", return_tensors="pt")["input_ids"]
    backwards = ids.flip(1)
    with torch.no_grad():
        losses = [base.model(input_ids=x, labels=x).loss.item() for x in (ids, backwards)]
    assert base.processor.model_max_length == 256
    assert losses[0] < losses[1] < 20


def test_originals_are_read_one_by_one_where_the_checkpoint_names_them_as_the_model(llama, vit, monkeypatch):
    """The ViT's parameters are stored under older names, so its model is read as a whole."""

    def read_in_full(path, task, labels, dtype="float32"):
        base = load(config(path, dtype=dtype), task, labels, seed=3)
        base.fingerprint = fingerprint(base.model, base.new_parameters)
        before = {name: p.clone() for name, p in base.model.named_parameters()}
        attach(base.model, base_layer[path.name], Delta())
        read = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "finetune.models.load.read_model", lambda *given: read.append(given) or read_model(*given)
            )
            found = dict(original_parameters(base))
        assert list(found) == list(before)
        assert all(torch.equal(found[name], before[name]) for name in before)
        assert {t.dtype for t in found.values()} == {getattr(torch, dtype)}
        return bool(read)

    base_layer = {"LlamaForCausalLM": "model.layers.0.mlp.up_proj", vit.name: "vit.layers.0.mlp.fc1"}
    assert not read_in_full(llama, "causal_lm", ())
    assert not read_in_full(llama, "causal_lm", (), "bfloat16")
    assert not read_in_full(llama, "sequence_classification", LABELS)  # with a new head
    assert read_in_full(vit, "image_classification", LABELS)
    stored = load_file(llama / "model.safetensors")
    base = load(config(llama), "causal_lm", (), seed=0)
    base.fingerprint = fingerprint(base.model, ())
    stored["model.norm.weight"] += 1  # another folder by now: nothing is taken from it unchecked
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    list(original_parameters(base))
    assert base.stored is None
