"""Run the choices of an API call on the engine and detokenize their outputs.

A choice is one engine `Request`. The first event of the choices that start at once is awaited before anything is sent,
because a refusal of any of them is the response to the whole call. However a call ends, all of its streams are closed,
which aborts what is still running.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec

from lora_serve.api.caller import Caller
from lora_serve.api.openai.schemas import Generation
from lora_serve.api.request_record import RequestRecord
from lora_serve.api.services import Services
from lora_serve.engine.detokenizer import Detokenizer
from lora_serve.errors import AdapterNotFound, EngineFault, ServeError, Unavailable
from lora_serve.request import (
    AdapterUse,
    Admitted,
    Event,
    Finished,
    Logprob,
    Request,
    Routing,
    Sampling,
    Served,
    Tokens,
)

MOST_AT_ONCE = 256  # requests of one call in the engine


@dataclass(frozen=True)
class Choice:
    """One of the choices to generate (`n` per prompt); `hidden`: see `Detokenizer`."""

    index: int
    request: Request
    stop: tuple[str, ...]
    include_stop: bool
    hidden: frozenset[int] | None = None


@dataclass
class ChoiceOutput:
    """New output of a choice: text that can be sent, its tokens, and in the last one the finish reason.

    `stop_string` is the stop string that ended it, if one did. A collected output has the `pieces` it consists of.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob | None] | None = None
    finish_reason: str | None = None
    generated: int = 0
    cached: int = 0
    stop_string: str | None = None
    pieces: list[ChoiceOutput] = field(default_factory=list)


def make_choices(
    body: Generation,
    id_: str,
    first: int,
    prompt: list[int],
    params: Sampling,
    uses: tuple[AdapterUse, ...],
    caller: Caller,
    hidden: frozenset[int] | None = None,
) -> list[Choice]:
    """The `n` choices of one prompt, with indices from `first`; if seeded, each has its own seed."""
    choices = []
    for copy in range(body.n or 1):
        own = params if body.seed is None else msgspec.structs.replace(params, seed=body.seed + copy)
        request = Request(
            f"{id_}-{first + copy}", prompt, own, uses, caller.name, priority=body.priority or 0, weight=caller.share
        )
        shown = frozenset() if body.skip_special_tokens is False else hidden
        choices.append(Choice(first + copy, request, body.stops, bool(body.include_stop_str_in_output), shown))
    return choices


def requests_at_once(services: Services) -> int:
    """How many requests of one call are in the engine at the same time, so that it does not fill the queue alone."""
    return min(MOST_AT_ONCE, services.config.max_queue)


class RunningChoice:
    """A choice on the engine: `admit`, then `outputs`; `close` on every path."""

    def __init__(self, choice: Choice, services: Services, endpoint: str, record: RequestRecord) -> None:
        self.choice = choice
        self._record = record
        self.adapters: list[Served] = []  # once admitted
        self._timer = services.metrics.begin(endpoint)
        self._services = services
        self._events = services.engine.generate(choice.request)
        self._text = Detokenizer(
            services.tokenizer,
            choice.request.prompt,
            choice.stop,
            include_stop=choice.include_stop,
            hidden=choice.hidden,
        )
        self._generated = 0

    async def admit(self) -> None:
        """Wait until the engine admits the choice, and before that until its adapters are fetched, if need be.

        Raises the `ServeError` that refuses it.
        """
        self._record.sending()
        request = self.choice.request
        try:
            try:
                first = await self._first()
            except AdapterNotFound:
                names = [use.name for use in request.adapters]
                if not await self._services.sources.fetch_missing(names, request.tenant):
                    raise
                self._events = self._services.engine.generate(request)
                first = await self._first()
        except ServeError as error:
            self._timer.end(error.kind, 0, 0)
            raise
        assert isinstance(first, Admitted)
        self.adapters = first.adapters
        self._record.admitted(self.choice.request, first.adapters)
        if first.adapters:
            self._timer.admitted(first.adapters[0].name)

    async def _first(self) -> Event:
        first = await anext(self._events)
        if isinstance(first, Finished):
            raise first.failure.error() if first.failure else EngineFault("the request was ended by the server")
        return first

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
            self._record.failed(error.kind, error.reason)  # an API may send it as an event of its own
            raise
        finally:
            self._timer.end(outcome, len(self.choice.request.prompt), self._generated)
            self._record.finished(self.choice.index, outcome)
            await self._events.aclose()  # if a stop string ended it, this aborts the request in the engine

    async def close(self) -> None:
        """Abort the choice if it still runs."""
        self._timer.end("abort", 0, 0)
        await self._events.aclose()

    def _output(self, event: Event) -> ChoiceOutput:
        index = self.choice.index
        if isinstance(event, Tokens):
            self._timer.token(len(event.token_ids))
            self._record.generated(event)
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
                self._text.stop_string,
            )
        if isinstance(event, Finished):
            if event.failure is not None:
                raise event.failure.error()
            if event.reason not in ("stop", "length"):
                raise EngineFault("the request was ended by the server")
            ended = ChoiceOutput(index, self._text.flush(), finish_reason=event.reason)
            if event.stop_token is not None:  # a generated token, though it has no text
                self._generated += 1
                self._record.completion_tokens += 1
                ended.tokens = [event.stop_token]
                ended.logprobs = [] if event.stop_logprob is None else [event.stop_logprob]
            ended.generated = self._generated
            return ended
        raise EngineFault("the engine admitted a request twice")


class RunningCall:
    """The choices of one API call on the engine: the first ones at once, each of the others when one ends.

    So a call with more choices than the queue takes is served by an idle server, and never fills the queue alone.

    Args:
        routing: what aliases choose by, for all of them.
    """

    def __init__(
        self, services: Services, endpoint: str, choices: Sequence[Choice], record: RequestRecord, routing: Routing
    ) -> None:
        self._services = services
        self._routing = routing
        self._record = record
        self._endpoint = endpoint
        self._later = deque(choices)
        self._opened: list[RunningChoice] = []

    @property
    def adapters(self) -> list[Served]:
        """The adapter versions that serve the call."""
        return self._opened[0].adapters

    async def start(self) -> None:
        """Start the first choices and wait until each is admitted. Raises the first refusal.

        Raises Unavailable as well if they got different versions, since those were changed in between.
        """
        count = min(len(self._later), requests_at_once(self._services))
        first = [self._open() for _ in range(count)]
        for refused in await asyncio.gather(*(each.admit() for each in first), return_exceptions=True):
            if refused is not None:
                raise refused
        if any(each.adapters != self.adapters for each in first):
            raise Unavailable("the adapter was replaced while the call began; ask again", retry_after=1)

    async def outputs(self) -> AsyncGenerator[ChoiceOutput, None]:
        """Outputs of all choices in order of arrival."""
        if len(self._opened) == 1 and not self._later:
            async with aclosing(self._opened[0].outputs()) as outputs:
                async for output in outputs:
                    yield output
            return
        # Bounded: while nobody reads, the choices' own buffers fill, and they are cut off as a single one would be.
        ready: asyncio.Queue[ChoiceOutput | BaseException | None] = asyncio.Queue(len(self._opened))

        async def pump(one: RunningChoice) -> None:
            try:
                while True:
                    async with aclosing(one.outputs()) as outputs:
                        async for output in outputs:
                            await ready.put(output)
                    if not self._later:
                        break
                    one = self._open()
                    await one.admit()
                await ready.put(None)
            except Exception as error:
                await ready.put(error)

        pumps = [asyncio.ensure_future(pump(one)) for one in self._opened]
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

    async def close(self) -> None:
        """Abort every choice that still runs."""
        for each in self._opened:
            await each.close()

    def _open(self) -> RunningChoice:
        choice = self._later.popleft()
        if self._opened and (served := self.adapters):  # the same versions, even if there are new ones by now
            pairs = zip(served, choice.request.adapters, strict=True)
            uses = tuple(AdapterUse(each.name, each.digest, each.weight, use.settings_applied) for each, use in pairs)
            choice = replace(choice, request=msgspec.structs.replace(choice.request, adapters=uses))
        elif choice.request.adapters:
            choice = replace(choice, request=msgspec.structs.replace(choice.request, routing=self._routing))
        opened = RunningChoice(choice, self._services, self._endpoint, self._record)
        self._opened.append(opened)
        return opened


@asynccontextmanager
async def start_choices(
    services: Services, endpoint: str, choices: Sequence[Choice], record: RequestRecord, routing: Routing
) -> AsyncIterator[RunningCall]:
    """Start a call's choices, and record what they do; closes all at the end. Raises the first refusal."""
    call = RunningCall(services, endpoint, choices, record, routing)
    try:
        await call.start()
        yield call
    finally:
        await call.close()


async def collect_outputs(running: RunningCall) -> list[ChoiceOutput]:
    """Run every choice to its end and return one output each, sorted by index."""
    results: dict[int, ChoiceOutput] = {}
    async with aclosing(running.outputs()) as outputs:
        async for output in outputs:
            result = results.setdefault(output.index, ChoiceOutput(output.index))
            result.text += output.text
            result.tokens += output.tokens
            result.logprobs += output.logprobs
            result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
            result.finish_reason = output.finish_reason
            result.stop_string = output.stop_string
            result.generated = output.generated
            result.cached = max(result.cached, output.cached)
            result.pieces.append(output)
    return [results[index] for index in sorted(results)]
