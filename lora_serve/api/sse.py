"""Server-sent events (SSE), and cancelling work when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ClientDisconnected(Exception):
    """The client has closed the connection, so there is nobody to respond to."""


class FastJSONResponse(Response):
    """A JSON response encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


class SSEResponse(Response):
    """An SSE stream of JSON events from an async generator, ended by `[DONE]`.

    The generator and the exit stack `held` are closed as soon as the client disconnects, even before the first event.
    An error in the middle is sent as an event, as the status line has already been sent.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], held: AsyncExitStack) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            sending = asyncio.ensure_future(self._send(send))
            leaving = asyncio.ensure_future(wait_for_disconnect(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await send(_chunk(b"data: " + _encode(event) + b"\n\n"))
            except ServeError as error:
                await send(_chunk(b"data: " + _encode(error_handlers.body(error)) + b"\n\n"))
            except Exception:
                fault = EngineFault("the server failed on this request")
                await send(_chunk(b"data: " + _encode(error_handlers.body(fault)) + b"\n\n"))
                raise
            finally:
                await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; if the client disconnects first, cancels it and raises `ClientDisconnected`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
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
