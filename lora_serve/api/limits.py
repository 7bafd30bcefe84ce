"""Request body size limit.

Bodies are read into memory here, before routing, up to the limit. Uploads pass through: they are streamed to disk
under their own limit (`upload.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.errors import TooLarge


class BodyLimit:
    """ASGI middleware: 413 for bodies over `most` bytes, with or without a Content-Length.

    Args:
        is_upload: whether a request (method, path) is an upload.
    """

    def __init__(self, app: ASGIApp, most: int, is_upload: Callable[[str, str], bool]) -> None:
        self._app = app
        self._most = most
        self._is_upload = is_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_upload(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._most:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._most:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = TooLarge(f"the body is larger than {self._most:,} bytes")
        await error_handlers.response(error, scope)(scope, receive, send)
