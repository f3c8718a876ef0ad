"""Settings that are newer than some runs, each with the value that those runs had in effect.

A frozen configuration without such a setting is read as if it had that value, whatever the default is now. A
setting with that value is left out of the configuration's hash, so the hashes of older runs stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .. import registry

# By dotted key, which can also name a whole section. Each part of a key may be limited to some classes, as in
# "method[lora,snell].dropout" and "method.schedule[ramp].power"; without a limit, every class of the kind
# must have the setting.
LATER: dict[str, Any] = {
    "train.patience": None,
    "method.schedule[one_shot].lr_schedule": "span",
    "method[lt_sft].l1_dense": 0.0,
    "method[snell,snella,spt].class_token_decay": True,
    "method[sparse,shira,super_tuning,lift,sara,spiel,lt_sft,id3,off_principal].selection": "eval",
    "method[s2ft].criterion": "random",
    "method[s2ft].direction": "largest",
    "method[s2ft].batches": 1,
    "objective[task].label_smoothing": 0.0,
    "objective[task].class_weights": None,
    "model.head": "new",
    "method.head": True,
    "model.init": "pretrained",
    "model.config": {},
    # A folder had no masks then, so nothing was held at 0: a change that was trained without masks is not
    # opened with them (``artifacts/reopen.py``).
    "model.zeros": None,
    "streams": {},
}
for _kind in registry.KINDS.values():
    if _kind.absent:
        LATER[_kind.place] = {"name": _kind.absent}
# Filled in like the others, but never left out of the hash: runs have been recorded with it.
HASHED = ("selector",)


def enter(values: Mapping[str, Any], sections_only: bool = False) -> dict[str, Any]:
    """Return ``values`` with the missing settings of ``LATER`` filled in; a null section counts as missing.

    ``sections_only``: fill in whole sections and nothing inside them.
    """
    filled = copy.deepcopy(dict(values))
    for key in sorted(LATER, key=_depth):  # a section is filled in before the settings inside it
        if sections_only and "." in key:
            continue
        parent, name = _parent(filled, key)
        if parent is None:
            continue
        if name not in parent or (parent is filled and parent[name] is None):
            parent[name] = copy.deepcopy(LATER[key])
    return filled


def without(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` without the settings that have their value of ``LATER``, but keep ``HASHED``."""
    rest = copy.deepcopy(dict(values))
    for key in sorted(LATER, key=_depth, reverse=True):  # a section is compared after the settings inside it
        parent, name = _parent(rest, key)
        if key not in HASHED and parent is not None and name in parent and parent[name] == LATER[key]:
            del parent[name]
    return rest


def _depth(key: str) -> int:
    return key.count(".")


def _parent(values: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """Return the mapping that holds ``key`` (None if there is none of the right class), and the last name."""
    *steps, last = key.split(".")
    parent: Any = values
    for step in steps:
        name, _, classes = step.partition("[")
        parent = parent.get(name)
        if not isinstance(parent, dict):
            return None, last
        if classes and parent.get("name") not in classes.rstrip("]").split(","):
            return None, last
    return parent, last
