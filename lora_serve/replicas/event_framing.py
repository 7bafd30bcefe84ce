"""Server-sent events on their way through: whole events only, what they tell of a stream, and an end for a broken one.

A stream has begun for its client with the first event of content. Until then the request can be given to another
replica; afterwards a break is told by an error event in the form of the API that the stream belongs to.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lora_serve.api import error_handlers
from lora_serve.api.anthropic.anthropic_errors import anthropic_error, is_anthropic
from lora_serve.api.openai.responses import EVENTS
from lora_serve.api.sse import CHUNKS, StreamFormat
from lora_serve.errors import Overloaded, ServeError, Unavailable

END = b"\n\n"
PRELUDE = ("response.created", "response.queued", "response.in_progress")  # sent before there is anything to read
LAST = ("message_stop", "response.completed", "response.incomplete", "response.failed", "error")
ELSEWHERE = (Unavailable.kind, Overloaded.kind)  # errors of one replica, which another may not have


class EventFraming:
    """Cuts the bytes of a stream into whole events."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete with these bytes."""
        searched = max(0, len(self._rest) - 1)
        self._rest += data
        end = self._rest.rfind(END, searched)
        if end < 0:
            return []
        whole = bytes(self._rest[: end + len(END)])
        del self._rest[: end + len(END)]
        return [part + END for part in whole.split(END)[:-1]]


def event_type(event: bytes) -> str:
    """The event's `event:` line; empty if it has none."""
    first = event.partition(b"\n")[0]
    return first[6:].strip().decode(errors="replace") if first.startswith(b"event:") else ""


def is_prelude(event: bytes) -> bool:
    """Whether an event has no content yet, or is a comment."""
    return event.startswith(b":") or event_type(event) in PRELUDE


def is_last(event: bytes) -> bool:
    """Whether the stream is complete with this event."""
    return event_type(event) in LAST or _data(event) == b"[DONE]"


def error_code(body: bytes) -> str:
    """The code of an error: of a response's body or an event's data; empty if it is none."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if isinstance(found, dict) and isinstance(found.get("response"), dict):  # of `response.failed`
        found = found["response"]
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return ""
    details = error.get("details")
    code = details.get("error_code") if isinstance(details, dict) else error.get("code")
    return code if isinstance(code, str) else ""


def may_succeed_elsewhere(status: int, body: bytes) -> bool:
    """Whether a response says that this replica cannot serve the request now, which another one perhaps can."""
    return status in (429, 503) and error_code(body) in ELSEWHERE


def event_may_succeed_elsewhere(event: bytes) -> bool:
    """The same of an event."""
    return error_code(_data(event)) in ELSEWHERE


def error_event(path: str, error: ServeError, request_id: str | None) -> bytes:
    """The last event, or events, of a stream that broke, as a server would have sent them."""
    format = _format(path, request_id)
    done = b"" if format.done is None else b"data: " + format.done + END
    return format.encode(format.error(error)) + done


def _data(event: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def _format(path: str, request_id: str | None) -> StreamFormat:
    def anthropic(error: ServeError) -> dict[str, Any]:
        return anthropic_error(error_handlers.status(error), error.message, error.param, error.kind, request_id)

    if is_anthropic(path):
        return StreamFormat(named=True, done=None, error=anthropic)
    return EVENTS if path.startswith("/v1/responses") else CHUNKS
