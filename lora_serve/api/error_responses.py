"""Responses to errors that no route has handled, and the log of unexpected ones."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api import error_handlers
from lora_serve.api.request_id import describe_ids
from lora_serve.errors import EngineFault, ServeError

log = logging.getLogger(__name__)


class ErrorResponses:
    """ASGI middleware: the response of a `ServeError`, and a plain 500 for a bug, whose traceback is logged.

    Unlike an exception handler of the application, it is below the middlewares that add headers to every response. An
    error after the response has started ends the response there: the HTTP server closes the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if not isinstance(error, ServeError):
                log_unexpected(scope, error)
                error = EngineFault("the server failed on this request")
            if not started:
                await error_handlers.response(error, scope)(scope, receive, send)


def log_unexpected(scope: Scope, error: Exception) -> None:
    """Log the traceback of a bug with the request it happened in: method, path and ids, nothing of body or keys."""
    log.error("%s %.200r failed: %s", scope["method"], scope["path"], describe_ids(scope), exc_info=error)
