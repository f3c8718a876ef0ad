"""Scikit-learn's handwritten digits, the built-in image task."""

from __future__ import annotations

from dataclasses import dataclass

from ..registry import register
from .dataset import Dataset, Raw, Row
from .splits import cut, spread

SIZES = {"train": 1000, "val": 200, "test": 597}


@register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits, 1,000 for training (the recipe of VTAB-1k)."""

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
        return Raw("image_classification", tuple("0123456789"), splits)
