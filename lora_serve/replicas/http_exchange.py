"""One HTTP request and its response at the endpoint, over ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.api.sse import ClientDisconnected, cancel_on_disconnect
from lora_serve.errors import BadRequest, ServeError, TooLarge, Unavailable
from lora_serve.replicas import event_framing
from lora_serve.replicas.forwarding import ForwardedRequest, ResponseBegin, ServerLost, passed_on

T = TypeVar("T")

REQUEST_ID = "x-request-id"  # made by Ray's proxy, which sends it itself, and used by the server
REPLICA_HEADER = b"x-lora-serve-replica"  # of a response: who gave it


class BrokenResponse(Exception):
    """A response broke off, and there is no other way to tell the client than to close the connection."""


class HttpExchange:
    """A request, and what is sent back.

    Attributes:
        head: the request without its body.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._begun = False
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.head = ForwardedRequest(scope["method"], _target(scope), passed_on(headers))

    async def read_body(self, most: int) -> bytes:
        """The body. Raises `TooLarge`; `ClientDisconnected`."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            body += message.get("body", b"")
            if len(body) > most:
                raise TooLarge(f"the body is larger than {most:,} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    async def while_connected(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled if the client leaves: then raises `ClientDisconnected`."""
        return await cancel_on_disconnect(self._receive, work)

    async def pass_on(self, begin: ResponseBegin, parts: Sequence[bytes], rest: Any = None) -> None:
        """Send a response as the server gave it. A stream that breaks gets an error event.

        Args:
            rest: what follows the first parts; closed in any case.

        Raises: `ClientDisconnected`; `BrokenResponse` if anything else than a stream of events breaks.
        """
        if rest is None:
            await self._pass_on(begin, parts, _nothing())
            return
        async with aclosing(rest):
            await self.while_connected(self._pass_on(begin, parts, rest))

    async def refuse(self, error: ServeError) -> None:
        """Respond with an error, unless a response has begun."""
        if not self._begun:
            self._begun = True
            await error_handlers.response(error, self._scope)(self._scope, self._receive, self._send)

    async def _pass_on(self, begin: ResponseBegin, parts: Sequence[bytes], rest: AsyncIterator[Any]) -> None:
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in begin.headers
            if name.lower() != REQUEST_ID
        ]
        headers.append((REPLICA_HEADER, begin.replica.encode()))
        self._begun = True
        await self._send({"type": "http.response.start", "status": begin.status, "headers": headers})
        last = parts[-1] if parts else b""
        if parts:
            await self._chunk(b"".join(parts))
        async for part in rest:
            if isinstance(part, ServerLost):
                await self._end_broken(begin, last, part)
                break
            events = part if isinstance(part, list) else [part]
            last = events[-1]
            await self._chunk(b"".join(events))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_broken(self, begin: ResponseBegin, last: bytes, lost: ServerLost) -> None:
        if not begin.is_event_stream:
            raise BrokenResponse(lost.reason)
        if not event_framing.is_last(last):
            error = Unavailable("the server ended while it served this request", retry_after=2)
            await self._chunk(event_framing.error_event(self.head.path, error, begin.header(REQUEST_ID) or None))

    async def _chunk(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


async def accept_lifespan(receive: Receive, send: Send) -> None:
    """The lifespan protocol of an application that has nothing to start or stop."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _target(scope: Scope) -> str:
    """Path below the application's root, and query, as they were sent. Raises `BadRequest`."""
    root, path = scope.get("root_path", "").rstrip("/"), scope["path"]
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    if not path.startswith("/"):
        raise BadRequest("the path must begin with /")
    query = scope.get("query_string", b"").decode("latin-1")
    return quote(path, safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")


async def _nothing() -> AsyncIterator[Any]:
    return
    yield
