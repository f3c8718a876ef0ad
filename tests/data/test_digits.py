from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from finetune.data.digits import Digits


def test_the_split_is_that_of_vtab_and_covers_every_digit_once():
    raw = Digits().read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 1000, "val": 200, "test": 597}
    ids = [row["id"] for rows in raw.splits.values() for row in rows]
    assert sorted(ids) == [f"digit-{i:04d}" for i in range(1797)]
    for rows in raw.splits.values():
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
    first, second = Digits().read(), Digits().read()
    for split in first.splits:
        assert [row["id"] for row in first.splits[split]] == [row["id"] for row in second.splits[split]]
