"""`POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api import error_handlers
from lora_serve.api.adapter_settings import AdaptedCall, adapt_prompt
from lora_serve.api.anthropic.anthropic_errors import anthropic_error
from lora_serve.api.anthropic.chat_translation import to_chat_completion
from lora_serve.api.anthropic.message_content import ContentStream, content_blocks
from lora_serve.api.anthropic.message_schemas import (
    AnthropicError,
    CountMessageTokens,
    CreateMessage,
    MessageReply,
    MessagesPrompt,
    MessageTokenCount,
)
from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.chat_call import ChatCall, encode_conversation, prepare_chat
from lora_serve.api.openai.chat_prompt import chat_format
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall
from lora_serve.api.openai.preprocess import existing_adapters
from lora_serve.api.openai.respond import model_fields, respond
from lora_serve.api.openai.schemas import Generation
from lora_serve.api.request_id import request_id
from lora_serve.api.services import ServicesDep
from lora_serve.api.sse import StreamFormat
from lora_serve.errors import ServeError

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": AnthropicError}, "5XX": {"model": AnthropicError}}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

router = APIRouter(tags=["anthropic"], route_class=JSONRoute)


def _stream_format(request: Request) -> StreamFormat:
    def stream_error(error: ServeError) -> dict[str, Any]:
        status = error_handlers.status(error)
        return anthropic_error(status, error.message, error.param, error.kind, request_id(request.scope))

    return StreamFormat(named=True, done=None, error=stream_error)


@router.post(
    "/v1/messages",
    response_class=Response,
    responses={
        200: {
            "description": "The message, or its stream events",
            "model": MessageReply,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **ERRORS,
    },
)
async def create_message(body: CreateMessage, request: Request, services: ServicesDep, caller: Authorized) -> Response:
    """Generate the next message of a conversation; streamed if requested."""
    return await respond(
        request,
        _selection(body, stream=body.stream),
        services,
        caller,
        "messages",
        lambda adapted: _prepare(body, adapted, caller),
        _stream_format(request),
    )


@router.post("/v1/messages/count_tokens", responses=ERRORS)
async def count_message_tokens(
    body: CountMessageTokens, services: ServicesDep, caller: Authorized
) -> MessageTokenCount:
    """Count the tokens of the prompt that a message would have."""
    selection = _selection(body)
    await existing_adapters(selection, services, caller)
    adapted = await adapt_prompt(selection, services, caller)
    chat = to_chat_completion(body, body.max_tokens, chat_format(adapted.services))
    chat = chat.model_copy(update={"messages": adapted.with_system(chat.messages)})
    prompt = await encode_conversation(chat, adapted.services)
    return MessageTokenCount(input_tokens=len(prompt.tokens))


@dataclass(frozen=True)
class MessageCall:
    """A `ChatCall` whose response has the form of Anthropic's message."""

    call: ChatCall
    show_thinking: bool

    @property
    def choices(self) -> list[Choice]:
        return self.call.choices

    def full_response(self, running: RunningCall, outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""
        (output,) = outputs
        reply = self.call.parse(output)
        message = self.frame(running) | {"content": content_blocks(reply.events, self.show_thinking)}
        message |= stopped(reply.finish_reason or "stop", reply.stop_string)
        return message | {"usage": self.usage(reply.generated, reply.cached)}

    async def chunks(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed response; the first comes with the first token."""
        content = ContentStream(self.show_thinking)
        cached = 0
        begun = False
        async with aclosing(self.call.outputs(running)) as outputs:
            async for output in outputs:
                cached = max(cached, output.cached)
                if not begun:
                    begun = True
                    message = self.frame(running) | {"content": [], "stop_reason": None, "stop_sequence": None}
                    message["usage"] = self.usage(output.generated, cached)
                    yield {"type": "message_start", "message": message}
                for event in output.events:
                    for written in content.write(event):
                        yield written
                if output.finish_reason is not None:
                    for written in content.end():
                        yield written
                    yield {
                        "type": "message_delta",
                        "delta": stopped(output.finish_reason, output.stop_string),
                        "usage": self.usage(output.generated, cached),
                    }
        yield {"type": "message_stop"}

    def frame(self, running: RunningCall) -> dict[str, Any]:
        frame = {"id": self.call.id, "type": "message", "role": "assistant"}
        return frame | model_fields(running.adapters, self.call.model)

    def usage(self, generated: int, cached: int) -> dict[str, int]:
        return {
            "input_tokens": self.call.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        }


def stopped(reason: str, stop_string: str | None) -> dict[str, str | None]:
    """Why a message ended."""
    if stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": STOP_REASONS[reason], "stop_sequence": None}


def _selection(body: MessagesPrompt, *, stream: bool | None = None) -> Generation:
    """What selects the model, and how to answer; the rest is translated when it is known by which chat template."""
    user = body.metadata.user_id if body.metadata else None
    return Generation.model_construct(model=body.model, adapter=body.adapter, user=user, stream=stream)


async def _prepare(body: CreateMessage, adapted: AdaptedCall, caller: Caller) -> MessageCall:
    chat = to_chat_completion(body, body.max_tokens, chat_format(adapted.services))
    show_thinking = body.thinking is None or body.thinking.display != "omitted"
    return MessageCall(await prepare_chat(chat, adapted, caller, prefix="msg_"), show_thinking)
