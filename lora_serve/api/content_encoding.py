"""Compressed request bodies: gzip.

A body is decompressed while it is read, so the limits on the size of a body hold for its decompressed size, and a
decompression bomb is never expanded beyond them.
"""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.errors import BadRequest

PIECE = 1 << 16  # bytes decompressed at once
GZIP = 16 + zlib.MAX_WBITS  # zlib's code for gzip's header and checksum


class ContentEncoding:
    """ASGI middleware: decompresses bodies with `Content-Encoding: gzip`; 415 for any other encoding."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encodings = Headers(scope=scope).getlist("content-encoding") if scope["type"] == "http" else []
        encoding = ",".join(encodings).strip().lower()
        if encoding in ("", "identity"):
            await self._app(scope, receive, send)
            return
        if encoding not in ("gzip", "x-gzip"):
            refused = error_handlers.UnsupportedMedia("a body may have Content-Encoding gzip, or none")
            response = error_handlers.response(refused, scope)
            response.headers["Accept-Encoding"] = "gzip"
            await response(scope, receive, send)
            return
        headers = MutableHeaders(raw=list(scope["headers"]))
        del headers["content-encoding"]
        del headers["content-length"]  # of the compressed body
        await self._app({**scope, "headers": headers.raw}, _GzipBody(receive).receive, send)


class _GzipBody:
    """A body that is decompressed piece by piece. Cancelling `receive` loses nothing."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._member = zlib.decompressobj(GZIP)
        self._data = b""  # received, not yet decompressed
        self._more = True  # whether the body has more than `_data`
        self._complete = False  # whether what was decompressed ends with a member's checksum
        self._ended = False

    async def receive(self) -> Message:
        """The next piece of the body, and after the last one what the server sends. Raises `BadRequest`."""
        if self._ended:
            return await self._receive()
        while not self._data and self._more:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._data, self._more = message.get("body", b""), message.get("more_body", False)
        if self._data:
            await asyncio.sleep(0)  # a body of many pieces does not delay other requests
            return {"type": "http.request", "body": self._decompress(), "more_body": True}
        if not self._complete:
            raise BadRequest("the gzip body is cut off")
        self._ended = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _decompress(self) -> bytes:
        try:
            piece = self._member.decompress(self._data, PIECE)
        except zlib.error:
            raise BadRequest("the body is not valid gzip") from None
        self._complete = self._member.eof
        if self._complete:  # further members may follow; their content is appended
            self._data, self._member = self._member.unused_data, zlib.decompressobj(GZIP)
        else:
            self._data = self._member.unconsumed_tail
        return piece
