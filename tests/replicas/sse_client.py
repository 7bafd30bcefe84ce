"""An HTTP client whose every response is one given stream of events."""

from __future__ import annotations

from typing import Any

import httpx


def client_of(stream: bytes, library: Any = httpx) -> Any:
    """A client of `httpx`, or of a library with its interface."""

    def respond(request: Any) -> Any:
        return library.Response(200, headers={"Content-Type": "text/event-stream"}, content=stream)

    return library.Client(transport=library.MockTransport(respond))
