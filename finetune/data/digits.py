"""Read scikit-learn's handwritten digits, the built-in image task."""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from ..registry import register
from .dataset import Dataset, Example, Raw
from .splits import cut_stretches, spread_classes

SIZES = {"train": 1000, "val": 200, "test": 597}
PHOTOS = ("china", "flower")
HEIGHT, WIDTH = 427, 640  # pixels of a photograph
SIDE = 107  # pixels of a square piece; neighbouring pieces overlap by half
TOPS = range(0, HEIGHT - SIDE + 1, SIDE // 2)
LEFTS = range(0, WIDTH - SIDE + 1, SIDE // 2)
MOST_PIECES = len(PHOTOS) * len(TOPS) * len(LEFTS)


@register("digits")
@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits, of which 1,000 are for training, as in VTAB-1k.

    Retention is measured on pieces of two photographs, of a temple and of a flower.

    Options:
        retention_images: Number of pieces of the photographs.
    """

    retention_images: Annotated[int, Ge(0), Le(MOST_PIECES)] = 100

    def read(self) -> Raw:
        """Return the digits, and the pieces of the photographs as the retention split."""
        import numpy as np

        with gzip.open(_find_shipped("data/digits.csv.gz"), "rt") as file:
            table = np.loadtxt(file, delimiter=",")
        labels = [int(label) for label in table[:, -1]]
        pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
        stretches = cut_stretches(spread_classes(labels, seed=0), list(SIZES.values()))
        splits = {}
        for split, places in zip(SIZES, stretches, strict=True):
            splits[split] = [_make_example(place, pixels[place], labels[place]) for place in places]
        if self.retention_images:
            splits["retention"] = _cut_pieces(self.retention_images)
        return Raw("image_classification", tuple("0123456789"), splits)


def _make_example(place: int, pixels: Any, label: int) -> Example:
    from PIL import Image

    return {"id": f"digit-{place:04d}", "image": Image.fromarray(pixels).convert("RGB"), "label": label}


def _find_shipped(name: str) -> Path:
    """Return a file that scikit-learn ships with its data sets.

    Scikit-learn's own loaders return the same data, as a test checks, but importing them takes seconds.
    """
    spec = find_spec("sklearn")
    assert spec
    return Path(str(spec.origin)).parent / "datasets" / name


def _cut_pieces(count: int) -> list[Example]:
    """Return ``count`` square pieces of both photographs in a fixed random order; label 0 has no meaning."""
    from PIL import Image

    places = [(name, top, left) for name in PHOTOS for top in TOPS for left in LEFTS]
    random.Random(0).shuffle(places)
    photos = {name: Image.open(_find_shipped(f"images/{name}.jpg")).convert("RGB") for name in PHOTOS}
    pieces = []
    for name, top, left in places[:count]:
        piece = photos[name].crop((left, top, left + SIDE, top + SIDE))
        pieces.append({"id": f"{name}-{top}-{left}", "image": piece, "label": 0})
    return pieces
