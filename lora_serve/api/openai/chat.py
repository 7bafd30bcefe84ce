"""`POST /v1/chat/completions`, using the base model's chat template."""

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
    ChoiceOutput,
    RunningChoice,
    add_usage,
    make_choices,
    merge_outputs,
    model_fields,
    respond,
    usage,
)
from lora_serve.api.openai.preprocess import check_n, encode_chat, engine_info, resolve_adapters, sampling_params
from lora_serve.api.openai.response_logprobs import TokenTexts, chat_logprobs
from lora_serve.api.openai.schemas import ChatCompletion
from lora_serve.api.openai.structured_output import structured_output
from lora_serve.api.services import Services, ServicesDep
from lora_serve.errors import BadRequest

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletion, request: Request, services: ServicesDep, caller: Authorized) -> Response:
    """Complete a conversation; streamed if requested."""
    return await respond(request, body, services, "chat", await _prepare(body, services, caller))


@dataclass(frozen=True)
class ChatCall:
    """One API call: its choices, and how its response is built."""

    body: ChatCompletion
    id: str
    created: int
    model: str
    choices: list[Choice]
    texts: TokenTexts

    def full_response(self, running: list[RunningChoice], outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""
        shown = [
            {
                "index": output.index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self.logprobs(output),
                "finish_reason": output.finish_reason,
            }
            for output in outputs
        ]
        total = self.usage(sum(output.generated for output in outputs), outputs[0].cached)
        return self.frame(running, "chat.completion") | {"choices": shown, "usage": total}

    async def chunks(self, running: list[RunningChoice]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response."""
        options = self.body.stream_options
        frame = self.frame(running, "chat.completion.chunk")
        generated = {choice.index: 0 for choice in self.choices}
        cached = 0

        def usage_so_far() -> dict[str, Any]:
            return self.usage(sum(generated.values()), cached)

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return add_usage(frame | {"choices": [choice]}, options, usage_so_far)

        for index in generated:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            yield chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        async for output in merge_outputs(running):
            generated[output.index] = output.generated
            cached = max(cached, output.cached)
            if not (output.text or output.logprobs or output.finish_reason):
                continue
            delta = {"content": output.text} if output.text else {}
            yield chunk(
                {
                    "index": output.index,
                    "delta": delta,
                    "logprobs": self.logprobs(output),
                    "finish_reason": output.finish_reason,
                }
            )
        if options is not None and options.include_usage:
            yield frame | {"choices": [], "usage": usage_so_far()}

    def frame(self, running: list[RunningChoice], kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created} | model_fields(running, self.model)

    def logprobs(self, output: ChoiceOutput) -> dict[str, Any] | None:
        return chat_logprobs(self.texts, output.logprobs, self.body.top_logprobs or 0) if self.body.logprobs else None

    def usage(self, generated: int, cached: int) -> dict[str, Any]:
        return usage(len(self.choices[0].request.prompt), generated, cached)


async def _prepare(body: ChatCompletion, services: Services, caller: Caller) -> ChatCall:
    uses = resolve_adapters(body, services, caller)
    check_n(body, services)
    grammar = await structured_output(body)
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
        raise BadRequest("the messages have no tokens", param="messages")
    params = sampling_params(
        body,
        services,
        prompt_tokens=len(prompt),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        default_max_tokens=None,
        field="messages",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    id_ = f"chatcmpl-{uuid.uuid4().hex}"
    choices = make_choices(body, id_, 0, prompt, params, uses, caller.name)
    return ChatCall(body, id_, int(time.time()), engine_info(services).model, choices, TokenTexts(services.tokenizer))
