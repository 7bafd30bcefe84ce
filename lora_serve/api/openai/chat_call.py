"""A conversation to continue, whichever API asked for it: its choices, and how their text becomes messages.

`/v1/chat/completions`, `/v1/responses` and `/v1/messages` translate their bodies to a `ChatCompletion`, and what is
generated (`ChatOutput`, `ChatMessage`) to their own responses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from lora_serve.api.auth import Caller
from lora_serve.api.chat_output.events import (
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
)
from lora_serve.api.chat_output.parser import OutputParser
from lora_serve.api.openai.chat_schemas import ChatCompletion, NamedToolChoice
from lora_serve.api.openai.generate import Choice, ChoiceOutput, RunningCall, make_choices
from lora_serve.api.openai.preprocess import check_n, encode_chat, engine_info, resolve_adapters, sampling_params
from lora_serve.api.services import Services
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob


@dataclass(frozen=True)
class ChatOutput:
    """New output of a choice; the last one has the finish reason: stop, length or tool_calls."""

    index: int
    events: list[OutputEvent]
    logprobs: list[Logprob]
    finish_reason: str | None
    generated: int
    cached: int


@dataclass
class MadeToolCall:
    """A tool call in a generated message; `arguments` is JSON text."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class ChatMessage:
    """A generated message."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[MadeToolCall] = field(default_factory=list)

    def add(self, event: OutputEvent) -> None:
        """Append a piece of output."""
        match event:
            case TextDelta(text):
                self.text += text
            case ReasoningDelta(text):
                self.reasoning += text
            case ToolCallBegin(_, name):
                self.tool_calls.append(MadeToolCall(name))
            case ToolCallArguments(index, text):
                self.tool_calls[index].arguments += text


@dataclass(frozen=True)
class ChatCall:
    """One API call: its choices, and how their text is parsed."""

    id: str
    created: int
    model: str
    choices: list[Choice]

    @property
    def prompt_tokens(self) -> int:
        return len(self.choices[0].request.prompt)

    def parser(self) -> OutputParser:
        """A parser of one choice's text."""
        return OutputParser(None, None)

    def message(self, output: ChoiceOutput) -> tuple[ChatMessage, str]:
        """The message and finish reason of a completed choice."""
        parser, message = self.parser(), ChatMessage()
        for event in [*parser.feed(output.text), *parser.flush()]:
            message.add(event)
        return message, finish_reason(output.finish_reason or "stop", parser)

    async def outputs(self, running: RunningCall) -> AsyncGenerator[ChatOutput, None]:
        """Outputs of all choices in order of arrival."""
        parsers = {choice.index: self.parser() for choice in self.choices}
        async with aclosing(running.outputs()) as outputs:
            async for output in outputs:
                parser = parsers[output.index]
                events, reason = parser.feed(output.text), output.finish_reason
                if reason is not None:
                    events += parser.flush()
                    reason = finish_reason(reason, parser)
                yield ChatOutput(output.index, events, output.logprobs, reason, output.generated, output.cached)


def finish_reason(reason: str, parser: OutputParser) -> str:
    """The reason that clients are told: a message that ends with tool calls asks for their results."""
    return "tool_calls" if reason == "stop" and parser.tool_calls else reason


async def prepare_chat(body: ChatCompletion, services: Services, caller: Caller, prefix: str = "chatcmpl-") -> ChatCall:
    """Check a conversation and encode it. Raises the `BadRequest` that names the field at fault."""
    uses = resolve_adapters(body, services, caller)
    check_n(body, services)
    _check_together(body)
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
        clamp=True,
        field="messages",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    id_ = f"{prefix}{uuid.uuid4().hex}"
    choices = make_choices(body, id_, 0, prompt, params, uses, caller.name)
    return ChatCall(id_, int(time.time()), engine_info(services).model, choices)


def _check_together(body: ChatCompletion) -> None:
    """Check fields that need or exclude each other."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise BadRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    names = [tool.function.name for tool in body.tools or []]
    if len(set(names)) < len(names):
        raise BadRequest("two functions have the same name", param="tools")
    if body.tool_choice == "required" and not names:
        raise BadRequest("tool_choice: required needs tools", param="tool_choice")
    if isinstance(body.tool_choice, NamedToolChoice) and body.tool_choice.function.name not in names:
        raise BadRequest(f"tools has no function {body.tool_choice.function.name}", param="tool_choice")
