"""A task that a run learns in a second: a tiny model with random weights, and a few small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetune.testing import contract


def make(folder: Path, images: int = 48) -> list[str]:
    """Write model and images to ``folder``; the settings that choose them."""
    from PIL import Image

    contract.tiny().save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for i in range(images):
        file = folder / "images" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (16, 16, 3)) + 50 * np.eye(3)[i % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    common = ["train.batch_size=8", "train.device=cpu", "train.threads=1", "optimizer.lr=0.02", "name=t"]
    return [
        "model=hf",
        f"model.path={folder / 'model'}",
        "dataset=imagefolder",
        f"dataset.path={folder / 'images'}",
        *common,
    ]
