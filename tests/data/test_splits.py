from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.splits import cut_stretches, spread_classes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 9))
def test_every_stretch_of_the_order_holds_the_classes_in_proportion(labels, seed):
    order = spread_classes(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    totals = Counter(labels)
    for end in range(len(order) + 1):
        for label, count in Counter(labels[i] for i in order[:end]).items():
            assert abs(count - end * totals[label] / len(labels)) <= len(totals)
    assert {labels[i] for i in order[: len(totals)]} == set(labels)


def test_the_seed_decides_the_order():
    labels = [0, 1] * 20
    assert spread_classes(labels, 3) == spread_classes(labels, 3) != spread_classes(labels, 4)


def test_cut_takes_consecutive_stretches_and_sorts_each():
    assert cut_stretches([4, 1, 3, 0, 2], [2, 1]) == [[1, 4], [3]]
