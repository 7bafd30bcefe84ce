"""`POST /v1/chat/completions`, through the base's own chat template."""

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
from lora_serve.api.openai.logprob_format import TokenTexts, for_chat
from lora_serve.api.openai.request_parsing import adapters, check_copies, encode_chat, engine_info, sampling
from lora_serve.api.openai.schemas import ChatCompletion
from lora_serve.api.services import Injected, Services
from lora_serve.errors import BadRequest

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletion, request: Request, services: Injected, caller: Authorized) -> Response:
    """Answer a conversation; streamed if asked for."""
    return await respond(request, body, services, "chat", await _prepare(body, services, caller))


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

    async def chunks(self, running: list[Running]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        options = self.body.stream_options
        frame = self.frame(running, "chat.completion.chunk")
        generated = {choice.index: 0 for choice in self.choices}
        cached = 0

        def spent() -> dict[str, Any]:
            return self.usage(sum(generated.values()), cached)

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return with_usage(frame | {"choices": [choice]}, options, spent)

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
                    "logprobs": self.logprobs(part),
                    "finish_reason": part.finish_reason,
                }
            )
        if options is not None and options.include_usage:
            yield frame | {"choices": [], "usage": spent()}

    def frame(self, running: list[Running], kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created} | answered_by(running, self.model)

    def logprobs(self, part: Part) -> dict[str, Any] | None:
        return for_chat(self.texts, part.logprobs, self.body.top_logprobs or 0) if self.body.logprobs else None

    def usage(self, generated: int, cached: int) -> dict[str, Any]:
        return usage(len(self.choices[0].request.prompt), generated, cached)


async def _prepare(body: ChatCompletion, services: Services, caller: Caller) -> Call:
    uses = adapters(body, services, caller)
    check_copies(body, services)
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
    choices = copies(body, id_, 0, prompt, params, uses, caller.name)
    return Call(body, id_, int(time.time()), engine_info(services).model, choices, TokenTexts(services.tokenizer))
