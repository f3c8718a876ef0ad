from collections import Counter

import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from finetune.data.digits import MOST_PIECES, Digits


def test_the_split_is_that_of_vtab_and_covers_every_digit_once():
    raw = Digits().read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {
        "train": 1000,
        "val": 200,
        "test": 597,
        "retention": 100,
    }
    ids = [row["id"] for split, rows in raw.splits.items() if split != "retention" for row in rows]
    assert sorted(ids) == [f"digit-{i:04d}" for i in range(1797)]
    for rows in list(raw.splits.values())[:3]:
        counts = Counter(row["label"] for row in rows)
        assert max(counts.values()) - min(counts.values()) <= 0.06 * len(rows)


def test_pixels_and_labels_are_those_of_scikit_learn():
    bunch = load_digits()
    for row in Digits().read().splits["val"]:
        i = int(row["id"].split("-")[1])
        assert row["label"] == bunch.target[i]
        image = np.asarray(row["image"])
        assert image.shape == (8, 8, 3)
        np.testing.assert_allclose(image[..., 0] / 255 * 16, bunch.images[i], atol=0.5 / 255 * 16)


def test_reading_twice_gives_the_same_rows():
    read = Digits.read.__wrapped__  # tests/conftest.py keeps what the first call returned
    first, second = read(Digits()), read(Digits())
    for split in first.splits:
        assert [row["id"] for row in first.splits[split]] == [row["id"] for row in second.splits[split]]


def test_retention_images_are_distinct_pieces_of_two_photographs() -> None:
    every = Digits(retention_images=MOST_PIECES).read().splits["retention"]
    photos = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    assert len({row["id"] for row in every}) == len(every) == MOST_PIECES
    for row in every:
        name, top, left = row["id"].split("-")
        np.testing.assert_array_equal(
            np.asarray(row["image"]), photos[name][int(top) : int(top) + 107, int(left) : int(left) + 107]
        )
    assert [row["id"] for row in Digits(retention_images=7).read().splits["retention"]] == [
        row["id"] for row in every[:7]
    ]
    assert "retention" not in Digits(retention_images=0).read().splits
