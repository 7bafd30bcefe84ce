"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from lora_serve.api.auth import Authorized, Caller
from lora_serve.api.openai.generate import Choice, Part, Running, answered_by, merged, started, usage, whole
from lora_serve.api.openai.logprobs import TokenTexts, for_completion
from lora_serve.api.openai.prompt import adapters, encode, engine_info, sampling
from lora_serve.api.openai.schemas import Completion
from lora_serve.api.services import Injected, Services
from lora_serve.api.stream import JSON, EventStream, while_connected
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob
from lora_serve.request import Request as EngineRequest

router = APIRouter(tags=["openai"])
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions")
async def complete(body: Completion, request: Request, services: Injected, caller: Authorized) -> Response:
    """Continue each prompt; streamed if asked for."""
    call = await _prepare(body, services, caller)
    async with AsyncExitStack() as stack:
        running = await while_connected(
            request, stack.enter_async_context(started(services, "completions", call.choices))
        )
        if not body.stream:
            return JSON(call.answer(running, await while_connected(request, whole(running))))
        return EventStream(_stream(call, running), stack.pop_all())


@dataclass(frozen=True)
class Call:
    """One call: what is asked for, and how its answer is written down."""

    body: Completion
    id: str
    created: int
    model: str
    choices: list[Choice]
    prompts: list[list[int]]
    echoes: list[str]
    texts: TokenTexts

    def answer(self, running: list[Running], parts: list[Part]) -> dict[str, Any]:
        """The whole response."""
        offsets = {part.index: 0 for part in parts}
        shown = [self.choice(part, offsets, first=True) for part in parts]
        cached = sum(parts[index * self.n].cached for index in range(len(self.prompts)))
        total = usage(sum(map(len, self.prompts)), sum(part.generated for part in parts), cached)
        return self.frame(running) | {"choices": shown, "usage": total}

    def frame(self, running: list[Running]) -> dict[str, Any]:
        frame = {"id": self.id, "object": "text_completion", "created": self.created}
        return frame | answered_by(running, self.model)

    def choice(self, part: Part, offsets: dict[int, int], *, first: bool) -> dict[str, Any]:
        """One choice's part; with `first`, an echo comes before it. `offsets` counts the text shown so far."""
        echo = bool(self.body.echo) and first
        prompt = part.index // self.n
        text = self.echoes[prompt] + part.text if echo else part.text
        logprobs = None
        if self.body.logprobs is not None:
            tokens = part.tokens
            entries: list[Logprob | None] = [*part.logprobs]
            if echo:
                tokens = [*self.prompts[prompt], *tokens]
                entries = [*(part.prompt_logprobs or []), *entries]
            start = offsets[part.index]
            logprobs = for_completion(self.texts, entries, tokens, self.body.logprobs, start)
            offsets[part.index] = start + sum(len(self.texts.text(token)) for token in tokens)
        return {"index": part.index, "text": text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    @property
    def n(self) -> int:
        return self.body.n or 1


async def _prepare(body: Completion, services: Services, caller: Caller) -> Call:
    uses = adapters(body, services, caller)
    n = body.n or 1
    if n > services.config.max_n:
        raise BadRequest(f"n is more than {services.config.max_n}", param="n")
    texts, prompts = await _prompts(body, services)
    logprobs = body.logprobs
    id_ = f"cmpl-{uuid.uuid4().hex}"
    choices = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise BadRequest("the prompt has no tokens", param="prompt")
        params = sampling(
            body,
            services,
            prompt_tokens=len(prompt),
            max_tokens=body.max_tokens,
            otherwise=DEFAULT_MAX_TOKENS,
            field="prompt",
            logprobs=logprobs,
            prompt_logprobs=logprobs if body.echo else None,
        )
        for copy in range(n):
            own = params if body.seed is None else msgspec.structs.replace(params, seed=body.seed + copy)
            number = index * n + copy
            engine_request = EngineRequest(f"{id_}-{number}", prompt, own, uses, caller.name)
            choices.append(Choice(number, engine_request, body.stops, bool(body.include_stop_str_in_output)))
    model = engine_info(services).model
    return Call(body, id_, int(time.time()), model, choices, prompts, texts, TokenTexts(services.tokenizer))


async def _prompts(body: Completion, services: Services) -> tuple[list[str], list[list[int]]]:
    """Text (for an echo) and tokens of every prompt."""
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    given: list[Any] = [body.prompt] if one else [*body.prompt]
    texts: list[str] = []
    tokens: list[list[int]] = []
    for prompt in given:
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            texts.append(prompt)
            tokens.append(await encode(services, prompt, add_special_tokens=special))
        else:
            tokens.append(prompt)
            vocabulary = engine_info(services).vocab_size
            if any(token >= vocabulary for token in prompt):
                raise BadRequest(f"the prompt has token ids outside 0..{vocabulary - 1}", param="prompt")
            texts.append(services.tokenizer.decode(prompt, skip_special_tokens=False) if body.echo else "")
    return texts, tokens


async def _stream(call: Call, running: list[Running]) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed response."""
    options = call.body.stream_options
    frame = call.frame(running)
    offsets = {choice.index: 0 for choice in call.choices}
    begun: set[int] = set()
    generated = dict.fromkeys(offsets, 0)
    cached = dict.fromkeys(offsets, 0)
    prompt_tokens = sum(map(len, call.prompts))

    def spent() -> dict[str, Any]:
        found = sum(cached[index] for index in offsets if index % call.n == 0)
        return usage(prompt_tokens, sum(generated.values()), found)

    async for part in merged(running):
        generated[part.index] = part.generated
        cached[part.index] = max(cached[part.index], part.cached)
        first = part.index not in begun
        begun.add(part.index)
        shown = call.choice(part, offsets, first=first)
        if not (shown["text"] or part.tokens or part.finish_reason):
            continue
        chunk = frame | {"choices": [shown]}
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = spent()
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        yield chunk
    if options is not None and options.include_usage:
        yield frame | {"choices": [], "usage": spent()}
