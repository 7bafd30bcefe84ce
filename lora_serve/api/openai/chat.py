"""`POST /v1/chat/completions`, through the base's own chat template."""

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
from lora_serve.api.openai.logprobs import TokenTexts, for_chat
from lora_serve.api.openai.prompt import adapters, encode_chat, engine_info, sampling
from lora_serve.api.openai.schemas import ChatCompletion
from lora_serve.api.services import Injected, Services
from lora_serve.api.stream import JSON, EventStream, while_connected
from lora_serve.errors import BadRequest
from lora_serve.request import Request as EngineRequest

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletion, request: Request, services: Injected, caller: Authorized) -> Response:
    """Answer a conversation; streamed if asked for."""
    call = await _prepare(body, services, caller)
    async with AsyncExitStack() as stack:
        running = await while_connected(request, stack.enter_async_context(started(services, "chat", call.choices)))
        if not body.stream:
            return JSON(call.answer(running, await while_connected(request, whole(running))))
        return EventStream(_stream(call, running), stack.pop_all())


@dataclass(frozen=True)
class Call:
    """One call: what is asked for, and how its answer is written down."""

    body: ChatCompletion
    id: str
    created: int
    model: str
    choices: list[Choice]
    texts: TokenTexts

    def answer(self, running: list[Running], parts: list[Part]) -> dict[str, Any]:
        """The whole response."""
        shown = [
            {
                "index": part.index,
                "message": {"role": "assistant", "content": part.text, "refusal": None},
                "logprobs": self.logprobs(part),
                "finish_reason": part.finish_reason,
            }
            for part in parts
        ]
        total = self.usage(sum(part.generated for part in parts), parts[0].cached)
        return self.frame(running, "chat.completion") | {"choices": shown, "usage": total}

    def frame(self, running: list[Running], kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created} | answered_by(running, self.model)

    def logprobs(self, part: Part) -> dict[str, Any] | None:
        return for_chat(self.texts, part.logprobs, self.body.top_logprobs or 0) if self.body.logprobs else None

    def usage(self, generated: int, cached: int) -> dict[str, Any]:
        return usage(len(self.choices[0].request.prompt), generated, cached)


async def _prepare(body: ChatCompletion, services: Services, caller: Caller) -> Call:
    uses = adapters(body, services, caller)
    n = body.n or 1
    if n > services.config.max_n:
        raise BadRequest(f"n is more than {services.config.max_n}", param="n")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
    arguments = body.chat_template_kwargs
    prompt = await encode_chat(
        services,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        arguments=arguments.model_dump(exclude_none=True) if arguments else None,
    )
    if not prompt:
        raise BadRequest("the messages come to no tokens", param="messages")
    params = sampling(
        body,
        services,
        prompt_tokens=len(prompt),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        otherwise=None,
        field="messages",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    id_ = f"chatcmpl-{uuid.uuid4().hex}"
    choices = [
        Choice(
            index,
            EngineRequest(
                f"{id_}-{index}",
                prompt,
                params if body.seed is None else msgspec.structs.replace(params, seed=body.seed + index),
                uses,
                caller.name,
            ),
            body.stops,
            bool(body.include_stop_str_in_output),
        )
        for index in range(n)
    ]
    return Call(body, id_, int(time.time()), engine_info(services).model, choices, TokenTexts(services.tokenizer))


async def _stream(call: Call, running: list[Running]) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed response."""
    options = call.body.stream_options
    frame = call.frame(running, "chat.completion.chunk")
    generated = {choice.index: 0 for choice in call.choices}
    cached = 0

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        shown = frame | {"choices": [choice]}
        if options is not None and options.continuous_usage_stats:
            shown["usage"] = call.usage(sum(generated.values()), cached)
        elif options is not None and options.include_usage:
            shown["usage"] = None
        return shown

    for index in generated:
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        yield chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
    async for part in merged(running):
        generated[part.index] = part.generated
        cached = max(cached, part.cached)
        if not (part.text or part.logprobs or part.finish_reason):
            continue
        delta = {"content": part.text} if part.text else {}
        yield chunk(
            {
                "index": part.index,
                "delta": delta,
                "logprobs": call.logprobs(part),
                "finish_reason": part.finish_reason,
            }
        )
    if options is not None and options.include_usage:
        yield frame | {"choices": [], "usage": call.usage(sum(generated.values()), cached)}
