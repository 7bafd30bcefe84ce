"""Asyncio client of the engine process: token streams and admin calls; survives engine restarts.

The only part of the engine that the API uses. When the engine dies, running requests get an error at once, a new
process is started (`engine/supervisor.py`), and `ready` is False until it serves. Knows neither HTTP nor text, only
token ids.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from lora_serve.config import MOST_SEQS, ServeConfig
from lora_serve.engine.event_buffer import EventBuffer
from lora_serve.engine.supervisor import Supervisor
from lora_serve.errors import EngineFault, Failure, Overloaded, ServeError, Unavailable
from lora_serve.messages import (
    Abort,
    Call,
    Drain,
    EngineInfo,
    FromEngine,
    Generate,
    Operation,
    Reply,
    Stats,
    Update,
)
from lora_serve.request import Event, Finished, Request

COMMAND = (sys.executable, "-m", "lora_serve.engine.process_main")
UNREAD_TOKENS = 4096  # of one stream; a reader this far behind is taken to be gone

log = logging.getLogger(__name__)

Observer = Callable[[Update], None]


class EngineClient:
    """One engine, restarted as often as needed. Use it only on the event loop that called `start`.

    Args:
        config: `max_queue` and `max_num_seqs` bound the number of open streams; `heartbeat_timeout` is in seconds.
        command: program that runs the engine; the socket's address and this process's id are appended.
        unread_tokens: tokens of one stream that may be buffered for its reader.
    """

    def __init__(
        self, config: ServeConfig, *, command: Sequence[str] = COMMAND, unread_tokens: int = UNREAD_TOKENS
    ) -> None:
        self._unread_tokens = unread_tokens
        self._most_streams = config.max_queue + (config.max_num_seqs or MOST_SEQS)
        self._streams: dict[str, EventBuffer] = {}  # by request id, unfinished ones only
        self._readers = 0  # open `generate` generators, including those whose stream is finished
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._observers: list[Observer] = []
        self._stats = Stats()
        self._draining = False
        self._supervisor = Supervisor(config, command, self._handle_message, self._handle_engine_loss)

    def __repr__(self) -> str:
        state = "draining" if self._draining else "ready" if self.ready else "not ready"
        return (
            f"<EngineClient {state}, {len(self._streams)} streams, {len(self._calls)} calls, {self.restarts} restarts>"
        )

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo | None:
        """The base model and engine settings; None before the first start."""
        return self._supervisor.info

    @property
    def stats(self) -> Stats:
        """The latest statistics; zeros while no engine runs."""
        return self._stats

    @property
    def alive(self) -> bool:
        """Whether an engine runs and its heartbeat is recent: less than half of `heartbeat_timeout` ago."""
        return self._supervisor.alive

    @property
    def ready(self) -> bool:
        """Whether new requests are accepted."""
        return self.alive and not self._draining

    @property
    def restarts(self) -> int:
        """How often the engine has been restarted."""
        return self._supervisor.restarts

    # --- work --------------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Serve `request`: yields `Admitted`, `Tokens` or `Embedded`, `Finished`. Closing it early aborts the request.

        `request.id` must not be in use. A reader that falls too far behind gets `Finished` with an error.

        Raises: `Unavailable`, `Overloaded`, both with `retry_after`, before anything is sent.
        """
        child = self._supervisor.child
        if child is None or not self.ready:
            raise self._unavailable("the engine takes no requests at the moment")
        if len(self._streams) >= self._most_streams:
            raise Overloaded("too many requests wait already", retry_after=1.0)
        if request.id in self._streams:
            raise ValueError("the request id is in use")
        stream = EventBuffer(self._unread_tokens)
        self._streams[request.id] = stream
        self._readers += 1
        child.send(Generate(request))
        try:
            while True:
                event = await stream.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._readers -= 1
            if self._streams.get(request.id) is stream:
                del self._streams[request.id]
                self._abort(request.id)

    async def call(self, operation: Operation) -> Any:
        """Run an admin operation; returns its documented result as builtins.

        Raises: the engine's `ServeError`; `Unavailable` if there is no engine or it dies before it answers.
        """
        child = self._supervisor.child
        if child is None:
            raise self._unavailable("the engine is not running at the moment")
        id = next(self._call_ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[id] = answer
        child.send(Call(id, operation))
        try:
            return await answer
        finally:
            self._calls.pop(id, None)

    def observe(self, observer: Observer) -> None:
        """Call `observer` with every update of the engine, on the event loop."""
        self._observers.append(observer)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    async def start(self, on_progress: Callable[[str, float], None] = lambda stage, fraction: None) -> None:
        """Start the engine; returns when it is ready. It is supervised until `stop`.

        Raises: the `ServeError` with which the engine refused to start, `EngineFault` if it died.
        """
        await self._supervisor.start(on_progress)

    async def drain(self, timeout: float) -> None:
        """Stop accepting requests; return when the running ones are finished and read, or after `timeout` seconds."""
        self._draining = True
        deadline = time.monotonic() + timeout
        try:
            await asyncio.wait_for(self.call(Drain()), timeout)
            while self._readers and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("%d requests were still running at the end of the drain", len(self._streams))
        except ServeError as error:
            log.warning("the engine could not be drained: %s", error.message)

    async def stop(self) -> None:
        """End every stream with an error, then the engine. The client cannot be started again."""
        self._draining = True
        self._fail_all(Unavailable("the server is shutting down", retry_after=self._retry_after))
        await self._supervisor.stop()

    def abandon(self) -> None:
        """Kill the engine without waiting; for a process that is about to end."""
        self._supervisor.abandon()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _handle_message(self, message: FromEngine) -> None:
        match message:
            case Update():
                for event in message.events:
                    self._deliver(event)
                if message.stats is not None:
                    self._stats = message.stats
                for observer in self._observers:
                    try:
                        observer(message)
                    except Exception:  # a faulty observer must not end the streams
                        log.exception("an observer of the engine failed")
            case Reply(id, result, failure):
                answer = self._calls.get(id)
                if answer is None or answer.done():
                    return
                if failure is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(failure.error())
            case _:
                log.warning("unexpected %s from the engine", type(message).__name__)

    def _deliver(self, event: Event) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # the reader has left, and the engine had not seen the abort yet
        if isinstance(event, Finished):
            del self._streams[event.request_id]
        if stream.put(event):
            return
        del self._streams[event.request_id]
        self._abort(event.request_id)
        error = EngineFault("the stream was ended because it was not read for too long")
        stream.put(Finished(event.request_id, "error", failure=Failure.of(error)))

    def _abort(self, id: str) -> None:
        child = self._supervisor.child
        if child is not None:
            child.send(Abort(id))

    def _handle_engine_loss(self) -> None:
        self._stats = Stats()
        self._fail_all(self._unavailable("the engine ended while it served this request and is being restarted"))

    def _fail_all(self, error: ServeError) -> None:
        failure = Failure.of(error)
        streams, self._streams = self._streams, {}
        for id, stream in streams.items():
            stream.put(Finished(id, "error", failure=failure))
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                answer.set_exception(failure.error())

    # --- errors ------------------------------------------------------------------------------------------------------

    @property
    def _retry_after(self) -> float:
        return float(min(60, max(1, math.ceil(self._supervisor.start_seconds))))

    def _unavailable(self, message: str) -> Unavailable:
        return Unavailable(message, retry_after=self._retry_after)
