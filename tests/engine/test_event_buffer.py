"""The bounded buffer between the engine and one reader: no process, no clock."""

from __future__ import annotations

import asyncio

from lora_serve.engine.event_buffer import EventBuffer
from lora_serve.request import Admitted, Finished, Logprob, Tokens


async def test_consecutive_unread_tokens_are_merged_and_other_events_keep_their_place() -> None:
    stream = EventBuffer(limit=100)
    for event in (
        Admitted("r", []),
        Tokens("r", [1], [Logprob(1, -1.0)], prompt_logprobs=[None], cached=3),
        Tokens("r", [2, 3], [Logprob(2, -2.0), Logprob(3, -3.0)]),
        Finished("r", "stop"),
    ):
        assert stream.put(event)
    assert repr(stream) == "<EventBuffer 4 events, 3/100 tokens waiting>"
    assert await stream.get() == Admitted("r", [])
    assert await stream.get() == Tokens(
        "r", [1, 2, 3], [Logprob(1, -1.0), Logprob(2, -2.0), Logprob(3, -3.0)], [None], 3
    )
    assert await stream.get() == Finished("r", "stop")


async def test_a_reader_waits_until_something_arrives() -> None:
    stream = EventBuffer(limit=100)
    reading = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.put(Tokens("r", [1]))
    assert await reading == Tokens("r", [1])


async def test_a_full_buffer_takes_no_tokens_but_always_the_end() -> None:
    stream = EventBuffer(limit=3)
    assert stream.put(Tokens("r", [1, 2]))
    assert not stream.put(Tokens("r", [3, 4]))
    assert stream.put(Finished("r", "error"))
    assert await stream.get() == Tokens("r", [1, 2])
    assert await stream.get() == Finished("r", "error")


async def test_reading_frees_space_and_one_large_event_always_fits() -> None:
    stream = EventBuffer(limit=3)
    assert stream.put(Tokens("r", [1, 2, 3, 4, 5]))
    assert not stream.put(Tokens("r", [6]))
    await stream.get()
    assert stream.put(Tokens("r", [6]))
