"""An HTTP client whose every response is one given stream of events."""

from __future__ import annotations

import httpx


def client_of(stream: bytes) -> httpx.Client:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=stream)

    return httpx.Client(transport=httpx.MockTransport(respond))
