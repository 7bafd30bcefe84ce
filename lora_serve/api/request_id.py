"""Request ids: one for every request, in its response, its errors and its log lines.

The id is the caller's `X-Request-Id`, or a new one. A valid `traceparent` (W3C Trace Context) is returned and
logged too.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_serve.api.anthropic.anthropic_errors import is_anthropic

ID = re.compile(r"[!-~]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,128})?")


class RequestId:
    """ASGI middleware: puts `request_id` and `traceparent` into `scope["state"]` and into the response's headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, trace = headers.get("x-request-id", ""), headers.get("traceparent", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if ID.fullmatch(given) else uuid.uuid4().hex
        returned = {"X-Request-Id": state["request_id"]}
        if is_anthropic(scope["path"]):
            returned["request-id"] = state["request_id"]  # where Anthropic's SDK looks for it
        if TRACEPARENT.fullmatch(trace):
            state["traceparent"] = returned["traceparent"] = trace

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(returned)
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id(scope: Scope) -> str | None:
    """The id of a request; None outside of `RequestId`."""
    found: str | None = scope.get("state", {}).get("request_id")
    return found


def describe_ids(scope: Scope) -> str:
    """The ids of a request, as a log line about it ends."""
    state = scope.get("state", {})
    return ", ".join(f"{name} {state[name]}" for name in ("request_id", "traceparent") if name in state)
