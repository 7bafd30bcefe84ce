"""RunningSequences: who gives up its KV blocks when they run out, and that everybody is served in the end."""

from __future__ import annotations

import random

import pytest
from test_scheduler import run, scheduler, sequence

from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.sequence import Sequence


def long_sequence(order: int, tenant: str, prompt: int, output: int) -> Sequence:
    seq = sequence(order, prompt, tenant=tenant)
    seq.limit = prompt + output
    return seq


def launch(s: Scheduler, steps: int) -> None:
    for _ in range(steps):
        run(s)


def launch_until_preempted(s: Scheduler) -> None:
    for _ in range(1000):
        if s.running.preemptions:
            return
        run(s)
    raise AssertionError("nobody was preempted")


def test_who_was_served_most_gives_up_its_blocks_however_old_it_is() -> None:
    s = scheduler(blocks=10, prefix=False)
    s.add(served := long_sequence(0, "hog", 12, 100))
    launch(s, 12)
    s.add(owed := long_sequence(1, "other", 4, 100))
    launch_until_preempted(s)
    assert (list(s.running), list(s.waiting)) == ([owed], [served])


def test_of_one_share_the_youngest_gives_up_its_blocks() -> None:
    s = scheduler(blocks=6, prefix=False)
    seqs = [long_sequence(order, "one", 7, 20) for order in range(2)]
    for seq in seqs:
        s.add(seq)
    launch_until_preempted(s)
    assert list(s.running) == seqs[:1]


def test_one_that_was_preempted_starts_again_once_all_of_it_fits() -> None:
    """Otherwise its first chunk would take blocks only to lose them, or to take the others', again and again."""
    s = scheduler(blocks=10, tokens=8, prefix=False)
    s.add(first := long_sequence(0, "a", 16, 20))
    launch(s, 4)
    s.add(second := long_sequence(1, "b", 16, 20))
    launch_until_preempted(s)
    (loser,) = s.waiting
    winner = first if loser is second else second
    while winner in s.running:
        assert loser in s.waiting
        launch(s, 1)
    launch(s, 1)
    assert (s.running.preemptions, list(s.running)) == (1, [loser])


@pytest.mark.parametrize("slots", [4, 1], ids=["slots for all", "one slot"])
def test_with_memory_for_two_long_sequences_those_of_three_keys_all_end(slots: int) -> None:
    s = scheduler(blocks=42, tokens=32, prefix=False, slots=slots)
    seqs = [long_sequence(order, "abc"[order % 3], 40, 40) for order in range(9)]
    for seq in seqs:
        if slots == 1:
            seq.digests = (seq.request.tenant,)
        s.add(seq)
    computed = 0
    for _ in range(3000):
        computed += sum(part.count for part in run(s))
        if not s.running and not s.waiting:
            break
    assert [len(seq.tokens) for seq in seqs] == [80] * 9
    assert computed < 2.5 * 9 * 80  # what is computed again because of preemptions is bounded too
    assert s.pool.used == 0


def test_keys_that_keep_sending_do_not_make_a_long_sequence_wait_for_ever() -> None:
    """It is the one that was served most whenever blocks run out beside ever new short ones of other keys."""
    draw = random.Random(0)
    s = scheduler(blocks=30, tokens=32, prefix=False)
    s.add(long := long_sequence(0, "long", 60, 50))
    order = 0
    for _ in range(4000):
        while len(s.waiting) + len(s.running) < 7:
            order += 1
            s.add(long_sequence(order, draw.choice("abc"), draw.randrange(1, 30), draw.randrange(1, 30)))
        run(s)
        if len(long.tokens) == long.limit:
            return
    pytest.fail("it waits for ever")
