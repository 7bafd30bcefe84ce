"""From a conversation to the tokens of a prompt, with the base's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_serve.api.bounded_template import TemplateTooSlow, run_template
from lora_serve.api.chat_output import ends_in_open_reasoning
from lora_serve.api.chat_template import template_messages, template_tools, without_lone_surrogates
from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.chat_schemas import FunctionTool, Message
from lora_serve.api.openai.encode import TextTooLong
from lora_serve.api.openai.preprocess import engine_info, text_too_long
from lora_serve.api.services import Services
from lora_serve.errors import BadRequest

NO_EFFORT = ("none", "minimal")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # arguments of chat templates


@dataclass(frozen=True)
class ChatPrompt:
    """An encoded conversation; `reasoning_open`: the reply begins inside the reasoning."""

    tokens: list[int]
    reasoning_open: bool


def chat_format(services: Services) -> ChatFormat:
    """The base's chat format. Raises `BadRequest` if it has no chat template."""
    if services.chat is None:
        raise BadRequest("the base model has no chat template; use /v1/completions", param="messages")
    return services.chat


async def encode_chat(
    services: Services,
    messages: Sequence[Message],
    *,
    tools: Sequence[FunctionTool] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    arguments: dict[str, Any] | None = None,
) -> ChatPrompt:
    """Encode messages with the base's chat template.

    Raises: `BadRequest` if it has none or rejects them; `ContextExceeded` if they are far longer than the context.

    Args:
        tools: functions that the template shows to the model.
        arguments: further arguments of the template.
    """
    chat = chat_format(services)
    info = engine_info(services)
    try:  # before any of them is copied
        services.encoder.check_length(sum(len(message.text) for message in messages), info.max_model_len)
    except TextTooLong:
        raise text_too_long(info, "messages") from None
    turns = template_messages([message.for_template() for message in messages], chat.template)
    functions = template_tools([tool.model_dump(exclude_none=True) for tool in tools]) or None

    def render() -> str:
        text: str = services.tokenizer.apply_chat_template(
            turns,
            tools=functions,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(arguments or {}),
        )
        return without_lone_surrogates(text)

    try:
        text = await asyncio.to_thread(run_template, render) if chat.bounded else await asyncio.to_thread(render)
    except TemplateTooSlow:
        raise BadRequest("the adapter's chat template takes too long on these messages", param="messages") from None
    except Exception as error:  # a template is a program: it can raise whatever it likes
        what = "tools" if functions and isinstance(error, TypeError) else "messages"
        raise BadRequest(f"the chat template refuses these {what}: {str(error)[:200]}", param=what) from error
    try:
        (tokens,) = await services.encoder.encode([text], info.max_model_len, add_special_tokens=False)
    except TextTooLong:
        raise text_too_long(info, "messages") from None
    continued = turns[-1]["content"] if continue_final_message else ""
    is_open = chat.reasoning is not None and ends_in_open_reasoning(text, chat.reasoning, continued)
    return ChatPrompt(tokens, is_open)


def thinking_switch(template: str) -> str | None:
    """The argument that switches a chat template's reasoning on and off; None if it has none."""
    return next((switch for switch in THINKING_SWITCHES if switch in template), None)


def reasoning_arguments(effort: str | None, template: str) -> dict[str, Any]:
    """Template arguments for a reasoning effort. Raises `BadRequest` if the template knows none."""
    if effort is None:
        return {}
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if (switch := thinking_switch(template)) is not None:
        return {switch: effort not in NO_EFFORT}
    if effort in NO_EFFORT:
        return {}
    raise BadRequest("the base model's chat template does not know reasoning_effort", param="reasoning_effort")
