"""A conversation to continue, whichever API asked for it: its choices, and how their text becomes messages.

`/v1/chat/completions`, `/v1/responses` and `/v1/messages` translate their bodies to a `ChatCompletion`, and what is
generated (`ChatOutput`, `ChatMessage`) to their own responses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lora_serve.api.adapter_settings import AdaptedCall
from lora_serve.api.caller import Caller
from lora_serve.api.chat_output import (
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    ReasoningFormat,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolFormat,
)
from lora_serve.api.openai.chat_prompt import ChatPrompt, chat_format, encode_chat, reasoning_arguments
from lora_serve.api.openai.chat_schemas import ChatCompletion, FunctionTool, NamedToolChoice
from lora_serve.api.openai.choices import Choice, ChoiceOutput, RunningCall, make_choices
from lora_serve.api.openai.preprocess import check_n, engine_info, sampling_params
from lora_serve.api.openai.reply_grammar import reply_grammar
from lora_serve.api.services import Services
from lora_serve.errors import BadRequest
from lora_serve.request import Logprob


@dataclass
class ChatOutput:
    """New output of a choice; the last one has the finish reason: stop, length or tool_calls.

    `stop_string` is the stop string that ended it, if one did.
    """

    index: int
    events: list[OutputEvent]
    logprobs: list[Logprob]
    finish_reason: str | None
    generated: int
    cached: int
    stop_string: str | None


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

    @classmethod
    def of(cls, events: Iterable[OutputEvent]) -> ChatMessage:
        """The message that consists of these pieces."""
        message = cls()
        for event in events:
            match event:
                case TextDelta(text):
                    message.text += text
                case ReasoningDelta(text):
                    message.reasoning += text
                case ToolCallBegin(_, name):
                    message.tool_calls.append(MadeToolCall(name))
                case ToolCallArguments(index, text):
                    message.tool_calls[index].arguments += text
        return message


@dataclass(frozen=True)
class ReplyFormat:
    """How a call's replies are written.

    Attributes:
        tools: format of tool calls; None if none are expected.
        reasoning: format of reasoning; None if there is none.
        reasoning_open: replies begin inside the reasoning.
        functions: JSON schemas of the parameters of the functions that may be called, by name.
        most_calls: number of calls in one reply; None is any.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    reasoning_open: bool
    functions: Mapping[str, Mapping[str, Any]]
    most_calls: int | None

    def parser(self) -> OutputParser:
        """A parser of one reply."""
        return OutputParser(
            self.tools,
            self.reasoning,
            reasoning_open=self.reasoning_open,
            known=self.functions,
            most_calls=self.most_calls,
        )


@dataclass(frozen=True)
class ChatCall:
    """One API call: its choices, and how their replies are written."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    format: ReplyFormat

    @property
    def prompt_tokens(self) -> int:
        return len(self.choices[0].request.prompt)

    def parse(self, output: ChoiceOutput) -> ChatOutput:
        """A completed choice: its whole reply."""
        return parsed(output, self.format.parser())

    def replay(self, output: ChoiceOutput) -> Iterator[ChatOutput]:
        """A completed choice: the outputs that its stream would have had."""
        parser = self.format.parser()
        return (parsed(piece, parser) for piece in output.pieces)

    async def outputs(self, running: RunningCall) -> AsyncGenerator[ChatOutput, None]:
        """Outputs of all choices in order of arrival."""
        parsers = {choice.index: self.format.parser() for choice in self.choices}
        async with aclosing(running.outputs()) as outputs:
            async for output in outputs:
                yield parsed(output, parsers[output.index])


def parsed(output: ChoiceOutput, parser: OutputParser) -> ChatOutput:
    """A choice's next output; `parser` has read those before."""
    events, reason = parser.feed(output.text), output.finish_reason
    if reason is not None:
        events += parser.flush(cut_off=reason == "length")
        reason = finish_reason(reason, output, parser)
    return ChatOutput(
        output.index, events, output.logprobs, reason, output.generated, output.cached, output.stop_string
    )


def finish_reason(reason: str, output: ChoiceOutput, parser: OutputParser) -> str:
    """The reason that clients are told: a message that ends with tool calls asks for their results."""
    if reason != "stop" or not parser.tool_calls:
        return reason
    cut = output.stop_string is not None and not parser.last_call_is_complete
    return "stop" if cut else "tool_calls"


async def prepare_chat(
    body: ChatCompletion,
    adapted: AdaptedCall,
    caller: Caller,
    prefix: str = "chatcmpl-",
) -> ChatCall:
    """Check a conversation and encode it. Raises the `BadRequest` that names the field at fault."""
    services, body = adapted.services, adapted.complete_chat(body)
    check_n(body, services)
    chat, tools = chat_format(services), _offered(body)
    encoded = await encode_conversation(body, services)
    prompt = encoded.tokens
    if not prompt:
        raise BadRequest("the messages have no tokens", param="messages")
    requested = body.max_completion_tokens or body.max_tokens
    params = sampling_params(
        body,
        services,
        prompt_tokens=len(prompt),
        max_tokens=requested,
        default_max_tokens=adapted.max_tokens(requested),
        clamp=True,
        field="messages",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await reply_grammar(body, tools, chat, reasoning_open=encoded.reasoning_open),
    )
    id_ = f"{prefix}{uuid.uuid4().hex}"
    if tools:
        params = msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *chat.stop_token_ids()))
    format = ReplyFormat(
        chat.tools if tools else None,
        chat.reasoning,
        encoded.reasoning_open,
        {tool.function.name: tool.function.parameters or {} for tool in tools},
        1 if body.parallel_tool_calls is False else None,
    )
    choices = make_choices(body, id_, 0, prompt, params, adapted.uses, caller, hidden=chat.hidden)
    return ChatCall(id_, int(time.time()), engine_info(services).model, choices, format)


async def encode_conversation(body: ChatCompletion, services: Services) -> ChatPrompt:
    """The prompt of a conversation and its tools. Raises the `BadRequest` that names the field at fault."""
    _check_together(body)
    chat, tools = chat_format(services), _offered(body)
    if tools and chat.tools is None:
        raise BadRequest("the base model's chat template has no format of tool calls that is known here", param="tools")
    arguments = reasoning_arguments(body.reasoning_effort, chat.template)
    if body.chat_template_kwargs is not None:
        arguments |= body.chat_template_kwargs.model_dump(exclude_none=True)
    return await encode_chat(
        services,
        body.messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        arguments=arguments,
    )


def _offered(body: ChatCompletion) -> list[FunctionTool]:
    """The functions that the model may call."""
    return [] if body.tool_choice == "none" else body.tools or []


def _holds_the_reply(body: ChatCompletion) -> bool:
    """Whether the whole reply must match something."""
    forms = (body.structured_outputs, body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    formatted = body.response_format is not None and body.response_format.type != "text"
    return formatted or any(form is not None for form in forms) or body.tool_choice not in (None, "auto", "none")


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
    if body.continue_final_message and _holds_the_reply(body):
        raise BadRequest(
            "a message that is continued cannot be held to a format or a tool call", param="continue_final_message"
        )
    if body.tool_choice == "required" and not names:
        raise BadRequest("tool_choice: required needs tools", param="tool_choice")
    if isinstance(body.tool_choice, NamedToolChoice) and body.tool_choice.function.name not in names:
        raise BadRequest(f"tools has no function {body.tool_choice.function.name}", param="tool_choice")
