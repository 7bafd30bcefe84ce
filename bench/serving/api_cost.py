"""CPU time of the API process per streamed token, by API and number of streams, with an engine that costs nothing.

    python -m bench.serving.api_cost --model .bench/qwen2.5-0.5b/model --streams 8,64,256

The server is the real one around `bench.serving.scripted_engine`, which gives every stream one token per step. A chunk
per token shows that the API process keeps up: if it does not, it sends several tokens in one chunk. Longer steps cost
more per token, because the caches are cold after them. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import uvloop

from bench.machine import describe
from bench.report import json_line, number, table
from bench.serving.launch import not_ready, run_server

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SETTLE = 1.0  # seconds from the last stream's first chunk to the measurement


@dataclass(frozen=True)
class Cost:
    """What streaming cost: CPU microseconds of the API process per token, the system's for it included."""

    api: str
    streams: int
    chunks_per_token: float
    chunks_per_second: float
    microseconds: float


class Reader(asyncio.Protocol):
    """One stream's client, which only counts chunks, so that it takes little from the process that is measured."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.chunks = 0
        self.started, self.left = (asyncio.get_running_loop().create_future() for _ in range(2))
        self.error = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.chunks += data.count(b"data: {")
        if self.started.done():
            return
        if not data.startswith(b"HTTP/1.1 200"):
            self.error = data.decode(errors="replace")
        self.started.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = self.error or "the server closed the connection"
        if not self.started.done():
            self.started.set_result(None)
        self.left.set_result(None)


def request(api: str, host: str) -> bytes:
    """The bytes of a request for an endless stream."""
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if api == "chat" else {"prompt": "Hello"}
    body = json.dumps(asked | {"stream": True, "max_tokens": 1_000_000}).encode()
    head = f"POST {PATHS[api]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def measure(
    url: str, pid: int, api: str, streams: int, *, step: float, seconds: float, settle: float = SETTLE
) -> Cost:
    """Open streams, measure for some seconds, and leave; times are in seconds."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    readers = [
        (await loop.create_connection(lambda: Reader(request(api, address.netloc)), address.hostname, address.port))[1]
        for _ in range(streams)
    ]
    await asyncio.gather(*(reader.started for reader in readers))
    await asyncio.sleep(settle)
    before, chunks, begin = cpu_seconds(pid), sum(reader.chunks for reader in readers), loop.time()
    await asyncio.sleep(seconds)
    used, end = cpu_seconds(pid) - before, loop.time()
    chunks = sum(reader.chunks for reader in readers) - chunks
    if failed := next((reader.error for reader in readers if reader.error), None):
        raise RuntimeError(f"a stream failed: {failed}")
    for reader in readers:
        reader.transport.abort()
    await asyncio.gather(*(reader.left for reader in readers))
    tokens = streams * (end - begin) / step
    return Cost(api, streams, chunks / tokens, chunks / (end - begin), 1e6 * used / tokens)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, to the nanosecond (Linux): of its threads, not of its children."""
    return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3)


def middle(runs: Sequence[Cost]) -> Cost:
    """The run of median cost."""
    median = statistics.median_low(run.microseconds for run in runs)
    return next(run for run in runs if run.microseconds == median)


def cost_table(costs: Sequence[Cost]) -> str:
    rows = [
        [
            cost.api,
            str(cost.streams),
            number(cost.chunks_per_second, 0),
            number(cost.chunks_per_token, 2),
            number(cost.microseconds, 1),
        ]
        for cost in costs
    ]
    return table(["API", "streams", "chunks/s", "chunks ÷ tokens", "CPU µs per token"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a tokenizer and a chat template")
    parser.add_argument("--streams", type=lambda text: [int(each) for each in text.split(",")], default=[8, 64, 256])
    parser.add_argument("--apis", type=lambda text: text.split(","), default=list(PATHS), help="of chat,completions")
    parser.add_argument("--step-ms", type=float, default=5.0, help="from one token of a stream to the next")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is given")
    args = parser.parse_args(given)
    command = [sys.executable, "-m", "bench.serving.scripted_engine", "serve", args.model]
    runs: dict[tuple[str, int], list[Cost]] = {}
    with run_server([*command, "--step-ms", str(args.step_ms), "--port", "{port}"], not_ready, 60) as (url, process):
        for _ in range(args.repeats):
            for api in args.apis:
                for streams in args.streams:
                    measuring = measure(url, process.pid, api, streams, step=args.step_ms / 1e3, seconds=args.seconds)
                    runs.setdefault((api, streams), []).append(uvloop.run(measuring))
    costs = [middle(each) for each in runs.values()]
    print(cost_table(costs))
    content = {"machine": describe(), "arguments": given, "costs": [asdict(cost) for cost in costs]}
    print(json_line({"bench": "api_cost"} | content))


if __name__ == "__main__":
    main()
