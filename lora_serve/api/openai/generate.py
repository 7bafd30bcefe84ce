"""Run the choices of an API call on the engine and detokenize their outputs.

A choice is one engine `Request`. The first event of every choice is awaited before anything is sent, because a refusal
of any of them is the response to the whole call. However a call ends, all of its streams are closed, which aborts what
is still running.
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
from lora_serve.api.sse import FastJSONResponse, SSEResponse, cancel_on_disconnect
from lora_serve.engine.detokenizer import Detokenizer
from lora_serve.errors import EngineFault, ServeError
from lora_serve.metrics import Timer
from lora_serve.request import AdapterUse, Admitted, Event, Finished, Logprob, Request, Sampling, Served, Tokens


@dataclass(frozen=True)
class Choice:
    """One of the choices to generate (`n` per prompt)."""

    index: int
    request: Request
    stop: tuple[str, ...]
    include_stop: bool


@dataclass
class ChoiceOutput:
    """New output of a choice: text that can be sent, its tokens, and in the last one the finish reason."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob | None] | None = None
    finish_reason: str | None = None
    generated: int = 0
    cached: int = 0


class ApiCall(Protocol):
    """One API call: its choices, and how its response is built."""

    @property
    def choices(self) -> list[Choice]: ...

    def full_response(self, running: list[RunningChoice], outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""

    def chunks(self, running: list[RunningChoice]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""


def make_choices(
    body: Generation,
    id_: str,
    first: int,
    prompt: list[int],
    params: Sampling,
    uses: tuple[AdapterUse, ...],
    tenant: str,
) -> list[Choice]:
    """The `n` choices of one prompt, with indices from `first`; if seeded, each has its own seed."""
    choices = []
    for copy in range(body.n or 1):
        own = params if body.seed is None else msgspec.structs.replace(params, seed=body.seed + copy)
        request = Request(f"{id_}-{first + copy}", prompt, own, uses, tenant)
        choices.append(Choice(first + copy, request, body.stops, bool(body.include_stop_str_in_output)))
    return choices


async def respond(http: HttpRequest, body: Generation, services: Services, endpoint: str, call: ApiCall) -> Response:
    """Run a call and respond, streamed if requested. Raises the `ServeError` that refuses it; `ClientDisconnected`."""
    async with AsyncExitStack() as stack:
        running = await cancel_on_disconnect(
            http, stack.enter_async_context(start_choices(services, endpoint, call.choices))
        )
        if not body.stream:
            return FastJSONResponse(
                call.full_response(running, await cancel_on_disconnect(http, collect_outputs(running)))
            )
        return SSEResponse(call.chunks(running), stack.pop_all())


class RunningChoice:
    """A choice that the engine has admitted."""

    def __init__(
        self, choice: Choice, events: AsyncGenerator[Event, None], admitted: Admitted, tokenizer: Any, timer: Timer
    ) -> None:
        self.choice = choice
        self.adapters: list[Served] = admitted.adapters
        self._events = events
        self._timer = timer
        self._text = Detokenizer(tokenizer, choice.request.prompt, choice.stop, include_stop=choice.include_stop)
        self._generated = 0

    async def outputs(self) -> AsyncGenerator[ChoiceOutput, None]:
        """Yield outputs as they come; the last has a finish reason. Raises the `ServeError` that ends it otherwise."""
        outcome = "abort"
        try:
            async for event in self._events:
                output = self._output(event)
                yield output
                if output.finish_reason is not None:
                    outcome = output.finish_reason
                    return
        except ServeError as error:
            outcome = error.kind
            raise
        finally:
            self._timer.end(outcome, len(self.choice.request.prompt), self._generated)
            await self._events.aclose()  # if a stop string ended it, this aborts the request in the engine

    def _output(self, event: Event) -> ChoiceOutput:
        index = self.choice.index
        if isinstance(event, Tokens):
            self._timer.token(len(event.token_ids))
            self._generated += len(event.token_ids)
            return ChoiceOutput(
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
                self._generated += 1  # counts as generated, though it is not sent
            return ChoiceOutput(index, self._text.flush(), finish_reason=event.reason, generated=self._generated)
        raise EngineFault("the engine admitted a request twice")


@asynccontextmanager
async def start_choices(
    services: Services, endpoint: str, choices: Sequence[Choice]
) -> AsyncIterator[list[RunningChoice]]:
    """Start all choices and wait until each is admitted; closes all at the end. Raises the first refusal."""
    opened: list[tuple[Choice, AsyncGenerator[Event, None], Timer]] = []
    running: list[RunningChoice] = []
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
            running.append(RunningChoice(choice, events, first, services.tokenizer, timer))
        yield running
    except ServeError as error:
        for _, _, timer in opened:
            timer.end(error.kind, 0, 0)
        raise
    finally:
        for _, events, timer in opened:
            timer.end("abort", 0, 0)
            await events.aclose()


async def merge_outputs(running: Sequence[RunningChoice]) -> AsyncGenerator[ChoiceOutput, None]:
    """Outputs of all choices in order of arrival."""
    if len(running) == 1:
        async with aclosing(running[0].outputs()) as outputs:
            async for output in outputs:
                yield output
        return
    ready: asyncio.Queue[ChoiceOutput | BaseException | None] = asyncio.Queue()

    async def pump(one: RunningChoice) -> None:
        try:
            async for output in one.outputs():
                ready.put_nowait(output)
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


async def collect_outputs(running: Sequence[RunningChoice]) -> list[ChoiceOutput]:
    """Run every choice to its end and return one output each, sorted by index."""
    results = {one.choice.index: ChoiceOutput(one.choice.index) for one in running}
    async with aclosing(merge_outputs(running)) as outputs:
        async for output in outputs:
            result = results[output.index]
            result.text += output.text
            result.tokens += output.tokens
            result.logprobs += output.logprobs
            result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
            result.finish_reason = output.finish_reason
            result.generated = output.generated
            result.cached = max(result.cached, output.cached)
    return [results[index] for index in sorted(results)]


def model_fields(running: Sequence[RunningChoice], base: str) -> dict[str, Any]:
    """The response fields `model`, and `adapter` with the exact version; no `adapter` for the base."""
    return served_fields(running[0].adapters, base)


def served_fields(adapters: Sequence[Served], base: str) -> dict[str, Any]:
    """`model_fields` of the adapters that a request was served with."""
    if not adapters:
        return {"model": base}
    versions = [f"{adapter.name}@{adapter.digest[:12]}" for adapter in adapters]
    return {
        "model": "+".join(adapter.name for adapter in adapters),
        "adapter": versions[0] if len(versions) == 1 else versions,
    }


def add_usage(
    chunk: dict[str, Any], options: StreamOptions | None, usage_so_far: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A stream chunk with the usage that `stream_options` asks for."""
    if options is not None and options.continuous_usage_stats:
        return chunk | {"usage": usage_so_far()}
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
