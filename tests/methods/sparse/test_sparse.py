"""Put twenty crossings of the sparse engine's axes, drawn by a fixed seed, to the contract."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from finetune.core.sparse.schedule import Schedule
from finetune.core.sparse.scores import settings_used
from finetune.methods.sparse.sparse import Crossing
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.grow import Grow
from finetune.schedules.narrow import Narrow
from finetune.schedules.one_shot import OneShot
from finetune.schedules.ramp import Ramp
from finetune.schedules.redraw import Redraw
from finetune.schedules.static import Static
from finetune.testing import contract
from finetune.testing.cases import Case, contract_test

CASES = [
    Case(
        "sparse",
        lambda: Crossing(sparsity=0.9, score="snip", scope="role", grain="row", schedule=DropGrow(every=2)),
        ("vit", "gpt2"),
        data_dependent=True,
        settings=("schedule=cubic", "schedule.every=1", "method.score=snip"),
    ),
    Case("sparse redraw", lambda: Crossing(sparsity=0.9, schedule=Redraw(every=2))),
]

test_contract = contract_test(CASES)

SCHEDULES: tuple[Schedule, ...] = (
    Static(),
    OneShot(dense=0.5),
    Redraw(every=2),
    Redraw(every=3, dropped="base"),
    DropGrow(every=2, rate=0.4),
    DropGrow(every=2, rate=0.4, decay="cosine", dropped="kept"),
    Ramp(initial=3.0, every=1, end=0.7),
    Ramp(initial=0.2, every=2, end=0.8, power=1.0),
    Narrow(keep=0.5),
    Grow(every=2),
)
AXES: dict[str, tuple[Any, ...]] = {
    "score": (
        "random",
        "magnitude",
        "change",
        "gradient",
        "gradient_weight",
        "snip",
        "fisher",
        "sensitivity",
        "d3",
        "lowrank_magnitude",
        "principal",
        "off_principal",
    ),
    "direction": ("largest", "smallest"),
    "scope": ("matrix", "role", "block", "model", "layer"),
    "grain": ("element", "element", "row", "column", "head", "block:4", "matrix", "2:4"),
    "schedule": SCHEDULES,
    "decay": ("base", "zero"),
}


def drawn(number: int, seed: int) -> list[Crossing]:
    """Draw crossings at random, skipping those that the class refuses."""
    dice = random.Random(seed)
    found: list[Crossing] = []
    while len(found) < number:
        settings = {axis: dice.choice(options) for axis, options in AXES.items()}
        settings |= {"targets": ("attention",)} if settings["grain"] == "head" else {}
        settings |= (
            {"sparsity": 0.5} if settings["grain"] == "2:4" else {"sparsity": dice.choice([0.7, 0.95])}
        )
        settings |= {"rank": 4} if "rank" in settings_used()[settings["score"]] else {}
        try:
            method = Crossing(**settings)
        except ValueError:
            continue
        if not method.faults(contract.STEPS):
            found.append(method)
    return found


CROSSINGS = drawn(20, seed=183)


def label(m: Crossing) -> str:
    return f"{m.score} {m.direction} {m.scope} {m.grain} {m.schedule.name} {m.decay}"


@pytest.mark.parametrize("method", CROSSINGS, ids=label)
def test_crossing_keeps_the_whole_contract(method: Crossing) -> None:
    contract.check(lambda: method)


def test_the_draw_leaves_no_option_out() -> None:
    for axis in ("direction", "scope", "grain", "decay"):
        seen = Counter(getattr(m, axis) for m in CROSSINGS)
        assert set(seen) == set(AXES[axis]), axis
    assert set(AXES["score"]) <= set(settings_used())
    assert {m.schedule.name for m in CROSSINGS} == {s.name for s in SCHEDULES}
    assert len({m.score for m in CROSSINGS}) > 8
