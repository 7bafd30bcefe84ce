"""transformers' `generate` with PEFT's adapters behind `/v1/completions`: the plainest server, to compare with.

    python bench/hf_server.py MODEL --adapters DIR --port 8000

Batches are static, as `generate` makes them: what waits when a batch ends is the next one, and runs until its longest
request is done; who comes meanwhile waits. Rows of one adapter run with it active, the base's with all adapters off,
and only a mixture by PEFT's `adapter_names`, so each kind of batch goes the fastest way that PEFT has. Greedy, never
stops early, prompts are token ids: just what `bench/client.py` asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: transformers would take `kernels.py` here for the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

BASE = "base"
GATHER = 0.02  # seconds after the first request in which others join its batch


@dataclass
class Wanted:
    """A request: token ids, a number of new tokens, an adapter (None: the base), where its tokens go."""

    prompt: list[int]
    count: int
    adapter: str | None
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[int | Exception] = field(default_factory=asyncio.Queue)

    def give(self, token: int | Exception) -> None:
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)


class Deal(BaseStreamer):
    """Deals each step's tokens out to a batch's requests; who has enough gets no more."""

    def __init__(self, batch: Sequence[Wanted]) -> None:
        self._batch = batch
        self._step = -1  # what comes first is the prompt

    def put(self, value: torch.Tensor) -> None:  # [batch, prompt] at first, then [batch]
        if self._step >= 0:
            for wanted, token in zip(self._batch, value.tolist(), strict=True):
                if self._step < wanted.count:
                    wanted.give(token)
        self._step += 1

    def end(self) -> None:
        pass


class Generator:
    """The model, and the thread that runs one batch after the other."""

    def __init__(self, model: str, adapters: Sequence[Path], most: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.adapters = [folder.name for folder in adapters]
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._model: Any = base
        for folder in adapters:
            if self._model is base:
                self._model = PeftModel.from_pretrained(base, str(folder), folder.name)
            else:
                self._model.load_adapter(str(folder), folder.name)
        self._model.to(torch.bfloat16).eval()
        self._most = most
        self._waiting: queue.Queue[Wanted] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, wanted: Wanted) -> None:
        self._waiting.put(wanted)

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            try:
                while len(batch) < self._most:
                    batch.append(self._waiting.get(timeout=GATHER))
            except queue.Empty:
                pass
            try:
                self._generate(batch)
            except Exception as error:  # whatever it is, the next batch is to run
                for wanted in batch:
                    wanted.give(error)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Wanted]) -> None:
        width = max(len(wanted.prompt) for wanted in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, wanted in enumerate(batch):  # padded on the left, where generate wants it
            ids[row, width - len(wanted.prompt) :] = torch.tensor(wanted.prompt)
            mask[row, width - len(wanted.prompt) :] = 1
        names = {wanted.adapter for wanted in batch}
        more: dict[str, Any] = {}
        context: Any = nullcontext()
        if len(names) > 1:
            more["adapter_names"] = [wanted.adapter or "__base__" for wanted in batch]
        elif (only := names.pop()) is not None:
            self._model.set_adapter(only)
        elif self.adapters:
            context = self._model.disable_adapter()
        longest = max(wanted.count for wanted in batch)
        with context:
            self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                streamer=Deal(batch),
                **more,
            )


def build(generator: Generator) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in (BASE, *generator.adapters)]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        name = body["model"]
        if name not in (BASE, *generator.adapters):
            return JSONResponse({"error": {"message": f"no model {name}"}}, 404)
        adapter = None if name == BASE else name
        wanted = Wanted(body["prompt"], body["max_tokens"], adapter, asyncio.get_running_loop())
        generator.submit(wanted)
        if body.get("stream"):
            return StreamingResponse(_events(generator, wanted), media_type="text/event-stream")
        ids = [token for token in [await wanted.tokens.get() for _ in range(wanted.count)] if isinstance(token, int)]
        return JSONResponse(
            {"choices": [{"index": 0, "text": generator.tokenizer.decode(ids), "finish_reason": "length"}]}
        )

    return app


async def _events(generator: Generator, wanted: Wanted) -> AsyncIterator[str]:
    def event(**content: Any) -> str:
        return f"data: {json.dumps(content)}\n\n"

    for number in range(1, wanted.count + 1):
        token = await wanted.tokens.get()
        if isinstance(token, Exception):
            yield event(error={"message": f"{type(token).__name__}: {token}"})
            return
        finish = "length" if number == wanted.count else None
        yield event(choices=[{"index": 0, "text": generator.tokenizer.decode([token]), "finish_reason": finish}])
    yield event(choices=[], usage={"prompt_tokens": len(wanted.prompt), "completion_tokens": wanted.count})
    yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=Path, help="folder of PEFT folders; default: the base alone")
    parser.add_argument("--most", type=int, default=8, help="requests in a batch")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    folders = sorted(args.adapters.iterdir()) if args.adapters else []
    uvicorn.run(build(Generator(args.model, folders, args.most)), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
