"""From requests to text: several choices at once, each a stream of parts.

A choice is one `Request` to the engine. Its first event decides whether the whole call is answered at all, so it is
awaited for every choice before anything is sent. However a call ends, all of its streams are closed, which aborts
what still runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from fastapi import Request as HttpRequest
from fastapi import Response

from lora_serve.api.openai.schemas import Generation, StreamOptions
from lora_serve.api.services import Services
from lora_serve.api.sse import JSON, EventStream, while_connected
from lora_serve.engine.detokenizer import Detokenizer
from lora_serve.errors import EngineFault, ServeError
from lora_serve.metrics import Timer
from lora_serve.request import AdapterUse, Admitted, Event, Finished, Logprob, Request, Sampling, Served, Tokens


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for."""

    index: int
    request: Request
    stop: tuple[str, ...]
    include_stop: bool


@dataclass
class Part:
    """What became known of a choice: text that can be sent, the tokens behind it, and at last why it ended."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob | None] | None = None
    finish_reason: str | None = None
    generated: int = 0
    cached: int = 0


class Call(Protocol):
    """One call to the API: what is asked for, and how its answer is written down."""

    @property
    def choices(self) -> list[Choice]: ...

    def answer(self, running: list[Running], parts: list[Part]) -> dict[str, Any]:
        """The whole response."""

    def chunks(self, running: list[Running]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""


def copies(
    body: Generation,
    id_: str,
    first: int,
    prompt: list[int],
    params: Sampling,
    uses: tuple[AdapterUse, ...],
    tenant: str,
) -> list[Choice]:
    """The `n` choices of one prompt, numbered from `first`; with a seed, each has one of its own."""
    choices = []
    for copy in range(body.n or 1):
        own = params if body.seed is None else msgspec.structs.replace(params, seed=body.seed + copy)
        request = Request(f"{id_}-{first + copy}", prompt, own, uses, tenant)
        choices.append(Choice(first + copy, request, body.stops, bool(body.include_stop_str_in_output)))
    return choices


async def respond(http: HttpRequest, body: Generation, services: Services, endpoint: str, call: Call) -> Response:
    """Run a call and answer it, streamed if asked for. Raises what refuses it, and ClientGone."""
    async with AsyncExitStack() as stack:
        running = await while_connected(http, stack.enter_async_context(started(services, endpoint, call.choices)))
        if not body.stream:
            return JSON(call.answer(running, await while_connected(http, whole(running))))
        return EventStream(call.chunks(running), stack.pop_all())


class Running:
    """A choice that the engine took in."""

    def __init__(
        self, choice: Choice, events: AsyncGenerator[Event, None], admitted: Admitted, tokenizer: Any, timer: Timer
    ) -> None:
        self.choice = choice
        self.adapters: list[Served] = admitted.adapters
        self._events = events
        self._timer = timer
        self._text = Detokenizer(tokenizer, choice.request.prompt, choice.stop, include_stop=choice.include_stop)
        self._generated = 0

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Parts as they come; the last has a finish reason. Raises the ServeError that ends it otherwise."""
        outcome = "abort"
        try:
            async for event in self._events:
                part = self._part(event)
                yield part
                if part.finish_reason is not None:
                    outcome = part.finish_reason
                    return
        except ServeError as error:
            outcome = error.kind
            raise
        finally:
            self._timer.end(outcome, len(self.choice.request.prompt), self._generated)
            await self._events.aclose()  # a stop string ends it here: what the engine would still say is not wanted

    def _part(self, event: Event) -> Part:
        index = self.choice.index
        if isinstance(event, Tokens):
            self._timer.token(len(event.token_ids))
            self._generated += len(event.token_ids)
            return Part(
                index,
                self._text.feed(event.token_ids),
                event.token_ids,
                event.logprobs or [],
                event.prompt_logprobs,
                "stop" if self._text.stopped else None,
                self._generated,
                event.cached,
            )
        if isinstance(event, Finished):
            if event.failure is not None:
                raise event.failure.error()
            if event.reason not in ("stop", "length"):
                raise EngineFault("the request was ended by the server")
            if event.stop_token is not None:
                self._generated += 1  # it was generated, though not sent
            return Part(index, self._text.flush(), finish_reason=event.reason, generated=self._generated)
        raise EngineFault("the engine admitted a request twice")


@asynccontextmanager
async def started(services: Services, endpoint: str, choices: Sequence[Choice]) -> AsyncIterator[list[Running]]:
    """All choices taken in by the engine; all closed at the end. Raises the ServeError that refuses any of them."""
    opened: list[tuple[Choice, AsyncGenerator[Event, None], Timer]] = []
    running: list[Running] = []
    try:
        for choice in choices:
            opened.append((choice, services.engine.generate(choice.request), services.metrics.begin(endpoint)))
        firsts = await asyncio.gather(*(anext(events) for _, events, _ in opened), return_exceptions=True)
        for (choice, events, timer), first in zip(opened, firsts, strict=True):
            if isinstance(first, BaseException):
                raise first
            if isinstance(first, Finished):
                raise first.failure.error() if first.failure else EngineFault("the request was ended by the server")
            assert isinstance(first, Admitted)
            if first.adapters:
                timer.admitted(first.adapters[0].name)
            running.append(Running(choice, events, first, services.tokenizer, timer))
        yield running
    except ServeError as error:
        for _, _, timer in opened:
            timer.end(error.kind, 0, 0)
        raise
    finally:
        for _, events, timer in opened:
            timer.end("abort", 0, 0)
            await events.aclose()


async def merged(running: Sequence[Running]) -> AsyncGenerator[Part, None]:
    """Parts of all choices in the order in which they come."""
    if len(running) == 1:
        async with aclosing(running[0].parts()) as parts:
            async for part in parts:
                yield part
        return
    ready: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()

    async def pump(one: Running) -> None:
        try:
            async for part in one.parts():
                ready.put_nowait(part)
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    pumps = [asyncio.ensure_future(pump(one)) for one in running]
    try:
        left = len(pumps)
        while left:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def whole(running: Sequence[Running]) -> list[Part]:
    """Every choice to its end: one part each, in order of index."""
    results = {one.choice.index: Part(one.choice.index) for one in running}
    async with aclosing(merged(running)) as parts:
        async for part in parts:
            result = results[part.index]
            result.text += part.text
            result.tokens += part.tokens
            result.logprobs += part.logprobs
            result.prompt_logprobs = part.prompt_logprobs or result.prompt_logprobs
            result.finish_reason = part.finish_reason
            result.generated = part.generated
            result.cached = max(result.cached, part.cached)
    return [results[index] for index in sorted(results)]


def answered_by(running: Sequence[Running], base: str) -> dict[str, Any]:
    """The response's `model`: what answered; and `adapter`: which version exactly, absent for the base."""
    adapters = running[0].adapters
    if not adapters:
        return {"model": base}
    versions = [f"{adapter.name}@{adapter.digest[:12]}" for adapter in adapters]
    return {
        "model": "+".join(adapter.name for adapter in adapters),
        "adapter": versions[0] if len(versions) == 1 else versions,
    }


def with_usage(
    chunk: dict[str, Any], options: StreamOptions | None, spent: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A chunk of a stream with the usage that `stream_options` wants in it."""
    if options is not None and options.continuous_usage_stats:
        return chunk | {"usage": spent()}
    if options is not None and options.include_usage:
        return chunk | {"usage": None}
    return chunk


def usage(prompt_tokens: int, completion_tokens: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
