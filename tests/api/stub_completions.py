"""A stub engine that generates a fixed reply, an app on top of it, and a tokenizer with one token per byte."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from stub_admin import StubAdminEngine, engine_info
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_serve.api.app import create_app
from lora_serve.api.key_file import Keys
from lora_serve.api.openai.response_logprobs import _alphabet
from lora_serve.api.traces import RequestTraces
from lora_serve.config import ServeConfig
from lora_serve.errors import AdapterNotFound, Failure, ServeError
from lora_serve.request import Admitted, Embedded, Event, Finished, Logprob, Request, Served, Tokens

BOS, EOS = 256, 257
CONTEXT = 64
TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'] }}:{{ m['content'] }}|{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


def byte_tokenizer(*, bos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Token id = byte; 256 is BOS (added if `bos`), 257 is EOS."""
    vocabulary = {**_alphabet(), "<s>": BOS, "</s>": EOS}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", chat_template=template
    )


class StubCompletionEngine(StubAdminEngine):
    """Generates `reply` for every request, token by token; records requests and closed generators.

    `refusals`: error by number of the request; `breaks`: number of tokens after which a request fails.
    """

    def __init__(self, store: Path, context: int = CONTEXT) -> None:
        super().__init__()
        self.info = engine_info(store, max_model_len=context, eos_token_ids=(EOS,), hidden_size=4)
        self.reply: Sequence[int] = b"hello"
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.events = 0  # token events that were taken
        self.most_at_once = 0
        self.refusals: dict[int, ServeError] = {}
        self.breaks: int | None = None
        self.forever = False
        self.cached = 0
        self.embedding = self.most_embedding = 0  # requests for embeddings at the same time
        self.resolves: dict[str, str] = {}  # alias → the adapter that every request gets
        self.digests = ["d" * 64]  # of the adapters, by number of the request; the last one is that of the others

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        number = len(self.requests)
        self.requests.append(request)
        self.most_at_once = max(self.most_at_once, len(self.requests) - len(self.closed))
        try:
            if number in self.refusals:
                yield Finished(request.id, "error", failure=Failure.of(self.refusals[number]))
                return
            served = [self.resolves.get(use.name, use.name) for use in request.adapters]
            unknown = [name for name in served if name not in ("poet", "clerk")]
            if unknown:
                error = AdapterNotFound(f"adapter {unknown[0]} does not exist", param="adapter")
                yield Finished(request.id, "error", failure=Failure.of(error))
                return
            digest = self.digests[min(number, len(self.digests) - 1)]
            weights = [use.weight for use in request.adapters]
            yield Admitted(
                request.id, [Served(name, digest, weight) for name, weight in zip(served, weights, strict=True)]
            )
            if request.embedding is not None:
                async for event in self._embed(request):
                    yield event
                return
            async for event in self._say(request):
                yield event
        finally:
            self.closed.append(request.id)

    async def _embed(self, request: Request) -> AsyncGenerator[Event, None]:
        """Later requests are ready first; the first numbers are the sum and the number of the tokens."""
        self.embedding += 1
        self.most_embedding = max(self.embedding, self.most_embedding)
        try:
            await asyncio.sleep(60 if self.forever else 0.01 / len(self.requests))
        finally:
            self.embedding -= 1
        if self.breaks is not None:
            yield Finished(request.id, "error", failure=Failure("engine_fault", "it broke"))
            return
        yield Embedded(request.id, struct.pack("<4f", sum(request.prompt), len(request.prompt), 0.5, -0.25))
        yield Finished(request.id, "stop")

    async def _say(self, request: Request) -> AsyncGenerator[Event, None]:
        params = request.sampling
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._logprob(token) for token in request.prompt[1:])]
        count = 0
        while self.forever or count < min(len(self.reply), params.max_tokens):
            await asyncio.sleep(0.001 if self.forever else 0)
            if self.breaks is not None and count == self.breaks:
                yield Finished(request.id, "error", failure=Failure("engine_fault", "it broke"))
                return
            token = self.reply[count % len(self.reply)]
            logprobs = None if params.logprobs is None else [self._logprob(token)]
            yield Tokens(request.id, [token], logprobs, prompt_logprobs, self.cached)
            self.events += 1
            prompt_logprobs = None
            count += 1
        if prompt_logprobs is not None:
            yield Tokens(request.id, [], None, prompt_logprobs)
        if count < params.max_tokens:
            logprob = None if params.logprobs is None else self._logprob(EOS)
            yield Finished(request.id, "stop", stop_token=EOS, stop_logprob=logprob)
        else:
            yield Finished(request.id, "length")

    def _logprob(self, token: int) -> Logprob:
        return Logprob(token, -0.1 * token, [(BOS, -0.01), (EOS, -0.02)])


class StubCompletionApp:
    """An app on a `StubCompletionEngine`, and a client."""

    make_engine: Callable[[Path, int], StubCompletionEngine] = StubCompletionEngine

    def __init__(
        self,
        store: Path,
        keys: Keys | None = None,
        tokenizer: Any = None,
        context: int = CONTEXT,
        traces: RequestTraces | None = None,
        **options: Any,
    ) -> None:
        self.engine = type(self).make_engine(store, context)
        config = ServeConfig(model="base", store=store, **options)
        self.app: FastAPI = create_app(self.engine, tokenizer or byte_tokenizer(), config, keys, traces)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def post(self, path: str, body: dict[str, Any], key: str = "any") -> httpx.Response:
        return await self.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    async def complete(self, key: str = "any", **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": "hi", **body}, key)

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data events of a stream; asserts that it ends with one `[DONE]` line."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
