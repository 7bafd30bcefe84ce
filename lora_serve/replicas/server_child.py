"""A server as a child process on a free port of loopback, and requests to it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from yarl import URL

from lora_serve.errors import EngineFault
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, WholeResponse, passed_on

COMMAND = (sys.executable, "-m", "lora_serve.replicas.server_main")
LISTENING = re.compile(rb"http://\S+")
FOLDER = "lora-serve-replica-"
ABANDONED = 60.0  # seconds after which a folder that no process holds is removed
CHUNK = 1 << 16
SHOWN_LINES = 3  # of the log of a server that did not start
KEPT_ALIVE = 2.0  # seconds for an idle connection: shorter than the server keeps it, which would end a request on it
STOP_TIMEOUT = 10.0  # seconds to end before it is killed
RESIDENT = re.compile(r'^vllm:lora_adapter_loaded\{adapter_name="([^"]+)",level="(gpu|cpu)"')

Chunks = AsyncGenerator[ResponseBegin | ServerLost | bytes, None]


class ServerChild:
    """One server; `start`, then requests, then `stop`.

    Args:
        replica: its name in what it answers.
        options: of `lora-serve serve`, named with underscores.
        command: program that is given the options' file.
    """

    def __init__(self, replica: str, options: Mapping[str, Any], command: tuple[str, ...] = COMMAND) -> None:
        self._replica = replica
        self._command = command
        self._folder, self._lock = make_folder()
        self._options = {"store": str(self._folder / "store"), **options, "host": "127.0.0.1", "port": 0}
        self._key = secrets.token_urlsafe(32)
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._last_lines: deque[str] = deque(maxlen=SHOWN_LINES)

    async def start(self) -> None:
        """Start the server; returns when it listens. Raises `EngineFault` if it ends instead; its log says why."""
        config = self._folder / "options.yaml"
        config.write_text(yaml.safe_dump(self._options))
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            str(config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(self._lock,),  # so that the folder is in use as long as one of the two processes is there
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._logging = asyncio.create_task(self._pass_log_on())
        self._process.stdin.write(f"{self._key}\n".encode())
        async for line in self._process.stdout:
            if found := LISTENING.search(line):
                self._url = found.group().decode()
                break
        else:
            await self._logging
            status = await self._process.wait()
            raise EngineFault(
                f"the server ended with status {status} before it was ready: " + " ".join(self._last_lines)
            )
        # No limit on time: a long answer is no fault, and a server that is gone closes its connections.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        self._reading = asyncio.create_task(self._drop_output())

    async def wait(self) -> int:
        """Wait until the server has ended; its exit status."""
        assert self._process is not None
        return await self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def stop(self) -> None:
        """End the server and remove its files."""
        if self._session is not None:
            await self._session.close()
        if self.running:
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._remove_folder()

    def abandon(self) -> None:
        """Let the server end by itself, without waiting."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    # --- requests ----------------------------------------------------------------------------------------------------

    async def send(self, request: ForwardedRequest) -> Chunks:
        """The server's response: its beginning, then its body in chunks; `ServerLost` if it breaks off.

        A response that is no stream and not large comes whole. Closing the generator closes the connection, by which
        the server knows that nobody waits any more.
        """
        assert self._session is not None
        try:
            async with self._session.request(
                request.method,
                URL(self._url + request.target, encoded=True),
                headers=[*request.headers],
                data=request.body or None,
                allow_redirects=False,
            ) as response:
                begin = ResponseBegin(self._replica, response.status, passed_on(response.headers.items()))
                if begin.comes_whole:
                    body = await response.read()
                    yield begin
                    yield body
                    return
                yield begin
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, ConnectionError) as error:
            yield ServerLost(self._replica, f"its server closed the connection: {type(error).__name__}")

    async def fetch(self, request: ForwardedRequest) -> WholeResponse | ServerLost:
        """The server's response with its whole body."""
        begin: ResponseBegin | None = None
        body = b""
        async for part in self.send(request):
            if isinstance(part, ServerLost):
                return part
            if isinstance(part, ResponseBegin):
                begin = part
            else:
                body += part
        assert begin is not None
        return WholeResponse(begin, body)

    async def ask(self, request: ForwardedRequest) -> WholeResponse | ServerLost:
        """The same with the server's own key."""
        headers = (*request.headers, ("Authorization", f"Bearer {self._key}"))
        return await self.fetch(ForwardedRequest(request.method, request.target, headers, request.body))

    async def resident(self) -> dict[str, list[str]]:
        """Names of the adapters in memory, by tier; none while the server does not answer."""
        found: dict[str, list[str]] = {"device": [], "host": []}
        answer = await self.ask(ForwardedRequest("GET", "/metrics"))
        if isinstance(answer, WholeResponse) and answer.begin.status == 200:
            for line in answer.body.decode().splitlines():
                if match := RESIDENT.match(line):
                    found["device" if match[2] == "gpu" else "host"].append(match[1])
        return found

    async def _drop_output(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while await self._process.stdout.read(CHUNK):
            pass

    async def _pass_log_on(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(CHUNK):
            text = data.decode(errors="replace")
            self._last_lines.extend(text.splitlines())
            sys.stderr.write(text)
            sys.stderr.flush()


def make_folder() -> tuple[Path, int]:
    """A new folder for a server's files, and the descriptor of its lock; first removes those whose servers are gone."""
    root = Path(tempfile.gettempdir())
    for lock in root.glob(f"{FOLDER}*/lock"):
        try:
            if time.time() - lock.stat().st_mtime < ABANDONED:
                continue
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # held, or another user's
            continue
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle
