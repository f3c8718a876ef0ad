"""Scikit-learn's handwritten digits, the built-in image task; with pieces of its two photographs, to see what a model forgets."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from ..registry import register
from .dataset import Dataset, Raw, Row
from .splits import cut, spread

SIZES = {"train": 1000, "val": 200, "test": 597}
SIDE, HEIGHT, WIDTH = 107, 427, 640  # of a piece and of a photograph, in pixels; neighbouring pieces overlap by half
PIECES = [(top, left) for top in range(0, HEIGHT - SIDE + 1, SIDE // 2) for left in range(0, WIDTH - SIDE + 1, SIDE // 2)]


@register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits, 1,000 for training (the recipe of VTAB-1k); retention: pieces of a photograph of a temple and of a flower."""

    retention_images: Annotated[int, Ge(0), Le(2 * len(PIECES))] = 100

    def read(self) -> Raw:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        bunch = load_digits()
        labels = [int(y) for y in bunch.target]
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from 0..16

        def row(i: int) -> Row:
            return {"id": f"digit-{i:04d}", "image": Image.fromarray(pixels[i]).convert("RGB"), "label": labels[i]}

        parts = cut(spread(labels, seed=0), *SIZES.values())
        splits = {split: [row(i) for i in part] for split, part in zip(SIZES, parts, strict=True)}
        if self.retention_images:
            splits["retention"] = _pieces(self.retention_images)
        return Raw("image_classification", tuple("0123456789"), splits)


def _pieces(count: int) -> list[Row]:
    """The first ``count`` squares of both photographs in a fixed shuffled order; nobody has labelled them."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    places = [(name, *place) for name in ("china", "flower") for place in PIECES]
    random.Random(0).shuffle(places)
    photos = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    return [
        {"id": f"{name}-{top}-{left}", "image": photos[name].crop((left, top, left + SIDE, top + SIDE)), "label": 0}
        for name, top, left in places[:count]
    ]
