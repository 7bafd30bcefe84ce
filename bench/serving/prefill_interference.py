"""Inter-token latency of running streams while a new prompt is prefilled.

    python -m bench.serving.prefill_interference --start "MODEL --adapters DIR --store STORE" --prompts 64,512

keeps all clients but one streaming, each with its own adapter if there are any, and sends prompts one at a time. A gap
between two tokens counts for a prompt if it overlaps the time from sending it to its first token. Printed are the
streams' usual gap (the median outside these times), the median over the prompts of the worst gap of any stream, their
ratio, and the prompts' TTFT. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import aiohttp

from bench.machine import describe
from bench.png_plots import add_png_option, write_png
from bench.report import json_line, number, table
from bench.serving.client import Job, Server, Timing, list_models, read, stream
from bench.serving.launch import launched

PAUSE = 0.7  # seconds between two prompts, in which only the streams run
STREAM_TOKENS = 4000  # enough to outlast the prompts


@dataclass(frozen=True)
class Gaps:
    """Gaps and TTFT in seconds; `worst` is the median over the prompts of the worst gap of any stream."""

    usual: float
    worst: float
    worst_of_all: float
    ttft: float

    @property
    def ratio(self) -> float:
        return self.worst / self.usual


def evaluate(streams: Sequence[Timing], prompts: Sequence[Timing]) -> Gaps:
    """Gaps of the streams, split by whether a prompt was being prefilled."""
    windows = [(prompt.sent, prompt.chunks[0]) for prompt in prompts]
    gaps = [gap for timing in streams for gap in zip(timing.chunks, timing.chunks[1:], strict=False)]
    first, last = windows[0][0] - PAUSE, windows[-1][1] + PAUSE
    free = [
        b - a for a, b in gaps if a >= first and b <= last and not any(a < end and b > begin for begin, end in windows)
    ]
    worst = [max((b - a for a, b in gaps if a < end and b > begin), default=0.0) for begin, end in windows]
    ttft = [prompt.ttft for prompt in prompts]
    return Gaps(statistics.median(free), statistics.median(worst), max(worst), statistics.median(ttft))


async def measure(server: Server, adapters: Sequence[str], clients: int, prompt: int, count: int, seed: int) -> Gaps:
    """Gaps of `clients` - 1 streams during `count` prompts of `prompt` tokens. RuntimeError if one fails."""
    draw = random.Random(seed)

    def job(client: int, tokens: int, output: int) -> Job:
        adapter = adapters[client % len(adapters)] if adapters else None
        return Job(draw.choices(range(300, 2000), k=tokens), output, adapter)

    async with server.session() as session:
        timings = [Timing(job(client, 64, STREAM_TOKENS), 0.0) for client in range(clients - 1)]
        running = [asyncio.ensure_future(_keep_streaming(session, server, timing)) for timing in timings]
        await asyncio.sleep(4)
        prompts = []
        for _ in range(count):
            prompts.append(await stream(session, server, job(clients - 1, prompt, 2), 120))
            await asyncio.sleep(PAUSE)
        ended = [timing for timing, task in zip(timings, running, strict=True) if task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    if ended:
        raise RuntimeError(f"a stream ended before the last prompt: {ended[0].error or 'it had all its tokens'}")
    for each in prompts:
        if each.error is not None:
            raise RuntimeError(each.error)
    return evaluate(timings, prompts)


async def _keep_streaming(session: aiohttp.ClientSession, server: Server, timing: Timing) -> None:
    """Read one stream into `timing` until cancelled."""
    async with session.post("/v1/completions", json=server.body(timing.job)) as response:
        if response.status == 200:
            await read(response, timing)
        else:
            timing.error = f"HTTP {response.status}: {(await response.text())[:200]}"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server")
    where.add_argument("--start", metavar="ARGS", help="start `lora-serve serve ARGS` for the run")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", default="64,512", help="prompt lengths in tokens, comma-separated")
    parser.add_argument("--count", type=int, default=8, help="prompts of each length")
    parser.add_argument("--adapter-field", choices=["adapter", "model"], default="adapter")
    parser.add_argument("--seed", type=int, default=0)
    add_png_option(parser)
    args = parser.parse_args(given)
    with nullcontext(args.url) if args.url else launched(shlex.split(args.start)) as url:
        base, adapters = list_models(url)
        server = Server(url, base, args.adapter_field)
        found = {
            tokens: asyncio.run(measure(server, adapters, args.clients, tokens, args.count, args.seed + tokens))
            for tokens in map(int, args.prompts.split(","))
        }
    rows = [
        [
            f"{tokens} tokens",
            *(number(1e3 * value, 1) for value in (gaps.usual, gaps.worst, gaps.worst_of_all, gaps.ttft)),
            number(gaps.ratio, 2),
        ]
        for tokens, gaps in found.items()
    ]
    print(table(["new prompt", "usual gap ms", "worst gap ms", "worst of all", "its TTFT ms", "worst ÷ usual"], rows))
    content = {
        "bench": "prefill_interference",
        "machine": describe(),
        "arguments": given,
        "gaps": {tokens: asdict(gaps) for tokens, gaps in found.items()},
    }
    line = json_line(content)
    print(line)
    write_png(line, args.png)


if __name__ == "__main__":
    main()
