"""The grammar of a chat reply: of its answer (`response_format`), its tool calls, and the reasoning before both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lora_serve.api.chat_output import Tool, answer_grammar, tool_grammar
from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.chat_schemas import ChatCompletion, FunctionTool, NamedToolChoice
from lora_serve.api.openai.json_schema import check_strict
from lora_serve.api.openai.structured_output import Grammar, structured_output


async def reply_grammar(
    body: ChatCompletion, tools: Sequence[FunctionTool], chat: ChatFormat, *, reasoning_open: bool
) -> Grammar | None:
    """The grammar that a reply must match; None if it is free.

    Args:
        tools: functions that may be called.
        reasoning_open: the reply begins inside the reasoning.

    Raises: `BadRequest`, naming the field.
    """
    answer = await structured_output(body)
    if not tools or chat.tools is None:
        if answer is None:
            return None
        text = answer_grammar(
            answer.text, reasoning=chat.reasoning, reasoning_open=reasoning_open, special_tokens=chat.special_tokens
        )
        return Grammar(text, answer.field)
    offered = _offered(tools)
    choice = body.tool_choice
    required: Literal["auto", "required"] | Tool = "auto"
    if isinstance(choice, NamedToolChoice):
        required = offered[choice.function.name]
    elif choice == "required":
        required = "required"
    elif answer is None and not any(tool.strict for tool in offered.values()):
        return None
    text = tool_grammar(
        chat.tools,
        [*offered.values()],
        required,
        answer=None if answer is None else answer.text,
        parallel=body.parallel_tool_calls is not False,
        reasoning=chat.reasoning,
        reasoning_open=reasoning_open,
        special_tokens=chat.special_tokens,
    )
    return Grammar(text, "tools" if answer is None else answer.field)


def _offered(tools: Sequence[FunctionTool]) -> dict[str, Tool]:
    """The functions by name. Raises `BadRequest` if a strict one's schema is outside of the strict subset."""
    offered = {}
    for index, tool in enumerate(tools):
        function = tool.function
        if function.strict and function.parameters is not None:
            check_strict(function.parameters, f"tools.{index}.function.parameters")
        offered[function.name] = Tool(function.name, function.parameters, bool(function.strict))
    return offered
