"""What a request must pass before its body is read, and how much memory bodies may take together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from stub_admin import StubAdminApp

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.limits import BODIES_IN_MEMORY, SMALL_BODY

LARGEST = 200_000  # bytes of a body


class Exchange:
    """One request; its body comes piece by piece."""

    def __init__(self, app: Any, path: str = "/v1/unload_lora_adapter", *headers: tuple[bytes, bytes]) -> None:
        self.pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.taken = 0
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
        }
        self.task = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        piece = await self.pieces.get()
        self.taken += 1
        return piece

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])

    async def give(self, body: bytes, *, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": body, "more_body": more})
        await asyncio.sleep(0.01)


@pytest.fixture
def keys() -> Keys:
    return Keys({hash_key("sk-boss"): Caller("boss", admin=True)})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters", "/v1/messages", "/no/such", "/metrics"])
async def test_without_a_key_nothing_of_the_body_is_read(tmp_path: Path, keys: Keys, path: str) -> None:
    exchange = Exchange(StubAdminApp(tmp_path, keys).app, path)
    await exchange.give(b"{")
    await asyncio.wait_for(exchange.task, 1)
    assert exchange.status == 401
    assert exchange.taken == 0
    assert exchange.headers[b"connection"] == b"close"


async def test_a_body_is_refused_when_it_is_announced_or_becomes_too_large(tmp_path: Path) -> None:
    app = StubAdminApp(tmp_path, max_body=LARGEST).app
    for length in (b"200001", b"9" * 5000):
        announced = Exchange(app, "/v1/unload_lora_adapter", (b"content-length", length))
        await asyncio.wait_for(announced.task, 1)
        assert (announced.status, announced.taken) == (413, 0)
    endless = Exchange(app)
    while not endless.task.done():
        await endless.give(b" " * 10_000)
    assert (endless.status, endless.taken) == (413, 21)


async def test_large_bodies_have_a_limit_together_and_small_ones_pass(tmp_path: Path) -> None:
    app = StubAdminApp(tmp_path, max_body=LARGEST).app
    unfinished = [Exchange(app) for _ in range(2 * BODIES_IN_MEMORY)]
    for exchange in unfinished:
        await exchange.give(b" " * LARGEST)
    refused = [exchange for exchange in unfinished if exchange.task.done()]
    assert 0 < len(refused) < len(unfinished) - BODIES_IN_MEMORY + 1
    assert {exchange.status for exchange in refused} == {503}
    assert refused[0].headers[b"retry-after"] == b"1"
    small = Exchange(app)
    await small.give(b'{"lora_name": "poet"}' + b" " * (SMALL_BODY // 2), more=False)
    await asyncio.wait_for(small.task, 1)
    assert small.status == 404  # of the route: there is no such adapter
    for exchange in unfinished:
        exchange.pieces.put_nowait({"type": "http.disconnect"})
    await asyncio.sleep(0.01)
    large = Exchange(app)  # now there is room again
    await large.give(b'{"lora_name": "poet"}' + b" " * (LARGEST - 100), more=False)
    await asyncio.wait_for(large.task, 1)
    assert large.status == 404
    await asyncio.gather(*(exchange.task for exchange in unfinished))
