"""Tinker's own SDK, unmodified, against the routes with a stub engine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import uvicorn
from stub_training import StubTrainingApp

CLIENTS = Path(__file__).parent.parent / "tinker_clients.py"


async def test_the_sdk_trains_saves_loads_and_samples(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(StubTrainingApp(tmp_path).app, log_level="error"))
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = await asyncio.create_subprocess_exec(
            sys.executable, str(CLIENTS), "stub", url,
            env={**os.environ, "TINKER_API_KEY": "tml-any", "TINKER_TELEMETRY": "0"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = await asyncio.wait_for(client.communicate(), 100)
        finally:
            if client.returncode is None:
                client.kill()
            server.should_exit = True
            await serving
    assert client.returncode == 0, said.decode()
