"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api.auth import Authorized, Caller
from lora_serve.api.openai.generate import (
    Choice,
    Part,
    Running,
    answered_by,
    copies,
    merged,
    respond,
    usage,
    with_usage,
)
from lora_serve.api.openai.logprob_format import TokenTexts, for_completion
from lora_serve.api.openai.request_parsing import (
    adapters,
    check_copies,
    check_tokens,
    encode,
    engine_info,
    sampling,
    vocabulary,
)
from lora_serve.api.openai.schemas import Completion
from lora_serve.api.services import Injected, Services
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob

router = APIRouter(tags=["openai"])
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions")
async def complete(body: Completion, request: Request, services: Injected, caller: Authorized) -> Response:
    """Continue each prompt; streamed if asked for."""
    return await respond(request, body, services, "completions", await _prepare(body, services, caller))


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

    async def chunks(self, running: list[Running]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        options = self.body.stream_options
        frame = self.frame(running)
        offsets = {choice.index: 0 for choice in self.choices}
        begun: set[int] = set()
        generated = dict.fromkeys(offsets, 0)
        cached = dict.fromkeys(offsets, 0)
        prompt_tokens = sum(map(len, self.prompts))

        def spent() -> dict[str, Any]:
            found = sum(cached[index] for index in offsets if index % self.n == 0)
            return usage(prompt_tokens, sum(generated.values()), found)

        async for part in merged(running):
            generated[part.index] = part.generated
            cached[part.index] = max(cached[part.index], part.cached)
            first = part.index not in begun
            begun.add(part.index)
            shown = self.choice(part, offsets, first=first)
            if not (shown["text"] or part.tokens or part.finish_reason):
                continue
            yield with_usage(frame | {"choices": [shown]}, options, spent)
        if options is not None and options.include_usage:
            yield frame | {"choices": [], "usage": spent()}

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
    check_copies(body, services)
    texts, prompts = await _prompts(body, services)
    logprobs = body.logprobs
    id_ = f"cmpl-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    for prompt in prompts:
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
        choices += copies(body, id_, len(choices), prompt, params, uses, caller.name)
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
            check_tokens(prompt, vocabulary(body, services), "prompt")
            texts.append(services.tokenizer.decode(prompt, skip_special_tokens=False) if body.echo else "")
    return texts, tokens
