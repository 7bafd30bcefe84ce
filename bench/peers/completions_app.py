"""The HTTP side of the baseline servers: `/v1/models` and `/v1/completions` around a generator of tokens.

It has what `bench.serving.client` asks for, and no more: prompts are token ids, decoding is greedy and ignores EOS.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

BASE = "base"


@dataclass
class Completion:
    """A request: prompt token ids, number of output tokens, adapter (None: the base), queue of its output."""

    prompt: list[int]
    count: int
    adapter: str | None
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[int | Exception] = field(default_factory=asyncio.Queue)

    def put(self, token: int | Exception) -> None:
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)


class Generator(Protocol):
    """What runs requests in a thread of its own.

    Attributes:
        adapters: names of the adapters that a request may ask for.
    """

    @property
    def adapters(self) -> Sequence[str]: ...

    def submit(self, request: Completion) -> None:
        """Queue a request; its tokens, or an exception, are put into it from then on."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""


def build(generator: Generator) -> FastAPI:
    """The HTTP application around a generator."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in (BASE, *generator.adapters)]}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await http.json()
        name = body["model"]
        if name not in (BASE, *generator.adapters):
            return JSONResponse({"error": {"message": f"no model {name}"}}, 404)
        adapter = None if name == BASE else name
        request = Completion(body["prompt"], body["max_tokens"], adapter, asyncio.get_running_loop())
        generator.submit(request)
        if body.get("stream"):
            return StreamingResponse(_events(generator, request), media_type="text/event-stream")
        ids = [token for token in [await request.tokens.get() for _ in range(request.count)] if isinstance(token, int)]
        return JSONResponse({"choices": [{"index": 0, "text": generator.decode(ids), "finish_reason": "length"}]})

    return app


async def _events(generator: Generator, request: Completion) -> AsyncIterator[str]:
    def event(**content: Any) -> str:
        return f"data: {json.dumps(content)}\n\n"

    for number in range(1, request.count + 1):
        token = await request.tokens.get()
        if isinstance(token, Exception):
            yield event(error={"message": f"{type(token).__name__}: {token}"})
            return
        finish = "length" if number == request.count else None
        yield event(choices=[{"index": 0, "text": generator.decode([token]), "finish_reason": finish}])
    yield event(choices=[], usage={"prompt_tokens": len(request.prompt), "completion_tokens": request.count})
    yield "data: [DONE]\n\n"
