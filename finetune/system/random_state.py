"""The random generators that a run may draw from, seeded, read and put back: those of torch, CUDA, numpy and Python."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Start all of them at ``number``."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def state() -> dict[str, Tensor]:
    """Where they stand, each as a tensor: safetensors hold nothing else. CUDA's, once it is in use, of the current device."""
    _, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.asarray(keys, np.int64)),
        "numpy.rest": torch.tensor(rest, dtype=torch.float64),
    }
    found |= {
        "python": torch.tensor(words),
        "python.gauss": torch.tensor([gauss] if gauss is not None else [], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(saved: dict[str, Tensor]) -> None:
    """Put ``state`` back; what ``saved`` lacks stays as it is."""
    torch.set_rng_state(saved["torch"])
    if "numpy" in saved:
        position, has_gauss, gauss = saved["numpy.rest"].tolist()
        np.random.set_state(
            ("MT19937", saved["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
        )
    if "python" in saved:
        random.setstate(
            (
                random.getstate()[0],
                tuple(saved["python"].tolist()),
                next(iter(saved["python.gauss"].tolist()), None),
            )
        )
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
