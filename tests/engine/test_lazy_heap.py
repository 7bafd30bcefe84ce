"""LazyHeap: the item of the smallest rank is first, also when ranks have grown meanwhile."""

from __future__ import annotations

import random

from lora_serve.engine.lazy_heap import LazyHeap


def test_items_come_by_rank_and_equal_ones_in_the_order_in_which_they_came() -> None:
    ranks = {"a": 2, "b": 1, "c": 1}
    heap = LazyHeap(ranks.__getitem__)
    for item in ranks:
        heap.add(item)
    found = []
    while (first := heap.first) is not None:
        found.append(first)
        heap.discard(first)
    assert found == ["b", "c", "a"]
    assert len(heap) == 0


def test_ranks_that_grow_are_noticed_and_those_that_shrink_are_told() -> None:
    ranks = {"a": 1, "b": 2}
    heap = LazyHeap(ranks.__getitem__)
    heap.add("a")
    heap.add("b")
    ranks["a"] = 3
    assert heap.first == "b"
    ranks["a"] = 0
    heap.add("a")
    assert heap.first == "a"


def test_it_agrees_with_sorting_whatever_happens() -> None:
    draw = random.Random(0)
    ranks = dict.fromkeys(range(20), 0)
    heap = LazyHeap(ranks.__getitem__)
    present: set[int] = set()
    for _ in range(3000):
        item = draw.randrange(20)
        match draw.randrange(4):
            case 0:
                present.add(item)
                heap.add(item)
            case 1:
                present.discard(item)
                heap.discard(item)
            case _:
                ranks[item] += draw.randrange(5)
        first = heap.first
        assert (None if first is None else ranks[first]) == min((ranks[each] for each in present), default=None)
        assert (len(heap), item in heap) == (len(present), item in present)
    assert len(heap._heap) < 1000  # void entries do not pile up


def test_void_entries_behind_a_small_one_are_dropped() -> None:
    ranks = {"small": 0, "large": 1}
    heap = LazyHeap(ranks.__getitem__)
    heap.add("small")
    for _ in range(10_000):
        heap.add("large")
        heap.discard("large")
    assert len(heap._heap) < 50
    assert heap.first == "small"
