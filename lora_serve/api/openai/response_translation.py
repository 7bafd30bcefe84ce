"""From the body of a response to the `ChatCompletion` that asks for the same, and back from its errors' fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_serve.api.error_handlers import validation_error
from lora_serve.api.openai.chat_schemas import ChatCompletion
from lora_serve.api.openai.response_input import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    InputPart,
    ItemReference,
    MessageItem,
    ReasoningItem,
)
from lora_serve.api.openai.response_schemas import (
    LOGPROBS,
    AllowedFunctions,
    CreateResponse,
    JsonSchemaText,
    NamedFunctionChoice,
    ResponseFunction,
)
from lora_serve.errors import BadRequest, ServeError

RENAMED = {  # fields of a chat completion → of a response; the first that fits
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


FindItem = Callable[[str], dict[str, Any] | None]  # id of an item that is referred to → the item, if it is known
_item: TypeAdapter[InputItem] = TypeAdapter(InputItem)


def to_chat_completion(body: CreateResponse, find_item: FindItem) -> ChatCompletion:
    """Translate a body. Raises the `BadRequest` that names the field at fault."""
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    if body.top_logprobs and not body.logprobs:
        raise BadRequest(f"top_logprobs needs {LOGPROBS} in include", param="top_logprobs")
    effort = body.reasoning.effort if body.reasoning else None
    fields = {
        "model": body.model,
        "adapter": body.adapter,
        "messages": [*_instructions(body), *chat_messages(_resolved(body.input, find_item))],
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": body.logprobs or None,
        "top_logprobs": body.top_logprobs,
        "stream": body.stream,
        "tools": [_function(tool) for tool in _callable(body)] or None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": "xhigh" if effort == "max" else effort,
        "response_format": _response_format(body),
        "user": body.user,
        "safety_identifier": body.safety_identifier,
    }
    try:
        return ChatCompletion.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_input=False)]
        raise response_error(validation_error(problems, fields)) from None


def _resolved(given: str | Sequence[InputItem], find_item: FindItem) -> str | list[InputItem]:
    """An input with the items that it refers to. Raises `BadRequest` if one is not known."""
    if isinstance(given, str):
        return given
    resolved: list[InputItem] = []
    for index, item in enumerate(given):
        if isinstance(item, ItemReference):
            found = find_item(item.id)
            if found is None:
                raise BadRequest(
                    "this item is not known, or not any more; send the item itself", param=f"input.{index}.id"
                )
            item = _item.validate_python(found)
        resolved.append(item)
    return resolved


def chat_messages(given: str | Sequence[InputItem]) -> list[dict[str, Any]]:
    """The chat messages of an input: reasoning, text and function calls that follow each other are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    reply: dict[str, Any] | None = None  # the last message, if it is the assistant's
    for item in given:
        match item:
            case ReasoningItem():
                if thought := _reasoning(item):
                    reply = _begin_reply(messages)
                    reply["reasoning_content"] = thought
            case MessageItem(role="assistant"):
                if reply is None or reply["content"] or "tool_calls" in reply:
                    reply = _begin_reply(messages)
                reply["content"] = _text(item.content)
            case FunctionCallItem():
                if reply is None:
                    reply = _begin_reply(messages)
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                reply.setdefault("tool_calls", []).append(call)
            case FunctionCallOutputItem():
                reply = None
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            case MessageItem():
                reply = None
                messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def response_error(error: ServeError) -> ServeError:
    """The same error, about the field as it is called in a response's body."""
    param = error.param or ""
    if param.partition(".")[0] == "messages":  # input has items, which are not numbered like messages
        return type(error)(error.message, param="input", retry_after=error.retry_after)
    if param.startswith("tools."):
        named = param.replace(".function.", ".", 1)
    else:
        chat = next((chat for chat in RENAMED if f"{param}.".startswith(f"{chat}.")), None)
        if chat is None:
            return error
        named = RENAMED[chat] + param.removeprefix(chat)
    return type(error)(error.message.replace(param, named), param=named, retry_after=error.retry_after)


def _begin_reply(messages: list[dict[str, Any]]) -> dict[str, Any]:
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _instructions(body: CreateResponse) -> list[dict[str, Any]]:
    return [] if body.instructions is None else [{"role": "system", "content": body.instructions}]


def _text(content: str | Iterable[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.shown for part in content)


def _reasoning(item: ReasoningItem) -> str:
    """The reasoning as text; a summary, where there is nothing else."""
    return "\n".join(part.text for part in item.content or item.summary or ())


def _callable(body: CreateResponse) -> list[ResponseFunction]:
    """The functions that may be called."""
    functions = [tool for tool in body.tools or () if isinstance(tool, ResponseFunction)]
    if not isinstance(body.tool_choice, AllowedFunctions):
        return functions
    names = [allowed.name for allowed in body.tool_choice.tools]
    if unknown := set(names) - {function.name for function in functions}:
        raise BadRequest(f"tools has no function {min(unknown)}", param="tool_choice.tools")
    return [function for function in functions if function.name in names]


def _function(tool: ResponseFunction) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"})
    return {"type": "function", "function": function}


def _tool_choice(body: CreateResponse) -> Any:
    if isinstance(body.tool_choice, NamedFunctionChoice):
        return {"type": "function", "function": {"name": body.tool_choice.name}}
    return body.tool_choice.mode if isinstance(body.tool_choice, AllowedFunctions) else body.tool_choice


def _response_format(body: CreateResponse) -> dict[str, Any] | None:
    format = body.text.format if body.text else None
    if isinstance(format, JsonSchemaText):
        schema = format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": schema}
    return None if format is None else {"type": format.type}
