"""The real server process with a fake engine and a minimal application, for tests of its life cycle over HTTP.

Routes: `/ready` tells whether new requests are accepted; `/stream?N` streams N tokens, and an `error` line if it is cut
short. The command line is that of `lora-serve serve`; MODEL selects how the fake engine starts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lora_serve import server
from lora_serve.config import ServeConfig
from lora_serve.engine.client import EngineClient
from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.request import Finished, Request, Sampling, Tokens

ENGINE = (sys.executable, str(Path(__file__).parent / "engine" / "fake_engine.py"))

Send = Callable[[dict[str, Any]], Awaitable[None]]


class AnsweringApp:
    def __init__(self, engine: EngineClient, tokenizer: str) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    async def __call__(self, scope: dict[str, Any], receive: object, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError  # tells uvicorn that the application has no lifespan
        if scope["path"] == "/ready":
            await self.answer(send, 200 if self.engine.ready else 503, self.tokenizer.encode())
            return
        request = Request("r", [1], Sampling(max_tokens=int(scope["query_string"])))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for event in self.engine.generate(request):
            if isinstance(event, Tokens):
                await send({"type": "http.response.body", "body": b"token\n", "more_body": True})
            if isinstance(event, Finished):
                await send({"type": "http.response.body", "body": f"{event.reason}\n".encode()})

    async def answer(self, send: Send, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def load_tokenizer(config: ServeConfig) -> str:
    if config.model == "no-tokenizer":
        raise ModelUnsupported("there is no tokenizer")
    return "fake tokenizer"


def make_app(engine: EngineClient, tokenizer: str) -> server.App:
    async def drain(timeout: float) -> None:
        print("drained", file=sys.stderr, flush=True)

    return server.App(AnsweringApp(engine, tokenizer), drain)


def main(arguments: list[str]) -> int:
    model, *options = arguments
    values = dict(option.removeprefix("--").split("=", 1) for option in options)
    config = ServeConfig(model=model, port=0, **values)  # type: ignore[arg-type]
    logging.basicConfig(level="INFO", stream=sys.stderr)
    try:
        return server.serve(config, load_tokenizer=lambda: load_tokenizer(config), make_app=make_app, engine=ENGINE)
    except ServeError as error:
        print(error.message, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
