"""A fake OpenAI server: `/v1/completions` streams with known delays, without a model. Also runs as a program."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

FIRST, GAP = 0.06, 0.02  # seconds before the first token, and between tokens


class FakeServer:
    """The application and a record of its requests; an adapter named after a fault (`refused`, `broken`, …) has it.

    Attributes:
        bodies: every request's JSON, in order.
        sent: when each of a request's tokens was sent, by `time.perf_counter`.
        most: the largest number of concurrent requests.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.sent: list[list[float]] = []
        self.open = 0
        self.most = 0
        self.app = FastAPI()
        self.app.add_api_route("/ready", lambda: PlainTextResponse("yes"))
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/v1/completions", self.completions, methods=["POST"])

    def models(self) -> Any:
        return {"object": "list", "data": [{"id": "base"}, {"id": "a", "parent": "base"}, {"id": "b"}]}

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body.get("adapter") == "refused":
            return JSONResponse({"error": {"message": "no such adapter"}}, 404)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        def event(**content: Any) -> str:
            return f"data: {json.dumps(content)}\n\n"

        def token(text: str, finish: str | None = None) -> str:
            sent.append(time.perf_counter())
            return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])

        sent: list[float] = []
        self.sent.append(sent)
        self.open += 1
        self.most = max(self.most, self.open)
        adapter, count = body.get("adapter"), body["max_tokens"]
        await asyncio.sleep(FIRST if adapter != "silent" else 30)
        for number in range(count - (adapter == "short")):
            if number:
                await asyncio.sleep(GAP)
            if adapter == "broken" and number == 2:
                self.open -= 1
                return
            if adapter == "error" and number == 2:
                yield event(error={"message": "the engine failed"})
                self.open -= 1
                return
            yield token("" if number == 1 else "x")  # a token may have no text of its own yet
        self.open -= 1
        yield event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        if adapter != "uncounted":
            yield event(choices=[], usage={"completion_tokens": len(sent), "prompt_tokens": len(body["prompt"])})
        yield "data: [DONE]\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    if args.fail:
        sys.exit("this cannot start")
    uvicorn.run(FakeServer().app, port=args.port, log_level="warning")
