"""Errors in Anthropic's shape, on the routes of its API."""

from __future__ import annotations

from typing import Any

from lora_serve.errors import BadRequest, ContextExceeded

PREFIX = "/v1/messages"
TOO_LONG = "prompt is too long: "  # by which coding agents know that they must shorten the conversation
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
FIELDS = {  # that bodies are translated to → that the client sent
    "response_format.json_schema.schema": "output_config.format.schema",
    "function.parameters": "input_schema",
}


class ThreadsUnsupported(BadRequest):
    """Conversations are not held here. By its kind Anthropic's SDK knows that it must send all messages itself."""

    kind = "thread_unsupported_request"


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def anthropic_error(
    status: int, message: str, param: str | None, code: str | None, request_id: str | None
) -> dict[str, Any]:
    """The JSON object of an error; also the event for one in the middle of a stream."""
    if code == ContextExceeded.kind:
        message = TOO_LONG + message
    for field, sent in FIELDS.items():
        message = message.replace(field, sent)
        param = param and param.replace(field, sent)
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message, "details": {"error_code": code, "param": param}}
    return {"type": "error", "error": error, "request_id": request_id}
