"""The scheduler's decisions, without tensors: token budget, chunked prefill, preemption, slot rotation, no leaks."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.residency import Budget, Residency, Version
from lora_serve.adapters.traits import Traits
from lora_serve.engine.fairness import Fairness
from lora_serve.engine.prefill_pacer import Demand
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.scheduler import PrefillBudget, Scheduler
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.kv.pool import BlockPool
from lora_serve.request import Request, Sampling, Served


def scheduler(blocks: int = 100, *, seqs: int = 8, tokens: int = 16, slots: int = 4, prefix: bool = True) -> Scheduler:
    fairness = Fairness()
    rotation = SlotRotation(fairness, slots, quantum=4)
    return Scheduler(BlockPool(blocks, 4), rotation, fairness, max_seqs=seqs, max_tokens=tokens, prefix_cache=prefix)


def sequence(
    order: int, prompt: list[int] | int, adapter: str | None = None, *, tenant: str = "", traits: Traits | None = None
) -> Sequence:
    traits = traits or Traits()
    tokens = [order * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(
        request=Request(str(order), tokens, Sampling(max_tokens=8), tenant=tenant),
        order=order,
        adapters=() if adapter is None else (Served(adapter, adapter, 1.0),),
        seed=0,
        stop_ids=frozenset(),
        limit=traits.virtual + len(tokens) + 8,
        traits={} if adapter is None else {adapter: traits},
    )


def all_loaded(digest: str) -> bool:
    return True


def schedule(
    s: Scheduler, loaded: Callable[[str], bool] = all_loaded, budget: PrefillBudget | None = None
) -> list[ScheduledSequence]:
    s.assign_slots(loaded, arrived=list(s._loaded._unloaded_with))
    return s.schedule(budget)


def run(
    s: Scheduler, loaded: Callable[[str], bool] = all_loaded, budget: PrefillBudget | None = None
) -> list[ScheduledSequence]:
    """One step in which every sampled sequence gets a token (its own order) and leaves at its limit."""
    work = schedule(s, loaded, budget)
    for item in work:
        s.mark_launched(item)
    process_outputs(s, work)
    return work


def process_outputs(s: Scheduler, work: list[ScheduledSequence]) -> None:
    """Process the outputs of a step."""
    for item in work:
        if item.seq not in s.running and item.seq not in s.waiting:
            continue  # it ended while the step was in flight
        s.mark_computed(item)
        if item.samples:
            item.seq.tokens[item.end] = item.seq.order
            if item.end + 1 == item.seq.limit:
                s.remove(item.seq)


def shape(work: list[ScheduledSequence]) -> list[tuple[int, int, int]]:
    return [(item.seq.order, item.start, item.count) for item in work]


def test_decodes_come_first_and_prompts_fill_the_budget_in_chunks() -> None:
    s = scheduler(tokens=10)
    s.add(sequence(0, 3))
    assert shape(run(s)) == [(0, 0, 3)]
    s.add(sequence(1, 12))
    assert shape(run(s)) == [(0, 3, 1), (1, 0, 9)]
    assert shape(run(s)) == [(0, 4, 1), (1, 9, 3)]
    assert shape(run(s)) == [(0, 5, 1), (1, 12, 1)]


def test_beside_sequences_that_decode_prompts_keep_within_the_prefill_budget() -> None:
    asked: list[Demand] = []

    def budget(demand: Demand) -> int:
        asked.append(demand)
        return 3 if demand.prefills == 2 else 100

    s = scheduler(tokens=10)
    s.add(sequence(0, 8))
    assert shape(run(s, budget=budget)) == [(0, 0, 8)]
    s.add(sequence(1, 4))
    s.add(sequence(2, 4))
    assert shape(run(s, budget=budget)) == [(0, 8, 1), (1, 0, 3)]
    assert shape(run(s, budget=budget)) == [(0, 9, 1), (1, 3, 1), (2, 0, 4)]
    assert shape(run(s, budget=budget)) == [(0, 10, 1), (1, 4, 1), (2, 4, 1)]
    assert asked == [Demand(1, 2, 8, 0.0), Demand(2, 1, 4, 0.0)]


def test_no_more_sequences_than_allowed_are_in_a_step() -> None:
    s = scheduler(seqs=2)
    for order in range(4):
        s.add(sequence(order, 2))
    assert [item.seq.order for item in run(s)] == [0, 1]
    assert (len(s.running), len(s.waiting)) == (2, 2)


def test_a_repeated_prompt_is_found_in_the_prefix_cache_except_for_its_last_token() -> None:
    s = scheduler()
    prompt = list(range(12))
    s.add(sequence(0, prompt))
    run(s)
    s.add(sequence(1, prompt))
    assert shape(run(s)) == [(0, 12, 1), (1, 8, 4)]
    assert s.running.prefix_hits == 8


def test_another_adapter_or_tenant_never_finds_the_same_prompt() -> None:
    s = scheduler(tokens=100)
    prompt = list(range(12))
    s.add(sequence(0, prompt))
    run(s)
    s.add(sequence(1, prompt, "a"))
    s.add(sequence(2, prompt, tenant="someone"))
    run(s)
    assert s.running.prefix_hits == 0


def test_the_youngest_is_preempted_when_blocks_run_out_and_finishes_later() -> None:
    s = scheduler(blocks=5, prefix=False)
    for order in range(2):
        s.add(sequence(order, 7))
    steps = [run(s) for _ in range(40)]
    assert s.running.preemptions >= 1
    assert not s.running
    assert not s.waiting
    assert s.pool.free == 5
    finished = [item.seq.order for work in steps for item in work if len(item.seq.tokens) == item.seq.limit]
    assert finished[0] == 0


def test_a_sequence_whose_adapter_is_not_loaded_lets_others_pass() -> None:
    s = scheduler()
    s.add(sequence(0, 3, "slow"))
    s.add(sequence(1, 3, "fast"))
    assert shape(run(s, lambda digest: digest != "slow")) == [(1, 0, 3)]
    assert shape(run(s))[0][0] == 1
    assert {item.seq.order for item in run(s)} == {0, 1}


def test_a_sequence_whose_adapter_is_being_copied_is_left_out_unless_nothing_else_can_run() -> None:
    s = scheduler()
    s.add(sequence(0, 3, "copied"))
    s.add(sequence(1, 3, "coming"))
    assert s.assign_slots(all_loaded) == ["copied", "coming"]  # both turns begin: the copies may begin too
    work = s.schedule(copying={"coming"})
    assert shape(work) == [(0, 0, 3)]
    for item in work:
        s.mark_launched(item)
    assert (s.assign_slots(all_loaded), shape(s.schedule(copying={"copied", "coming"}))) == ([], [(0, 3, 1), (1, 0, 3)])


def test_a_copy_that_is_not_complete_does_not_count_as_a_prompt_that_waits() -> None:
    asked: list[Demand] = []

    def budget(demand: Demand) -> int:
        asked.append(demand)
        return 100

    s = scheduler()
    s.add(sequence(0, 3))
    run(s)
    s.add(sequence(1, 3, "coming"))
    s.assign_slots(all_loaded)
    assert shape(s.schedule(budget, {"coming"})) == [(0, 3, 1)]
    assert not asked


def test_adapters_that_outnumber_slots_take_turns() -> None:
    s = scheduler(slots=1, tokens=64)
    for order in range(3):
        s.add(sequence(order, 3, f"a{order}"))
    order = [work[0].seq.order for work in (run(s) for _ in range(24)) if work]
    assert order == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4


def test_an_adapter_evicted_from_host_memory_while_it_waits_takes_no_slot() -> None:
    s = scheduler(slots=1, tokens=64)
    s.add(sequence(0, 3, "a"))
    s.add(sequence(1, 3, "b"))
    loaded = {"a", "b"}
    order = []
    for step in range(14):
        work = run(s, loaded.__contains__)
        order.append(work[0].seq.order if work else None)
        if step == 1:
            loaded.remove("b")
        if step == 5:
            loaded.add("b")
    assert order == [0] * 6 + [1] * 6 + [0] * 2  # until both have been served alike


def test_paused_sequences_that_hold_all_blocks_cause_no_deadlock() -> None:
    s = scheduler(blocks=4, slots=1, prefix=False)
    s.add(sequence(0, 8, "a"))
    s.add(sequence(1, 8, "b"))
    for _ in range(40):
        run(s)
        if not s.running and not s.waiting:
            break
    assert not s.running
    assert not s.waiting


def test_prompt_logprobs_are_computed_not_looked_up() -> None:
    s = scheduler()
    prompt = list(range(12))
    s.add(sequence(0, prompt))
    run(s)
    seq = Sequence(
        request=Request("1", prompt, Sampling(max_tokens=1, prompt_logprobs=1)),
        order=1, adapters=(), seed=0, stop_ids=frozenset(), limit=13,
    )  # fmt: skip
    s.add(seq)
    assert (1, 0, 12) in shape(run(s))


def test_virtual_tokens_are_computed_once_for_all_tenants_even_without_a_prefix_cache() -> None:
    s = scheduler(tokens=100, prefix=False)
    virtual = Traits(virtual=9)
    s.add(sequence(0, 6, "a", tenant="one", traits=virtual))
    assert shape(run(s)) == [(0, 0, 15)]
    s.add(sequence(1, 6, "a", tenant="two", traits=virtual))
    s.add(sequence(2, 6, "b", tenant="one", traits=virtual))
    assert shape(run(s)) == [(0, 15, 1), (1, 8, 7), (2, 0, 15)]
    assert (s.running.prefix_hits, list(s.running)[1].cached) == (0, 0)


def test_virtual_tokens_are_found_even_if_the_prompt_must_be_computed() -> None:
    s = scheduler(tokens=100)
    prompt = list(range(6))
    for order in range(2):
        seq = Sequence(
            request=Request(str(order), prompt, Sampling(max_tokens=1, prompt_logprobs=1)),
            order=order, adapters=(Served("a", "a", 1.0),), seed=0, stop_ids=frozenset(), limit=16,
            traits={"a": Traits(virtual=8)},
        )  # fmt: skip
        s.add(seq)
        assert shape(run(s))[-1] == (order, 8 * order, 14 - 8 * order)


def test_virtual_tokens_do_not_count_as_cached_prompt_tokens() -> None:
    s = scheduler(tokens=100)
    for order in range(2):
        s.add(sequence(order, list(range(8)), "a", traits=Traits(virtual=6)))
        run(s)
    assert list(s.running)[1].cached == 6  # three blocks of 4, of which 6 tokens are virtual
    assert (s.running.prefix_hits, s.running.prefix_tokens) == (6, 16)


def test_an_invoked_adapter_finds_the_base_s_prompt_up_to_its_invocation() -> None:
    s = scheduler(tokens=100)
    prompt = list(range(16))
    s.add(sequence(0, prompt))
    run(s)
    s.add(sequence(1, prompt, "a", traits=Traits(invocation=(9, 10))))
    assert shape(run(s))[-1] == (1, 8, 8)
    s.add(sequence(2, prompt, "a", traits=Traits(invocation=(9, 10))))
    assert shape(run(s))[-1] == (2, 12, 4)


def composed(order: int, adapters: tuple[str, ...]) -> Sequence:
    return Sequence(
        request=Request(str(order), [order, 1, 2], Sampling(max_tokens=8)),
        order=order, adapters=tuple(Served(name, name, 1.0) for name in adapters), seed=0, stop_ids=frozenset(),
        limit=11,
    )  # fmt: skip


def test_compositions_that_exceed_host_memory_together_all_finish() -> None:
    """Host memory holds three adapters, of which the device takes two; one is loaded a step."""
    rng = random.Random(0)
    for device in (None, 2):
        assert all(all_finish(rng, device) for _ in range(200))


def all_finish(rng: random.Random, device: int | None) -> bool:
    """Whether seven requests end, loads and slots being decided as the registry does; an adapter takes one byte."""
    s = scheduler(slots=2, tokens=64)
    residency = Residency(Budget(2, 3, device))
    versions = residency.versions
    for name in "abcdefg":
        versions[name] = Version(Summary(name, "", "", 1, "", 1, 1, 1, {}, Traits()), 0.0)
    leases: dict[int, list[tuple[Version, int]]] = {}
    for order in range(7):
        seq = composed(order, tuple(rng.sample("abcdefg", rng.choice((1, 2, 2)))))
        leases[order] = [(versions[digest], residency.lease(versions[digest])) for digest in seq.digests]
        s.add(seq)
    for _ in range(600):
        for part in run(s, lambda digest: versions[digest].in_memory):
            for digest in residency.decide_slots(part.seq.digests) or ():
                residency.leave_device(versions[digest])
            for digest in part.seq.digests:
                if versions[digest].slot is None:
                    residency.enter_device(versions[digest], 1)
                residency.touch(versions[digest])
        left = {seq.order for seq in (*s.running, *s.waiting)}
        for order in leases.keys() - left:
            for version, number in leases.pop(order):
                residency.release(version, number)
        loads = residency.decide_loads()
        for digest in loads.evict:
            if device is None and versions[digest].slot is not None:
                residency.leave_device(versions[digest])
            residency.leave_host(versions[digest])
        for digest in loads.load:
            residency.begin_load(versions[digest])
            residency.end_load(versions[digest], now=0.0)
        assert residency.host_bytes <= 3
        assert residency.device.bytes <= 2
    return not s.running and not s.waiting


def test_random_load_always_ends_with_every_block_back() -> None:
    rng = random.Random(3)
    for trial in range(30):
        s = scheduler(blocks=rng.randrange(8, 30), seqs=rng.randrange(1, 6), tokens=rng.randrange(1, 20), slots=2)
        total = rng.randrange(5, 25)
        for order in range(total):
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
            virtual = {"c": Traits(virtual=6), "b": Traits(invocation=(1, 0))}
            adapter = rng.choice([None, "a", "b", "c"])
            s.add(sequence(order, prompt, adapter, traits=virtual.get(adapter or "")))
            if rng.random() < 0.5:
                run(s)
            if s.waiting and rng.random() < 0.1:
                s.remove(rng.choice(list(s.waiting)))
            if s.running and rng.random() < 0.1:
                s.remove(rng.choice(list(s.running)))
        for _ in range(3000):
            if not s.running and not s.waiting:
                break
            work = run(s)
            assert sum(item.count for item in work) <= s.max_tokens
            assert len(work) <= s.max_seqs
            assert len(s.running) <= 2 * s.max_seqs
            assert all(len(item.seq.blocks) * 4 >= item.start + item.count for item in work if item.seq in s.running)
        assert not s.running, trial
        assert not s.waiting, trial
        assert s.pool.used == 0


def test_steps_scheduled_while_one_is_in_flight_give_the_same_tokens_and_leak_nothing() -> None:
    rng = random.Random(2)
    for trial in range(30):
        s = scheduler(blocks=rng.randrange(8, 30), seqs=rng.randrange(1, 6), tokens=rng.randrange(1, 20), slots=2)
        seqs = [
            sequence(order, [rng.randrange(2) for _ in range(rng.randrange(1, 20))], rng.choice([None, "a", "b", "c"]))
            for order in range(rng.randrange(5, 25))
        ]
        for seq in seqs:
            s.add(seq)
        step_in_flight: list[ScheduledSequence] = []
        for _ in range(3000):
            work = schedule(s)
            assert not any(item.seq.last_token_in_flight for item in work if not item.samples)
            for item in work:
                s.mark_launched(item)
            process_outputs(s, step_in_flight)
            step_in_flight = work
            if not work and not s.running and not s.waiting:
                break
        assert [seq.tokens[: seq.limit] for seq in seqs] == [seq.request.prompt + [seq.order] * 8 for seq in seqs], (
            trial
        )
        assert s.pool.used == 0


def test_a_sequence_whose_last_token_is_in_flight_is_not_scheduled_again() -> None:
    s = scheduler()
    s.add(seq := sequence(0, 3))
    seq.limit = 4
    for item in schedule(s):
        s.mark_launched(item)
    assert (seq.tokens[-1], seq.last_token_in_flight) == (IN_FLIGHT_TOKEN, True)
    assert schedule(s) == []


@pytest.mark.parametrize("adapters", [0, 200], ids=["base only", "200 adapters on 4 slots"])
def test_a_steps_work_does_not_depend_on_how_many_sequences_wait(adapters: int) -> None:
    few, many = (schedule_calls(waiting, adapters) for waiting in (10, 1000))
    assert abs(many - few) <= 20


def schedule_calls(waiting: int, adapters: int) -> int:
    """Python calls of eight `schedule`s with so many sequences waiting, over so many adapters (0: the base)."""
    s = scheduler(seqs=4, slots=4)
    for order in range(4):
        s.add(sequence(order, 3, f"a{order}" if adapters else None))
    for order in range(4, waiting + 4):
        s.add(sequence(order, 3, f"a{order % adapters}" if adapters else None))
    for _ in range(60):  # until every adapter has been looked up
        schedule(s)
    assert len(s.waiting) == waiting
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        for _ in range(8):
            schedule(s)
    finally:
        sys.setprofile(None)
    return calls


def test_a_sequence_whose_adapter_leaves_memory_gives_up_its_blocks_and_row() -> None:
    s = scheduler(seqs=1)
    s.add(sequence(0, 3, "a"))
    run(s)
    s.add(sequence(1, 3, "b"))
    work = run(s, {"b"}.__contains__)
    assert (shape(work), [seq.order for seq in s.waiting]) == ([(1, 0, 3)], [0])


def test_a_newcomer_with_a_right_to_a_row_does_not_wait_behind_anothers_long_prompt() -> None:
    s = scheduler(seqs=2, tokens=8)
    s.add(sequence(0, 4, tenant="hog"))
    run(s)
    s.add(sequence(1, 200, tenant="hog"))
    run(s)
    s.add(sequence(2, 2, tenant="other"))
    for _ in range(3):
        work = run(s)
        assert len(work) == 2  # no row is kept free for somebody who cannot start
        if 2 in (part.seq.order for part in work):
            break
    else:
        pytest.fail("the newcomer waits")


def test_what_is_computed_is_charged_once() -> None:
    s = scheduler(tokens=32)
    s.add(seq := sequence(0, 10))
    for part in schedule(s):
        s.mark_launched(part)
    schedule(s)  # scheduled, and left out of the step that is launched
    assert seq.share.served == 10 + 2
    seq.append_known([5, 6, 7, 8])  # forced by a grammar
    for part in schedule(s):
        s.mark_launched(part)
    assert seq.share.served == 12 + 3 + 2
    s.running.preempt(seq)
    for part in schedule(s):
        s.mark_launched(part)
    assert seq.share.served == 17 + 2


def test_tokens_that_come_while_a_sequence_waits_do_not_falsify_how_many_wait() -> None:
    s = scheduler()
    s.add(seq := sequence(0, 10))
    for part in schedule(s):
        s.mark_launched(part)
    s.running.preempt(seq)
    seq.append_known([5] * 50)
    s.remove(seq)
    s.add(sequence(1, 30))
    assert s.waiting.mean_tokens == 30
