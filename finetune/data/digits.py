"""Scikit-learn's handwritten digits, the built-in image task; with pieces of its two photographs, to see what a model forgets."""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from ..registry import register
from .dataset import Dataset, Raw, Row
from .splits import cut, spread

SIZES = {"train": 1000, "val": 200, "test": 597}
SIDE, HEIGHT, WIDTH = (
    107,
    427,
    640,
)  # of a piece and of a photograph, in pixels; neighbouring pieces overlap by half
PIECES = [
    (top, left)
    for top in range(0, HEIGHT - SIDE + 1, SIDE // 2)
    for left in range(0, WIDTH - SIDE + 1, SIDE // 2)
]


@register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits, 1,000 for training as in VTAB-1k; retention on pieces of two photographs.

    Options:
        retention_images: Number of these pieces.
    """

    retention_images: Annotated[int, Ge(0), Le(2 * len(PIECES))] = 100

    def read(self) -> Raw:
        import numpy as np
        from PIL import Image

        with gzip.open(_shipped("data/digits.csv.gz"), "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        labels = [int(y) for y in table[:, -1]]
        pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16

        def row(i: int) -> Row:
            return {
                "id": f"digit-{i:04d}",
                "image": Image.fromarray(pixels[i]).convert("RGB"),
                "label": labels[i],
            }

        parts = cut(spread(labels, seed=0), *SIZES.values())
        splits = {split: [row(i) for i in part] for split, part in zip(SIZES, parts, strict=True)}
        if self.retention_images:
            splits["retention"] = _pieces(self.retention_images)
        return Raw("image_classification", tuple("0123456789"), splits)


def _shipped(name: str) -> Path:
    """A file that scikit-learn's data sets ship. Its own loaders give the same, which a test checks, after seconds of importing."""
    spec = find_spec("sklearn")
    assert spec
    return Path(str(spec.origin)).parent / "datasets" / name


def _pieces(count: int) -> list[Row]:
    """The first ``count`` squares of both photographs in a fixed shuffled order; nobody has labelled them."""
    from PIL import Image

    places = [(name, *place) for name in ("china", "flower") for place in PIECES]
    random.Random(0).shuffle(places)
    photos = {name: Image.open(_shipped(f"images/{name}.jpg")).convert("RGB") for name in ("china", "flower")}
    return [
        {
            "id": f"{name}-{top}-{left}",
            "image": photos[name].crop((left, top, left + SIDE, top + SIDE)),
            "label": 0,
        }
        for name, top, left in places[:count]
    ]
