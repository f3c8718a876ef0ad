import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessorPil

from finetune.data.dataset import Raw
from finetune.data.encode import choose_length, collate, cut_windows, encode
from finetune.errors import ConfigError


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=80) | st.text("the cat☂é😀", max_size=80), length=st.integers(2, 9))
def test_windows_score_every_byte_and_every_token_once(tokenizer, text, length):
    items = cut_windows({"id": "d", "text": text}, tokenizer, length)
    assert sum(item["bytes"] for item in items) == len(text.encode())
    assert [token for item in items for token in item["input_ids"][1:]] == tokenizer(
        text, add_special_tokens=False
    )["input_ids"]
    assert all(
        item["input_ids"][0] == tokenizer.eos_token_id and 2 <= len(item["input_ids"]) <= length
        for item in items
    )
    assert [item["id"] for item in items] == [f"d#{n}" for n in range(len(items))]


def test_a_window_counts_the_bytes_of_its_own_tokens(tokenizer):
    text = "the cat sat on the mat, and then the other cat"
    for item in cut_windows({"id": "d", "text": text}, tokenizer, 5):
        assert item["bytes"] == len(tokenizer.decode(item["input_ids"][1:]).encode())


def test_language_model_labels_leave_out_the_start_and_the_padding(tokenizer):
    raw = Raw(
        "causal_lm",
        (),
        {"train": [{"id": "a", "text": "the cat sat on the mat and the hat"}, {"id": "b", "text": "cat"}]},
        length=6,
    )
    train = encode(raw, tokenizer)["train"]
    batch = collate([train[i] for i in range(len(train))])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert ids.shape == mask.shape == batch.labels.shape
    assert ids.dtype == mask.dtype == batch.labels.dtype == torch.int64
    scored = batch.labels != -100
    assert torch.equal(batch.labels[scored], ids[scored])
    assert not scored[:, 0].any()
    assert torch.equal(scored[:, 1:], mask[:, 1:].bool())
    assert batch.bytes.sum() == len("the cat sat on the mat and the hatcat")
    assert batch.ids[-1] == "b#0"


def test_texts_are_cut_to_length_and_padded_per_batch(tokenizer):
    rows = [
        {"id": "a", "text": "cat " * 30, "label": 1},
        {"id": "b", "text": "cat", "label": 0},
        {"id": "c", "text": "the cat", "label": 2},
    ]
    items = encode(Raw("sequence_classification", ("x", "y", "z"), {"test": rows}), tokenizer)["test"]
    batch = collate([items[0], items[1]])
    oracle = tokenizer(
        [row["text"] for row in rows[:2]], truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    assert torch.equal(batch.inputs["input_ids"], oracle["input_ids"])
    assert torch.equal(batch.inputs["attention_mask"], oracle["attention_mask"])
    assert batch.inputs["input_ids"].shape == (2, 16)
    assert batch.labels.tolist() == [1, 0]
    assert batch.bytes is None
    assert collate([items[1], items[2]]).inputs["input_ids"].shape[1] < 16


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_those_of_the_processor(mode):
    processor = ViTImageProcessorPil(
        size={"height": 12, "width": 10}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    items = encode(
        Raw("image_classification", ("x", "y"), {"val": [{"id": "i", "image": image, "label": 1}] * 2}),
        processor,
    )["val"]
    batch = collate([items[0], items[1], items[0]])
    assert batch.inputs["pixel_values"].shape == (3, 3, 12, 10)
    assert batch.labels.tolist() == [1, 1, 1]
    resized = np.asarray(image.convert("RGB").resize((10, 12), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.from_numpy((resized / 255 - 0.5) / 0.25).permute(2, 0, 1)
    torch.testing.assert_close(batch.inputs["pixel_values"][2], expected, atol=1e-5, rtol=0)


def test_images_of_small_sets_are_cached_and_those_of_large_ones_are_not(monkeypatch):
    calls = []

    def processor(images, return_tensors):
        calls.append(images)
        return {"pixel_values": torch.zeros(1, 3, 4, 4)}

    raw = Raw(
        "image_classification",
        ("x", "y"),
        {"train": [{"id": "i", "image": Image.new("L", (4, 4)), "label": 0}]},
    )
    train = encode(raw, processor)["train"]
    assert train[0] is train[0]
    assert len(calls) == 1
    monkeypatch.setattr("finetune.data.encode.CACHED_BYTES", 10)
    train = encode(raw, processor)["train"]
    assert train[0] is not train[0]
    assert len(calls) == 3


def test_the_length_is_the_wanted_one_or_the_limit_of_the_tokenizer(tokenizer):
    assert choose_length(None, tokenizer) == 16
    assert choose_length(7, tokenizer) == 7
    with pytest.raises(ConfigError, match=r"dataset\.length=17 is more than the 16 tokens"):
        choose_length(17, tokenizer)


def test_a_split_without_text_is_a_fault(tokenizer):
    with pytest.raises(ConfigError, match="The val split of the data set holds no text"):
        encode(
            Raw("causal_lm", (), {"train": [{"id": "a", "text": "cat"}], "val": [{"id": "b", "text": ""}]}),
            tokenizer,
        )
