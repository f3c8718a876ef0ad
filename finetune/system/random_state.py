"""Seed, save and restore the random generators that a run draws from: torch's, CUDA's, numpy's, Python's."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed all generators with ``number``."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def state() -> dict[str, Tensor]:
    """Return the states of all generators as tensors, which safetensors can store.

    CUDA's is that of the current device, and is included only once CUDA is in use.
    """
    _, python_words, gauss = random.getstate()
    _, numpy_words, *rest = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.asarray(numpy_words, np.int64)),
        "numpy.rest": torch.tensor(rest, dtype=torch.float64),
        "python": torch.tensor(python_words),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(saved: dict[str, Tensor]) -> None:
    """Set all generators to the states in ``saved``; those that ``saved`` lacks stay as they are."""
    torch.set_rng_state(saved["torch"])
    if "numpy" in saved:
        position, has_gauss, gauss = saved["numpy.rest"].tolist()
        words = saved["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    if "python" in saved:
        version = random.getstate()[0]
        gauss = next(iter(saved["python.gauss"].tolist()), None)
        random.setstate((version, tuple(saved["python"].tolist()), gauss))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
