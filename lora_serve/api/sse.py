"""Server-sent events (SSE), and cancelling work when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.api.request_record import record_of
from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class StreamFormat:
    """How an API's streams are written.

    Attributes:
        named: whether each event has an `event:` line with its `type`.
        done: the data of a last event, sent also after an error; None is none.
        error: the event for an error in the middle of a stream.
    """

    named: bool
    done: bytes | None
    error: Callable[[ServeError], dict[str, Any]]

    def encode(self, event: dict[str, Any]) -> bytes:
        """The bytes of one event."""
        name = f"event: {event['type']}\n".encode() if self.named else b""
        return name + b"data: " + _encode(event) + b"\n\n"


CHUNKS = StreamFormat(named=False, done=b"[DONE]", error=error_handlers.body)  # of completions and chat completions


class ClientDisconnected(Exception):
    """The client has closed the connection, so there is nobody to respond to."""


class FastJSONResponse(Response):
    """A JSON response encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


class SSEResponse(Response):
    """An SSE stream of JSON events from an async generator.

    The generator and the exit stack `held` are closed as soon as the client disconnects, even before the first event.
    An error in the middle is sent as an event, as the status line has already been sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        held: AsyncExitStack,
        format: StreamFormat = CHUNKS,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._events = events
        self._held = held
        self._format = format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            sending = asyncio.ensure_future(self._send(scope, send))
            leaving = asyncio.ensure_future(wait_for_disconnect(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await send(_chunk(self._format.encode(event)))
            except ServeError as error:
                record_of(scope).failed(error.kind, error.reason)
                await send(_chunk(self._format.encode(self._format.error(error))))
            except Exception:  # a bug
                log.exception("a stream failed; request id: %s", scope.get("state", {}).get("request_id"))
                fault = EngineFault("the server failed on this request")
                record_of(scope).failed(fault.kind, fault.reason)
                await send(_chunk(self._format.encode(self._format.error(fault))))
        # Not if it was cancelled: then the client has left, or does not read.
        done = self._format.done
        last = b"" if done is None else b"data: " + done + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; if the client disconnects first, cancels it and raises `ClientDisconnected`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _chunk(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
