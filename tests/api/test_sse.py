"""Streams: a bug in one is logged and told to the client; a client that does not read stops the work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from stub_completions import StubCompletionApp

from lora_serve.api.sse import SSEResponse


async def broken() -> AsyncGenerator[dict[str, Any], None]:
    yield {"text": "a"}
    raise ZeroDivisionError


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_bug_in_a_stream_is_logged_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    with caplog.at_level(logging.ERROR):
        scope = {"type": "http", "state": {"request_id": "req-7"}}
        await SSEResponse(broken(), AsyncExitStack())(scope, never, send)
    assert b"the server failed on this request" in b"".join(sent)
    assert b"".join(sent).endswith(b"data: [DONE]\n\n")
    (record,) = caplog.records
    assert "req-7" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("n", [1, 2, 16])
async def test_a_client_that_never_reads_stops_the_work(tmp_path: Path, n: int) -> None:
    """The engine's client then buffers, and ends the stream when its buffer is full (`EventBuffer`)."""
    server = StubCompletionApp(tmp_path)
    server.engine.forever = True
    body = f'{{"prompt": "x", "max_tokens": 50, "n": {n}, "stream": true, "ignore_eos": true}}'.encode()
    messages = iter([{"type": "http.request", "body": body}])
    sent = 0
    stopped = asyncio.Event()

    async def receive() -> Any:
        return next(messages, None) or await never()

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent > 3:
            stopped.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    running = asyncio.create_task(server.app(scope, receive, send))
    await stopped.wait()
    await asyncio.sleep(0.1)
    taken = server.engine.events
    await asyncio.sleep(0.1)
    assert server.engine.events == taken < 10 * n
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(server.engine.closed) == n
