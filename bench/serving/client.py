"""Client for OpenAI's `/v1/completions`: one streamed completion, timed at the client.

Times are when bytes arrived here. A gap is the time between two chunks with output, so a server that sends several
tokens at once shows fewer and longer gaps.
"""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp


@dataclass(frozen=True)
class Server:
    """A server's address, and the request field that selects an adapter there: `adapter` or `model`."""

    url: str
    model: str
    adapter_field: Literal["adapter", "model"] = "adapter"
    api_key: str | None = None

    def body(self, job: Job) -> dict[str, Any]:
        """The request's JSON: greedy and ignoring EOS, so that every server does the same work."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if job.adapter is not None:
            body[self.adapter_field] = job.adapter
        return body

    def session(self) -> aiohttp.ClientSession:
        """A connection pool without a limit: the load decides how many connections there are."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return aiohttp.ClientSession(self.url, headers=headers, connector=aiohttp.TCPConnector(limit=0))


@dataclass(frozen=True)
class Job:
    """One request: prompt token ids, number of output tokens, adapter (None: the base)."""

    prompt: list[int]
    max_tokens: int
    adapter: str | None = None


@dataclass
class Timing:
    """Timing of one request, in seconds of `time.perf_counter`.

    Attributes:
        chunks: arrival time of each chunk with output.
        tokens: output tokens by the server's `usage`, or the number of chunks if it sent none.
        error: why the request failed; None if it did not.
    """

    job: Job
    sent: float
    chunks: list[float] = field(default_factory=list)
    finished: float = 0.0
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


async def stream(session: aiohttp.ClientSession, server: Server, job: Job, timeout: float) -> Timing:
    """Send one request and read its stream to the end. Failures are recorded in the timing, never raised."""
    timing = Timing(job, time.perf_counter())
    await stream_into(session, server, timing, timeout)
    return timing


async def stream_into(session: aiohttp.ClientSession, server: Server, timing: Timing, timeout: float) -> None:
    """Send the timing's request, as `stream` does; what has arrived is in the timing at once."""
    try:
        limit = aiohttp.ClientTimeout(total=timeout)
        async with session.post("/v1/completions", json=server.body(timing.job), timeout=limit) as response:
            if response.status != 200:
                timing.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            else:
                await read(response, timing)
    except TimeoutError:
        timing.error = f"not done after {timeout:g} s"
    except (aiohttp.ClientError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.finished = time.perf_counter()


async def read(response: aiohttp.ClientResponse, timing: Timing) -> None:
    """Read a stream of server-sent events into `timing`."""
    done = False
    counted: int | None = None
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if event.get("error"):
            timing.error = f"in the stream: {event['error'].get('message', event['error'])}"[:200]
            return
        if any(choice.get("text") or not choice.get("finish_reason") for choice in event["choices"]):
            timing.chunks.append(now)
        if event.get("usage"):
            counted = event["usage"]["completion_tokens"]
    timing.tokens = len(timing.chunks) if counted is None else counted
    if not done:
        timing.error = "the stream broke off"
    elif not timing.chunks:
        timing.error = "the stream had no output"
    elif timing.tokens != timing.job.max_tokens:
        timing.error = f"{timing.tokens} tokens instead of {timing.job.max_tokens}"


def list_models(url: str, api_key: str | None = None) -> tuple[str, list[str]]:
    """Names of the base and of the adapters, from `/v1/models`, which lists the base first."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=60) as answer:
        models = [model["id"] for model in json.load(answer)["data"]]
    return models[0], models[1:]
