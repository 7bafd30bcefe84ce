"""The fetch process and its client: many fetches at once, progress, time, cancellation, death and limits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from adapter_bytes import FILES, WANTED, WEIGHTS
from web_server import Handler, WebServer

from lora_serve.adapter_sources import parse_source
from lora_serve.errors import AdapterNotFound, BadRequest, Unavailable
from lora_serve.sources.fetch_messages import FetchDone
from lora_serve.sources.fetcher import Fetcher, check_sources


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        server.answers |= {f"/a/poet/{name}": content for name, content in WANTED.items()}
        yield server


class Client:
    """A fetcher of one web server's adapters."""

    def __init__(self, web: WebServer, folder: Path) -> None:
        self.fetcher = Fetcher(["http"])
        self._source = parse_source(f"web=http://{web.host}/a")
        self._folder = folder
        self.progress: list[tuple[int, int | None]] = []

    async def get(self, name: str = "poet", seconds: float = 20.0, most: int = 1 << 30) -> FetchDone:
        self.last = self._folder / f"{name}-{len(list(self._folder.iterdir()))}"
        self.last.mkdir()
        return await self.fetcher.fetch(
            self._source.locate(name),
            str(self.last),
            most=most,
            seconds=seconds,
            limit=300.0,
            on_progress=lambda received, expected: self.progress.append((received, expected)),
        )

    @property
    def process(self) -> psutil.Process:
        return next(
            child for child in psutil.Process().children() if "lora_serve.sources.fetch_process" in child.cmdline()
        )


@pytest_asyncio.fixture
async def client(web: WebServer, tmp_path: Path) -> AsyncIterator[Client]:
    client = Client(web, tmp_path)
    yield client
    await client.fetcher.close()


def stall(answer: Handler) -> None:
    answer.send(WEIGHTS[:1000], length=len(WEIGHTS))
    time.sleep(3)


async def test_fetches_in_one_process_and_ends_with_it(client: Client) -> None:
    done = await asyncio.gather(*(client.get() for _ in range(3)))
    assert [each.received for each in done] == 3 * [sum(map(len, WANTED.values()))]
    assert {path.name: path.read_bytes() for path in client.last.iterdir() if path.is_file()}.items() >= FILES.items()
    assert client.progress
    with pytest.raises(AdapterNotFound, match="source web does not have it"):
        await client.get("nobody")
    process = client.process
    assert process.nice() == 10
    await client.fetcher.close()
    assert not process.is_running()
    with pytest.raises(Unavailable):
        await client.get()


async def test_a_fetch_ends_when_its_time_is_over_and_when_it_is_cancelled(
    client: Client, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_serve.sources.fetcher.GRACE", 0.3)
    web.answers["/a/slow/adapter_config.json"] = stall
    await client.get()
    with pytest.raises(
        Unavailable, match=r"source web did not answer in time: the limit is 300 s \(--source-timeout\)"
    ):
        await client.get("slow", seconds=0.1)
    assert client.process.children() == []
    task = asyncio.create_task(client.get("slow"))
    while not client.process.children():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.process.children() == []
    assert (await client.get()).received  # others are not harmed


async def test_death_of_a_child_and_of_the_process_are_survived(client: Client, web: WebServer) -> None:
    web.answers["/a/slow/adapter_config.json"] = stall
    for kill_child in (True, False):
        task = asyncio.create_task(client.get("slow"))
        await asyncio.sleep(0)
        while not (found := [p for p in psutil.Process().children(recursive=True) if p.ppid() != os.getpid()]):
            await asyncio.sleep(0.01)
        (found[0] if kill_child else client.process).send_signal(signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"ended"):
            await task
        if not kill_child:
            found[0].wait(2)  # ends with its parent
    assert (await client.get()).received


def test_a_file_cannot_grow_beyond_the_limit_whatever_the_code_does(tmp_path: Path) -> None:
    code = (
        "from lora_serve.sources.fetch_process import _bound\n"
        "_bound(1000)\n"
        f"with open({str(tmp_path / 'large')!r}, 'wb', buffering=0) as file:\n"
        "    for _ in range(3): file.write(bytes(600))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGXFSZ


def test_what_is_missing_is_said_before_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [parse_source("support=s3://bucket")]
    check_sources(sources, ["LORA_SERVE_SOURCE_OPTIONS_SUPPORT", "PATH"])
    with pytest.raises(BadRequest, match="LORA_SERVE_SOURCE_OPTIONS_SUPORT is of no --adapter-source"):
        check_sources(sources, ["LORA_SERVE_SOURCE_OPTIONS_SUPORT"])
    monkeypatch.setattr("lora_serve.sources.fetcher.find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"source support needs s3fs: pip install 'lora-serve\[sources\]'"):
        check_sources(sources, [])
