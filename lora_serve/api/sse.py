"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from lora_serve.api import error_responses
from lora_serve.errors import EngineFault, ServeError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The client closed the connection; nobody is there to be answered."""


class JSON(Response):
    """A JSON body by the fast encoder."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


class EventStream(Response):
    """Data events from an async generator, ended by `[DONE]`.

    Generator and `held` are closed as soon as the client has gone, so that what they hold is freed, even if not one
    event was asked for. An error on the way is a data event of its own: the status line has long been sent.
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
            leaving = asyncio.ensure_future(gone(receive))
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
                await send(_chunk(b"data: " + _encode(error_responses.body(error)) + b"\n\n"))
            except Exception:
                fault = EngineFault("the server failed on this request")
                await send(_chunk(b"data: " + _encode(error_responses.body(fault)) + b"\n\n"))
                raise
            finally:
                await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientGone then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _chunk(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
