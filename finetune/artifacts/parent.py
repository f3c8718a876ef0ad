"""Describe a further model of a pass over several models of one base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.site import Site
from ..errors import ConfigError
from ..models.masks import OR_FREE

Change = Callable[[Site, Tensor], Tensor | None]


@dataclass(frozen=True)
class Parent:
    """A further model of a pass.

    ``about``: what is recorded of it; no path is. ``change``: returns what it adds to the weight of a site,
    [out, in], float64, given the base's weight; None for a layer that it does not change. ``head``: the
    values of its head by the model's names, if they are not those of the base. ``labels``: of that head.
    """

    path: Path
    about: dict[str, Any]
    change: Change
    head: Mapping[str, Tensor]
    labels: tuple[str, ...]


def name_runs(error: ConfigError, path: Path) -> list[str]:
    """Return the faults of a run or a model, which the user of a pass names by ``runs=``."""
    named = []
    for fault in error.faults:
        for prefix in ("ckpt=", "model.path="):
            fault = fault.replace(f"{prefix}{path}", f"runs={path}")
        named.append(fault.replace(OR_FREE, ""))
    return named
