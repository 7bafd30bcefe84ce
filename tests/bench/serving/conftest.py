"""A fake server that runs in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fake_openai import FakeServer

from bench.serving.client import Server


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, Server]]:
    fake = FakeServer()
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield fake, Server(f"http://127.0.0.1:{port}", "base")
    server.should_exit = True
    await serving
