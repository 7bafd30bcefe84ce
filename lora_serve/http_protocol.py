"""Uvicorn's HTTP protocol with limits on connections, headers and bodies, in time and in size.

Uvicorn bounds what an application has not read yet, but not how long a client may take, nor how long headers are. Who
exceeds a limit gets an error and is disconnected. What a whole body may be is decided in `api/limits.py`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_CONNECTIONS = 8192
RESERVED_DESCRIPTORS = 64  # for files and sockets that are not connections; at least a quarter of all
SPARE_CONNECTIONS = 32  # beyond the limit, for health checks and for saying that the limit is reached
HEALTH = (b"/health", b"/ready")

HEADER_BYTES = 64 << 10
URL_BYTES = 8 << 10
PIPELINED = 16  # requests that wait for the response before theirs


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of a server.

    Attributes:
        connections: how many there may be. Beyond, the one that has waited longest for a request is closed; if all
            serve requests, new ones get 503, except health checks.
        header_seconds: until the headers of a request are complete.
        body_seconds: intervals in which the pace of a body is measured.
        body_pace: bytes per second.
        linger: seconds in which the rest of a body is discarded, so that the client sees why.
    """

    connections: int
    header_seconds: float = 15.0
    body_seconds: float = 20.0
    body_pace: int = 4 << 10
    linger: float = 2.0


def connection_limit() -> int:
    """How many connections the process may have, after raising its limit of descriptors as far as is allowed."""
    try:
        import resource  # not available on Windows
    except ImportError:
        return 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(16, min(MOST_CONNECTIONS, soft - max(RESERVED_DESCRIPTORS, soft // 4)))


def limited_protocol(limits: ConnectionLimits) -> Callable[..., LimitedProtocol]:
    """A factory of protocols for uvicorn."""
    return functools.partial(LimitedProtocol, limits=limits)


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._since = self.loop.time()  # when the connection last waited for a request
        self._in_headers = True  # headers are not complete
        self._header_bytes = 0
        self._body_bytes = 0  # since the last check of its pace
        self._refused = False  # nothing is read any more
        self._refusal: tuple[int, str] | None = None  # found by the parser
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waits_for_request(self) -> bool:
        """Whether no request is being served: the headers of the next one are not complete."""
        return self.cycle is None or self.cycle.response_complete

    # --- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_timer(self._limits.header_seconds, self._headers_are_late)
        if len(self.connections) <= self._limits.connections:
            return
        others = [each for each in self.connections if isinstance(each, LimitedProtocol) and each is not self]
        if idle := [each for each in others if each.waits_for_request]:
            min(idle, key=lambda each: each._since)._drop()
        elif len(others) >= self._limits.connections + SPARE_CONNECTIONS:
            self._refuse(503, "the server has too many connections", linger=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._header_bytes += len(data)
        super().data_received(data)
        if self._refusal is None and self._in_headers and self._header_bytes > HEADER_BYTES:
            self._refusal = 431, f"the headers have more than {HEADER_BYTES:,} bytes"
        if self._refusal is not None:
            self._refuse(*self._refusal)

    def shutdown(self) -> None:
        if self._body_is_awaited():
            self._refuse(503, "the server is shutting down")
        else:
            super().shutdown()

    # --- the parser's callbacks --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:  # not the first message
            self._in_headers, self._since, self._header_bytes = True, self.loop.time(), 0
            self._set_timer(self._limits.header_seconds, self._headers_are_late)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > URL_BYTES:
            self._refusal = 414, f"the URL has more than {URL_BYTES:,} bytes"

    def on_headers_complete(self) -> None:
        if sum(len(name) + len(value) for name, value in self.headers) > HEADER_BYTES:
            self._refusal = 431, f"the headers have more than {HEADER_BYTES:,} bytes"
        if len(self.pipeline) >= PIPELINED:
            self._drop()
        self._in_headers = False
        if self._refused or self._refusal is not None:
            return
        if len(self.connections) > self._limits.connections and not self.url.startswith(HEALTH):
            self._refusal = 503, "the server has too many connections"
            return
        super().on_headers_complete()
        self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]
        self.cycle.send = functools.partial(_send, self.cycle, self.cycle.send)  # type: ignore[method-assign]
        self._body_bytes = 0
        self._set_timer(self._limits.body_seconds, self._check_pace)

    def on_body(self, body: bytes) -> None:
        if self._refused or self._refusal is not None:
            return
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not (self._refused or self._refusal is not None):
            self._cancel_timer()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self.cycle.more_body and not self.pipeline:
            self.close_gently()  # the application did not want all of the body
        if self._refused:
            self.server_state.total_requests += 1
        else:
            super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP request")

    # --- limits ------------------------------------------------------------------------------------------------------

    def close_gently(self) -> None:
        """Close the connection after a response; if the client still sends a body, after discarding it for a while."""
        if self.cycle is None or not self.cycle.more_body:
            self.transport.close()
        elif not self._refused:
            self._refused = True
            self.flow.resume_reading()
            self._set_timer(self._limits.linger, self.transport.abort)

    def _headers_are_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # of the request before
            self._set_timer(self._limits.header_seconds, self._headers_are_late)
        elif self._header_bytes:
            self._refuse(408, f"the headers were not complete after {self._limits.header_seconds:g} s")
        else:
            self._drop()

    def _check_pace(self) -> None:
        """Refuse a body that came too slowly, unless it was this process that did not read it."""
        slow = self._body_bytes < self._limits.body_pace * self._limits.body_seconds
        if slow and not self.flow.read_paused:
            self._refuse(408, f"the body came at less than {self._limits.body_pace:,} bytes per second")
            return
        self._body_bytes = 0
        self._set_timer(self._limits.body_seconds, self._check_pace)

    def _body_is_awaited(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_started

    def _refuse(self, status: int, message: str, linger: bool = True) -> None:
        """Respond, if no response has begun, and disconnect."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        active = self.cycle is not None and not self.cycle.response_complete
        if active and self.cycle.response_started:
            self._drop()
            return
        if active:
            self.cycle.disconnected = True  # for the application
            self.cycle.message_event.set()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        phrase = HTTPStatus(status).phrase
        code = phrase.lower().replace(" ", "_").replace("-", "_")
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
            f"{'retry-after: 1' + chr(13) + chr(10) if status == 503 else ''}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if linger:
            self.flow.resume_reading()
            self._set_timer(self._limits.linger, self.transport.abort)
        else:
            self.connections.discard(self)
            self.transport.close()

    def _drop(self) -> None:
        """Disconnect without a response."""
        self._refused = True
        self.connections.discard(self)
        self.transport.abort()

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _send(cycle: RequestResponseCycle, send: Callable[[Any], Awaitable[None]], message: Any) -> None:
    """Send a part of a response. One that begins before the body is complete says that the connection ends with it.

    Otherwise the client would send its next request on a connection that is being closed.
    """
    if cycle.more_body and not cycle.response_started:
        cycle.keep_alive = False
    await send(message)


class _LingeringTransport:
    """What a response is written to. Closing it at once would reset the connection of a client that still sends."""

    def __init__(self, protocol: LimitedProtocol) -> None:
        self._protocol = protocol
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close_gently
