"""Limits of a connection, over real sockets: slow, endless and too many requests end, and health checks answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn

from lora_serve.http_protocol import (
    HEADER_BYTES,
    SPARE_CONNECTIONS,
    ConnectionLimits,
    connection_limit,
    limited_protocol,
)

LIMITS = ConnectionLimits(100, header_seconds=0.3, body_seconds=0.2, body_pace=1000, linger=0.3)
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body; `/early` and `/refused` before reading it, `/wait` never."""
    assert scope["type"] == "http"
    length, more = 0, scope["path"] not in ("/early", "/refused")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        more = message["more_body"] or scope["path"] == "/wait"
    headers = [(b"connection", b"close")] if scope["path"] == "/early" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(length).encode()})


class Client:
    """Raw connections to a server on this port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self, text: bytes = b"") -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        writer.write(text)
        return reader, writer

    async def answer(self, text: bytes) -> bytes:
        return await rest(await self.connect(text))

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def serving(limits: ConnectionLimits = LIMITS) -> AsyncIterator[Client]:
    config = uvicorn.Config(
        app,
        http=limited_protocol(limits),  # type: ignore[arg-type]
        port=0,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    client = Client(server.servers[0].sockets[0].getsockname()[1])
    yield client
    server.should_exit = True
    await task
    await client.close()


async def rest(connection: Connection) -> bytes:
    """All that the server sends until it closes the connection."""
    async with asyncio.timeout(5):
        try:
            return await connection[0].read()
        except ConnectionResetError:
            return b""


def status(response: bytes) -> int:
    return int(response.split()[1])


GET = b"GET /%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"


async def test_usual_requests_are_served() -> None:
    async with serving() as client:
        assert (await client.answer(GET % b"health")).endswith(b"\r\n\r\n1\r\n0\r\n0\r\n\r\n")
        body = b"x" * 300_000
        assert b"300000" in await client.answer(POST % (b"", len(body)) + body)
        twice = POST.replace(b"close", b"keep-alive") % (b"", 2) + b"ab"
        assert (await client.answer(twice + twice + GET % b"")).count(b" 200 ") == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", 408),
        (b"GET /" + b"u" * 9000, 414),
        (b"GET /?" + b"u" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"v" * (HEADER_BYTES + 1), 431),
        (b"GET / HTTP/1.1\r\nX: " + b"v" * (HEADER_BYTES + 1) + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: v\r\n" * (HEADER_BYTES // 2) + b"\r\n", 431),
        (POST % (b"", 100), 408),
        (POST % (b"wait", 100) + b"x" * 50, 408),
    ],
)
async def test_incomplete_and_endless_requests_are_refused(text: bytes, expected: int) -> None:
    async with serving() as client:
        response = await client.answer(text)
    assert status(response) == expected
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"]
    assert b"connection: close" in response


async def test_a_response_before_the_end_of_the_body_says_that_the_connection_ends_with_it() -> None:
    post = POST.replace(b"close", b"keep-alive")
    async with serving() as client:
        assert (await client.answer(post % (b"refused", 100) + b"x" * 50)).lower().count(b"connection: close") == 1
        assert (await client.answer(post % (b"early", 100) + b"x" * 50)).lower().count(b"connection: close") == 1
        whole = await client.answer(post % (b"refused", 2) + b"ab" + GET % b"")
    assert whole.count(b" 200 ") == 2  # nothing is left of this body: the connection serves on
    assert b"connection: close" not in whole.partition(b" 200 ")[2].partition(b" 200 ")[0].lower()


async def test_a_connection_without_a_request_is_closed() -> None:
    async with serving() as client:
        began = time.monotonic()
        assert await client.answer(b"") == b""
        assert time.monotonic() - began < 2


async def test_endless_headers_end_while_they_are_sent() -> None:
    async with serving() as client:
        _, writer = await client.connect(b"GET / HTTP/1.1\r\n")
        ended = False
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            writer.write(b"x: " + b"y" * 10_000 + b"\r\n")
            try:
                await writer.drain()
            except ConnectionError:
                ended = True
        assert ended


async def test_a_slow_body_is_no_idle_one() -> None:
    async with serving() as client:
        reader, writer = await client.connect(POST % (b"", 1000))
        for _ in range(10):  # for longer than any of the limits
            writer.write(b"x" * 100)
            await asyncio.sleep(0.05)
        assert b"1000" in await rest((reader, writer))


async def test_a_response_before_the_end_of_the_body_reaches_the_client() -> None:
    async with serving() as client:
        reader, writer = await client.connect(POST % (b"early", 8 << 20))
        writer.write(b"x" * (8 << 20))
        assert status(await reader.read(100)) == 200


async def test_idle_connections_give_way_to_new_ones() -> None:
    limits = ConnectionLimits(10, header_seconds=30)
    async with serving(limits) as client:
        half_sent = [await client.connect(b"GET / HTTP/1.1\r\nHost: x\r\n") for _ in range(40)]
        assert status(await client.answer(GET % b"")) == 200
        assert await rest(half_sent[0]) == b""  # the oldest were closed
        half_sent[-1][1].write(b"Connection: close\r\n\r\n")
        assert status(await rest(half_sent[-1])) == 200  # the newest were not


async def test_with_all_connections_in_use_new_requests_are_refused_and_health_checks_answered() -> None:
    async with serving(ConnectionLimits(10)) as client:
        waiting = [await client.connect(GET.replace(b"close", b"keep-alive") % b"wait") for _ in range(10)]
        await asyncio.sleep(0.1)
        assert status(await client.answer(GET % b"")) == 503
        assert status(await client.answer(GET % b"health")) == 200
        more = [await client.connect(GET % b"health?wait") for _ in range(2 * SPARE_CONNECTIONS)]
        assert {status(response) for response in await asyncio.gather(*map(rest, more))} <= {200, 503}
        for _, writer in waiting:
            writer.close()
        await asyncio.sleep(0.1)
        assert status(await client.answer(GET % b"")) == 200


async def test_too_many_pipelined_requests_end_the_connection() -> None:
    async with serving() as client:
        reader, writer = await client.connect(GET.replace(b"close", b"keep-alive") % b"wait" * 100)
        assert await rest((reader, writer)) == b""


async def test_a_stop_does_not_wait_for_an_unfinished_body() -> None:
    async with serving(ConnectionLimits(10)) as client:
        connection = await client.connect(POST % (b"", 100))
        await asyncio.sleep(0.1)
        began = time.monotonic()
    assert status(await rest(connection)) == 503
    assert time.monotonic() - began < 3


def test_the_limit_leaves_descriptors_for_other_things() -> None:
    import resource

    limit = connection_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    assert 16 <= limit <= soft - 64
