"""`POST /v1/chat/completions`, using the base model's chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from lora_serve.api.adapter_settings import AdaptedCall
from lora_serve.api.auth import Authorized
from lora_serve.api.caller import Caller
from lora_serve.api.chat_output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from lora_serve.api.json_body import JSONRoute
from lora_serve.api.openai.chat_call import ChatCall, ChatMessage, MadeToolCall, prepare_chat
from lora_serve.api.openai.chat_schemas import ChatCompletion
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall
from lora_serve.api.openai.documented_bodies import EVENT_STREAM, ChatReply
from lora_serve.api.openai.respond import add_usage, model_fields, respond, usage
from lora_serve.api.openai.response_logprobs import TokenTexts, chat_logprobs
from lora_serve.api.openapi import errors
from lora_serve.api.services import ServicesDep
from lora_serve.request import Logprob

router = APIRouter(tags=["openai"], route_class=JSONRoute)


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={200: {"model": ChatReply, "content": EVENT_STREAM}, **errors(404, 422, 429)},
)
async def chat(body: ChatCompletion, request: Request, services: ServicesDep, caller: Authorized) -> Response:
    """Complete a conversation; streamed if requested."""
    return await respond(request, body, services, caller, "chat", lambda adapted: _prepare(body, adapted, caller))


@dataclass(frozen=True)
class ChatCompletionCall:
    """A `ChatCall` whose response has the form of a chat completion."""

    body: ChatCompletion
    call: ChatCall
    texts: TokenTexts

    @property
    def choices(self) -> list[Choice]:
        return self.call.choices

    def full_response(self, running: RunningCall, outputs: list[ChoiceOutput]) -> dict[str, Any]:
        """The response body without streaming."""
        shown = []
        for output in outputs:
            reply = self.call.parse(output)
            message = ChatMessage.of(self.shown(reply.events))
            shown.append(
                {
                    "index": output.index,
                    "message": _message(message),
                    "logprobs": self.logprobs(output.logprobs),
                    "finish_reason": reply.finish_reason,
                }
            )
        total = self.usage(sum(output.generated for output in outputs), outputs[0].cached)
        return self.frame(running, "chat.completion") | {"choices": shown, "usage": total}

    async def chunks(self, running: RunningCall) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response. A choice's first chunk has its role, and comes with its first token."""
        options = self.body.stream_options
        frame = self.frame(running, "chat.completion.chunk")
        generated = {choice.index: 0 for choice in self.choices}
        begun: set[int] = set()
        cached = 0

        def usage_so_far() -> dict[str, Any]:
            return self.usage(sum(generated.values()), cached)

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return add_usage(frame | {"choices": [choice]}, options, usage_so_far)

        async with aclosing(self.call.outputs(running)) as outputs:
            async for output in outputs:
                generated[output.index] = output.generated
                cached = max(cached, output.cached)
                if output.index not in begun:
                    begun.add(output.index)
                    yield chunk(output.index, {"role": "assistant", "content": ""})
                deltas = _deltas(self.shown(output.events))
                if not (deltas or output.logprobs or output.finish_reason):
                    continue
                for delta in deltas[:-1]:
                    yield chunk(output.index, delta)
                last = deltas[-1] if deltas else {}
                yield chunk(output.index, last, self.logprobs(output.logprobs), output.finish_reason)
        if options is not None and options.include_usage:
            yield frame | {"choices": [], "usage": usage_so_far()}

    def shown(self, events: Sequence[OutputEvent]) -> Sequence[OutputEvent]:
        if self.body.include_reasoning is not False:
            return events
        return [event for event in events if not isinstance(event, ReasoningDelta)]

    def frame(self, running: RunningCall, kind: str) -> dict[str, Any]:
        frame = {"id": self.call.id, "object": kind, "created": self.call.created}
        return frame | model_fields(running.adapters, self.call.model)

    def logprobs(self, entries: Sequence[Logprob]) -> dict[str, Any] | None:
        return chat_logprobs(self.texts, entries, self.body.top_logprobs or 0) if self.body.logprobs else None

    def usage(self, generated: int, cached: int) -> dict[str, Any]:
        return usage(self.call.prompt_tokens, generated, cached)


async def _prepare(body: ChatCompletion, adapted: AdaptedCall, caller: Caller) -> ChatCompletionCall:
    call = await prepare_chat(body, adapted, caller)
    return ChatCompletionCall(body, call, TokenTexts(adapted.services.tokenizer))


def _message(message: ChatMessage) -> dict[str, Any]:
    """A complete message. Its content is null if it only calls tools."""
    content = message.text if message.text or not message.tool_calls else None
    shown: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if message.reasoning:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return shown


def _deltas(events: Sequence[OutputEvent]) -> list[dict[str, Any]]:
    """The `delta` objects of a choice's new output."""
    found: list[dict[str, Any]] = []
    for event in events:
        match event:
            case TextDelta(text):
                found.append({"content": text})
            case ReasoningDelta(text):
                found.append({"reasoning_content": text})
            case ToolCallBegin(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": MadeToolCall(name).id, "type": "function", "function": function}
                found.append({"tool_calls": [call]})
            case ToolCallArguments(index, text):
                found.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    return found
