"""A replica's server: a child process that ends with its owner, and lets its owner in whatever the keys are."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from server_process import DEMO

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.errors import EngineFault
from lora_serve.replicas import server_child
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, WholeResponse
from lora_serve.replicas.server_child import ServerChild, make_folder
from lora_serve.replicas.server_main import OwnedKeys

FAKE = """
import asyncio, sys, threading, os
from pathlib import Path
key = sys.stdin.readline().strip()
def watch():
    sys.stdin.read(); os._exit(0)
threading.Thread(target=watch, daemon=True).start()
METRICS = 'vllm:lora_adapter_loaded{adapter_name="x",level="gpu",pinned="true"} 1.0\\n' \\
    'vllm:lora_adapter_loaded{adapter_name="y",level="cpu",pinned="false"} 1.0\\n'
async def serve(reader, writer):
    head = (await reader.readuntil(b"\\r\\n\\r\\n")).decode()
    path = head.split()[1]
    def answer(body, headers=""):
        writer.write(f"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nX-Path: {path}\\r\\n{headers}\\r\\n".encode() + body)
    if path == "/metrics":
        body = METRICS if f"Bearer {key}" in head else ""
        answer(body.encode(), f"Content-Length: {len(body)}\\r\\n")
    elif path == "/stream":
        answer(b"5\\r\\nabcde\\r\\n", "Content-Type: text/event-stream\\r\\nTransfer-Encoding: chunked\\r\\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        os._exit(9)
    else:
        answer(b"hi", "Content-Length: 2\\r\\nDate: now\\r\\nX-Two: 1\\r\\nX-Two: 2\\r\\n")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(f"listening http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def fake(tmp_path: Path) -> ServerChild:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    child = ServerChild("r1", {"model": "m"}, (sys.executable, str(program)))
    await child.start()
    return child


async def test_responses_pass_as_they_are_and_a_break_is_told(tmp_path: Path) -> None:
    child = await fake(tmp_path)
    answer = await child.fetch(ForwardedRequest("GET", "/v1/a%2Fb?q=%20x", (("X-A", "1"),)))
    assert isinstance(answer, WholeResponse)
    assert answer.body == b"hi"
    assert answer.begin.header("x-path") == "/v1/a%2Fb?q=%20x"  # not quoted anew
    assert [value for name, value in answer.begin.headers if name == "X-Two"] == ["1", "2"]
    assert answer.begin.header("date") == ""
    assert await child.resident() == {"device": ["x"], "host": ["y"]}
    parts = [part async for part in child.send(ForwardedRequest("POST", "/stream"))]
    assert isinstance(parts[0], ResponseBegin)
    assert parts[1] == b"abcde"
    assert isinstance(parts[2], ServerLost)
    assert await asyncio.wait_for(child.wait(), 5) == 9
    assert not child.running
    lost = await child.fetch(ForwardedRequest("GET", "/"))
    assert isinstance(lost, ServerLost)
    await child.stop()


async def test_a_server_ends_and_its_files_go_when_its_owner_lets_go(tmp_path: Path) -> None:
    child = await fake(tmp_path)
    folder = child._folder
    assert folder.is_dir()
    await child.stop()
    assert not child.running
    assert not folder.exists()


async def test_a_server_that_does_not_start_says_why() -> None:
    child = ServerChild("r1", {"model": str(DEMO), "adapter_slotz": 3})
    with pytest.raises(EngineFault, match=r"status 2 .*adapter_slotz"):
        await child.start()
    await child.stop()


def test_folders_of_servers_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_child.tempfile, "tempdir", str(tmp_path))
    abandoned, lock = make_folder()
    used, held = make_folder()
    os.close(lock)
    old = time.time() - 3600
    for folder in (abandoned, used):
        os.utime(folder / "lock", (old, old))
    _, new = make_folder()
    assert not abandoned.exists()
    assert used.exists()
    for handle in (held, new):
        os.close(handle)


def test_the_owner_has_a_key_beside_those_of_the_file() -> None:
    keys = OwnedKeys(Keys({hash_key("sk-a"): Caller("a")}), "own")
    assert keys.find("sk-a") == Caller("a")
    assert keys.find("sk-b") is None
    owner = keys.find("own")
    assert owner is not None
    assert owner.admin
    assert owner.sees_everything


async def test_a_real_server_lets_its_owner_in_and_ends_with_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"user: {hash_key('sk-user')}\n")
    child = ServerChild("r1", {"model": str(DEMO), "api_key_file": str(keys)})
    try:
        await child.start()
        engine = psutil.Process(child.pid).children()
        refused = await child.fetch(ForwardedRequest("GET", "/metrics"))
        assert isinstance(refused, WholeResponse)
        assert refused.begin.status == 401
        allowed = await child.ask(ForwardedRequest("GET", "/metrics"))
        assert isinstance(allowed, WholeResponse)
        assert allowed.begin.status == 200
        child.abandon()  # as if this process were gone
        await asyncio.wait_for(child.wait(), 10)
        _, left = psutil.wait_procs(engine, 10)
        assert left == []
    finally:
        await child.stop()
