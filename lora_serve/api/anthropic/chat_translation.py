"""From the body of a message to the `ChatCompletion` that asks for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from lora_serve.api.anthropic.anthropic_errors import ThreadsUnsupported
from lora_serve.api.anthropic.message_blocks import Block, TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock
from lora_serve.api.anthropic.message_schemas import CustomTool, MessagesPrompt, MessageToolChoice, Thinking
from lora_serve.api.error_handlers import validation_error
from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.chat_prompt import thinking_switch
from lora_serve.api.openai.chat_schemas import ChatCompletion
from lora_serve.errors import BadRequest

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat_completion(body: MessagesPrompt, max_tokens: int | None, chat: ChatFormat) -> ChatCompletion:
    """Translate a body. Raises the `BadRequest` that names the field at fault."""
    if body.thread is not None:
        raise ThreadsUnsupported(
            "this server holds no conversations: send all messages, without thread", param="thread"
        )
    turns = merge_turns(body)
    choice = body.tool_choice
    if choice is not None and choice.type in ("any", "tool") and not body.tools:
        raise BadRequest(f"tool_choice {choice.type} needs tools", param="tool_choice")
    fields = {
        "model": body.model,
        "adapter": body.adapter,
        "messages": [message for role, blocks in turns for message in chat_messages(role, blocks)],
        "continue_final_message": turns[-1][0] == "assistant",
        "max_tokens": max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "user": body.metadata.user_id if body.metadata else None,
        "tools": [_function(tool) for tool in body.tools or () if isinstance(tool, CustomTool)] or None,
        "tool_choice": _tool_choice(choice),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "chat_template_kwargs": _thinking_arguments(body.thinking, chat),
        "reasoning_effort": _reasoning_effort(body, chat),
        "response_format": _response_format(body),
    }
    try:
        return ChatCompletion.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_input=False)]
        raise validation_error(problems, fields) from None


def merge_turns(body: MessagesPrompt) -> list[tuple[str, list[Block]]]:
    """Role and blocks of each turn: the system prompt is the first, and messages of one role in a row are one turn.

    An empty last message of the assistant, which continues nothing, is left out. Raises `BadRequest` for a last message
    of the assistant that cannot be continued.
    """
    merged: list[tuple[str, list[Block]]] = []
    for role, content in [("system", body.system or []), *((turn.role, turn.content) for turn in body.messages)]:
        blocks = _blocks(content)
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(blocks)
        elif blocks or role != "system":
            merged.append((role, [*blocks]))
    if merged and merged[-1][0] == "assistant":
        last = merged[-1][1]
        if any(isinstance(block, ToolUseBlock) for block in last):
            raise BadRequest("the last message has tool_use blocks, and no tool_result answers them", param="messages")
        if not _text(last).strip():
            if any(isinstance(block, ThinkingBlock) for block in last):
                raise BadRequest("the last message, the assistant's, has no text to continue", param="messages")
            merged.pop()
    if not merged or merged[-1][0] == "system":
        raise BadRequest("there is no message to answer", param="messages")
    return merged


def chat_messages(role: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """The chat messages of one turn: a tool's result is a message of its own."""
    if role == "assistant":
        calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
        message = {
            "role": role,
            "content": _text(blocks),
            "tool_calls": calls or None,
            "reasoning_content": "\n".join(thoughts) or None,
        }
        yield {name: value for name, value in message.items() if value is not None}
        return
    waiting: list[Block] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            if waiting:
                yield {"role": role, "content": _text(waiting)}
            waiting = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
        else:
            waiting.append(block)
    if waiting or not blocks:
        yield {"role": role, "content": _text(waiting)}


def _blocks(content: str | Sequence[Block]) -> Sequence[Block]:
    if isinstance(content, str):
        return [TextBlock(type="text", text=content)] if content else []
    return content


def _text(blocks: Sequence[Block]) -> str:
    """The text of all text blocks, one below the other."""
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock) and block.text)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    try:
        arguments = json.dumps(block.input, ensure_ascii=False)
    except RecursionError:
        raise BadRequest("the input of a tool_use block is nested too deeply", param="messages") from None
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultBlock) -> str:
    """A tool's result; as templates know no failed results, those say so in the text."""
    text = block.content if isinstance(block.content, str) else _text(block.content or ())
    return f"Error: {text}" if block.is_error and not text.lower().startswith("error") else text


def _function(tool: CustomTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: MessageToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return TOOL_CHOICES[choice.type]


def _thinking_arguments(thinking: Thinking | None, chat: ChatFormat) -> dict[str, bool] | None:
    if thinking is None:
        return None
    if thinking.type == "enabled" and chat.reasoning is None:
        raise BadRequest("the base model's chat template has no thinking; leave it out or disable it", param="thinking")
    switch = thinking_switch(chat.template)
    return None if switch is None else {switch: thinking.type != "disabled"}


def _reasoning_effort(body: MessagesPrompt, chat: ChatFormat) -> str | None:
    effort = body.output_config.effort if body.output_config else None
    if effort is None or "reasoning_effort" in chat.template:
        return "xhigh" if effort == "max" else effort
    if effort == "high":  # Anthropic's default
        return None
    raise BadRequest("the base model's chat template knows no effort but high", param="output_config.effort")


def _response_format(body: MessagesPrompt) -> dict[str, Any] | None:
    in_config = body.output_config.format if body.output_config else None
    if in_config is not None and body.output_format is not None:
        raise BadRequest("output_config.format and output_format exclude each other", param="output_format")
    format = in_config or body.output_format
    if format is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format.schema_}}
