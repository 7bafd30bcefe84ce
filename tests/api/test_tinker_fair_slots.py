"""Slots that keys get in turn."""

from __future__ import annotations

import asyncio
import random

from lora_serve.api.tinker.fair_slots import FairSlots


async def test_a_key_with_much_to_do_does_not_keep_others_waiting() -> None:
    slots, order = FairSlots(2), list[str]()

    async def use(owner: str, number: int) -> None:
        async with slots.slot(owner):
            order.append(f"{owner}{number}")
            await asyncio.sleep(0)

    await asyncio.gather(*(use("a", number) for number in range(6)), use("b", 0), use("b", 1), use("c", 0))
    assert order == ["a0", "a1", "a2", "b0", "c0", "a3", "b1", "a4", "a5"]
    assert repr(slots) == "<FairSlots 2 free, 0 waiting>"


async def test_slots_are_not_lost_when_requests_are_aborted() -> None:
    chosen = random.Random(1)
    slots, running = FairSlots(3), 0

    async def use(owner: str) -> None:
        nonlocal running
        async with slots.slot(owner):
            running += 1
            assert running <= 3
            try:
                for _ in range(chosen.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                running -= 1

    for _ in range(50):
        tasks = [asyncio.create_task(use(chosen.choice("abc"))) for _ in range(10)]
        for _ in range(chosen.randrange(6)):
            await asyncio.sleep(0)
        for task in chosen.sample(tasks, 5):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert repr(slots) == "<FairSlots 3 free, 0 waiting>"
