"""What a request must pass before its body is read, and how much memory bodies may take.

Bodies are read into memory here, before routing, up to the limit. Uploads pass through: they are streamed to disk
under their own limit (`upload.py`). How slow a client may be is decided in `http_protocol.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve import malloc
from lora_serve.api import error_handlers
from lora_serve.api.auth import authorize
from lora_serve.errors import ServeError, TooLarge, Unavailable

SMALL_BODY = 64 << 10  # bytes; this much of a body does not count towards the bodies in memory
BODIES_IN_MEMORY = 8  # of the largest size
TRIM_AFTER = 2.0  # seconds after a large body


class RequireKey:
    """ASGI middleware: 401 for requests without a valid key, before their body is read.

    What the key allows is decided by each route.

    Args:
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, open_paths: Container[str]) -> None:
        self._app = app
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                authorize(Request(scope))
            except ServeError as error:
                await _refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: 413 for bodies over `most` bytes, with or without a Content-Length.

    A body is in memory until the application waits for what comes after it. While `BODIES_IN_MEMORY` large ones are,
    others get 503.

    Args:
        is_upload: whether a request (method, path) is an upload.
    """

    def __init__(self, app: ASGIApp, most: int, is_upload: Callable[[str, str], bool]) -> None:
        self._app = app
        self._most = most
        self._is_upload = is_upload
        self._in_memory = 0  # bytes
        self._trimming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_upload(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        counted = 0
        large = False

        def count(bytes_: int) -> None:
            nonlocal counted
            self._in_memory += bytes_ - counted
            counted = bytes_

        try:
            if announced.isdigit() and (len(announced) > 18 or int(announced) > self._most):
                raise self._too_large()
            body = bytearray()
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self._most:
                    raise self._too_large()
                count(max(0, len(body) - SMALL_BODY))
                large = counted > 0
                if self._in_memory > BODIES_IN_MEMORY * self._most:
                    raise Unavailable("too many large bodies at the same time", retry_after=1)
            whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}
            del body

            async def replay() -> Message:
                nonlocal whole
                if whole is None:
                    count(0)
                    return await receive()
                message, whole = whole, None
                return message

            await self._app(scope, replay, send)
        except (TooLarge, Unavailable) as error:
            await _refuse(error, scope, receive, send)
        finally:
            if large:
                self._trim_soon()
            count(0)

    def _trim_soon(self) -> None:
        """Return the memory of large bodies, and of what was made of them, to the system a moment later."""
        if self._trimming:
            return
        self._trimming = True
        loop = asyncio.get_running_loop()

        def trim() -> None:
            self._trimming = False
            loop.run_in_executor(None, malloc.trim)

        loop.call_later(TRIM_AFTER, trim)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._most:,} bytes")


async def _refuse(error: ServeError, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond and close the connection: the rest of the body is not read."""
    response = error_handlers.response(error, scope)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
