"""Compare every schedule with moves worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.sparse.schedule import Move, Schedule
from finetune.schedules.drop_grow import DropGrow
from finetune.schedules.grow import Grow
from finetune.schedules.narrow import Narrow
from finetune.schedules.one_shot import OneShot
from finetune.schedules.ramp import Ramp
from finetune.schedules.redraw import Redraw
from finetune.schedules.static import Static

# Sparsities of a cubic ramp from 0 to 0.9 in ten updates.
CUBIC = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]


def moves(schedule: Schedule, total: int) -> dict[int, Move]:
    """Return the moves that are due, by step."""
    found = {step: schedule.move(step, total) for step in range(1, total)}
    return {step: move for step, move in found.items() if move is not None}


def sparsities(schedule: Schedule, total: int, final: float) -> list[float]:
    """Return the share left untrained after each update; K is the share 1 - ``final`` of all entries."""
    densities = [schedule.initial_density(total), *(move.density for move in moves(schedule, total).values())]
    return [1 - (1 - final) * density for density in densities]


def test_cubic_curve_from_zero_to_nine_tenths() -> None:
    """Compare with ten updates worked out by hand; nothing moves after the ramp."""
    schedule = Ramp(initial=10.0, every=5, end=0.5)
    assert sparsities(schedule, 100, final=0.9) == pytest.approx(CUBIC, abs=1e-12)
    assert list(moves(schedule, 100)) == list(range(5, 51, 5))
    assert [schedule.density(step, 100) for step in range(50, 100)] == [1.0] * 50


def test_cubic_is_seven_eighths_of_the_way_at_half_time() -> None:
    for initial, final in ((10.0, 0.9), (4.0, 0.75), (0.0, 0.5), (0.25, 0.8)):
        start, half, end = (
            1 - (1 - final) * Ramp(initial=initial, every=4, end=1.0).density(step, 81)
            for step in (0, 40, 80)
        )
        assert half == pytest.approx(end - (end - start) / 8)


@given(
    st.floats(1.01, 50),
    st.integers(1, 9),
    st.integers(20, 200),
    st.floats(0, 0.4),
    st.floats(0.5, 1),
    st.sampled_from([1.0, 2.0, 3.0]),
)
def test_curves_fall_ever_more_slowly_and_meet_k(
    initial: float, every: int, total: int, start: float, end: float, power: float
) -> None:
    """The count is monotone, with shrinking increments, and ends with K.

    It changes at n + 1 updates only, the first choice included.
    """
    schedule = Ramp(initial=initial, power=power, start=start, end=end, every=every)
    due = moves(schedule, total)
    if schedule.faults(total):
        return
    densities = [schedule.initial_density(total), *(move.density for move in due.values())]
    gaps = [a - b for a, b in pairwise(densities)]
    assert all(gap > 0 for gap in gaps)
    assert all(a >= b - 1e-9 * initial for a, b in pairwise(gaps))
    assert densities[-1] == 1.0
    first = round(start * total)
    n = (min(round(end * total), total - 1) - first) // every
    assert list(due) == [first + every * (i + 1) for i in range(n)]
    assert [schedule.density(step, total) for step in range(first)] == [initial] * first
    for step in range(1, total):
        assert (schedule.density(step, total) != schedule.density(step - 1, total)) == (step in due)
    assert all(move.by == "score" and not move.drop and not move.redraw for move in due.values())


def test_linear_down_and_up() -> None:
    assert [
        m.density for m in moves(Ramp(initial=5.0, power=1.0, every=10, end=0.4), 100).values()
    ] == pytest.approx([4, 3, 2, 1])
    assert [
        m.density for m in moves(Ramp(initial=0.2, power=1.0, every=10, end=0.4), 100).values()
    ] == pytest.approx([0.4, 0.6, 0.8, 1])


def test_a_ramp_to_the_end_of_the_run_still_meets_k() -> None:
    """There is no update after the last step, so the ramp is one update shorter."""
    assert list(moves(Ramp(every=10, end=1.0), 100)) == list(range(10, 100, 10))
    assert moves(Ramp(every=10, end=1.0), 100)[90].density == 1.0


def test_a_ramp_whose_length_its_period_does_not_divide_ends_at_an_update() -> None:
    due = moves(Ramp(initial=3.0, power=1.0, start=0.1, end=0.5, every=7), 100)
    assert list(due) == [17, 24, 31, 38, 45]
    assert due[45].density == 1.0


def test_static_and_one_shot_never_move() -> None:
    for schedule in (Static(), OneShot(dense=0.3)):
        assert not moves(schedule, 50)
        assert schedule.initial_density(50) == 1.0
    assert (Static().dense, OneShot(dense=0.3).dense) == (0.0, 0.3)


def test_redraw_chooses_anew_every_period() -> None:
    assert moves(Redraw(every=20), 61) == dict.fromkeys((20, 40, 60), Move(redraw=True))
    assert Redraw().dropped == "kept"


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4]),
        ("linear", [0.3, 0.2, 0.1]),
        ("cosine", [0.4 * 0.5 * (1 + c) for c in (math.sqrt(0.5), 0, -math.sqrt(0.5))]),
    ],
)
def test_drop_grow_replaces_a_share_that_decays(decay: str, expected: list[float]) -> None:
    due = moves(DropGrow(every=25, rate=0.4, decay=decay), 100)  # type: ignore[arg-type]  # one of the three
    assert list(due) == [25, 50, 75]
    assert [move.drop for move in due.values()] == pytest.approx(expected)
    assert all(move.density == 1.0 and move.by == "change" and not move.redraw for move in due.values())


def test_narrow_moves_once() -> None:
    assert moves(Narrow(at=0.6, keep=0.25), 10) == {6: Move(density=0.25, by="score")}
    assert Narrow().dropped == "kept"


@pytest.mark.parametrize(
    ("every", "end", "total", "expected"),
    [
        (1, 1.0, 4, {0: 1, 1: 2, 2: 3, 3: 4}),  # ID3: B / T at each of T steps
        (3, 1.0, 10, {0: 1, 3: 2, 6: 3, 9: 4}),
        (2, 0.5, 10, {0: 1, 2: 2, 4: 3}),
        (5, 0.5, 20, {0: 1, 5: 2}),
    ],
)
def test_grow_adds_equal_parts_and_ends_with_all(
    every: int, end: float, total: int, expected: dict[int, int]
) -> None:
    schedule = Grow(every=every, end=end)
    parts = max(expected.values())
    assert schedule.initial_density(total) == 1 / parts
    assert {step: move.density for step, move in moves(schedule, total).items()} == {
        step: n / parts for step, n in expected.items() if step
    }
    assert all(not move.drop and not move.redraw for move in moves(schedule, total).values())


@given(st.integers(1, 12), st.floats(0.05, 1), st.integers(2, 150))
def test_grow_never_gives_back_and_meets_k(every: int, end: float, total: int) -> None:
    schedule = Grow(every=every, end=end)
    if schedule.faults(total):
        return
    shares = [schedule.initial_density(total), *(move.density for move in moves(schedule, total).values())]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == schedule.parts(total) > 1
    assert Fraction(shares[0]).limit_denominator(1000) == Fraction(1, len(shares))


@pytest.mark.parametrize(
    ("schedule", "total", "words"),
    [
        (Redraw(every=50), 50, "schedule.every=50 "),
        (DropGrow(every=60), 50, "schedule.every=60 "),
        (Grow(every=50), 50, "schedule.every=50 "),
        (Grow(every=6, end=0.5), 10, "schedule.end=0.5"),
        (Ramp(every=50), 50, "schedule.every=50 "),
        (Ramp(every=10, end=0.1), 50, "schedule.end=0.1"),
        (Ramp(every=2, start=0.6, end=0.5), 50, "schedule.start=0.6"),
        (Narrow(at=0.01), 10, "schedule.at=0.01"),
        (Narrow(at=0.99), 10, "schedule.at=0.99"),
        (OneShot(dense=0.01), 10, "schedule.dense=0.01"),
        (OneShot(dense=0.99), 10, "schedule.dense=0.99"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_has_a_fault(schedule: Schedule, total: int, words: str) -> None:
    (fault,) = schedule.faults(total)
    assert words in fault


@given(
    st.integers(1, 60),
    st.sampled_from(
        [Static(), Redraw(every=7), DropGrow(every=7), Grow(every=7), Ramp(every=7), Narrow(), OneShot()]
    ),
)
def test_a_schedule_without_faults_moves(total: int, schedule: Schedule) -> None:
    if not schedule.faults(total) and schedule not in (Static(), OneShot()):
        assert moves(schedule, total)


def test_densities_stay_below_the_peak() -> None:
    """A bank has room for the peak, so more entries would not fit."""
    for schedule in (
        Ramp(initial=7.0, every=3),
        Ramp(initial=0.1, every=3),
        Grow(every=3),
        Redraw(every=3),
        DropGrow(every=3),
        Narrow(),
        Static(),
    ):
        assert (
            max([schedule.initial_density(40), *(move.density for move in moves(schedule, 40).values())])
            <= schedule.peak
        )
