"""JSON request bodies, read and decoded with bounded work before FastAPI validates them.

A body with many small mistakes costs no more than decoding it: how many values it may have is checked by counting
bytes, and only the first mistake in a list counts (`fail_fast` in the schemas). Duplicate keys, NaN, invalid UTF-8,
deep nesting and endless numbers are refused by the decoder. What was sent is never part of an error that is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import jiter
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from lora_serve.api.content_type import is_json
from lora_serve.api.error_handlers import UnsupportedMedia, validation_error
from lora_serve.errors import BadRequest

MOST_FIELDS = 100_000  # fields, objects and lists of a body; brackets and colons in its texts count as well
MOST_ITEMS = 1_000_000  # items; commas in texts count as well

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JSONRoute(APIRoute):
    """A route whose JSON body, if it has one, is read by this module."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            sent = await read_json(request)
            try:
                return await handle(_DecodedRequest(request, sent))
            except RequestValidationError as error:
                invalid = validation_error(error.errors(), sent)
            raise invalid  # without the other error, which has the whole body

        return read_and_handle


async def read_json(request: Request) -> Any:
    """The request's decoded body. Raises `BadRequest`, `UnsupportedMedia`."""
    if not is_json(request.headers.get("Content-Type")):
        raise UnsupportedMedia("the Content-Type must be application/json")
    return decode(b"".join([chunk async for chunk in request.stream()]))


def decode(body: bytes, what: str = "the body") -> Any:
    """The value of a JSON text. Raises `BadRequest` if it is not valid, or has too many values to be a request.

    Args:
        what: the text, as an error calls it.
    """
    if body.count(b"[") + body.count(b"{") + body.count(b":") > MOST_FIELDS or body.count(b",") > MOST_ITEMS:
        raise BadRequest(f"{what} has more than {MOST_FIELDS:,} fields and lists, or {MOST_ITEMS:,} items")
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise BadRequest(f"{what} is not valid JSON: {str(error)[:200]}") from None


class _DecodedRequest(Request):
    """A request whose JSON body has been read; the bytes are not kept."""

    def __init__(self, request: Request, decoded: Any) -> None:
        super().__init__(request.scope, request.receive, request._send)
        self._decoded = decoded

    async def body(self) -> bytes:
        return b"{}"  # FastAPI asks for `json` if there is a body

    async def json(self) -> Any:
        return self._decoded
