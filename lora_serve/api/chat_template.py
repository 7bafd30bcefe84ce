"""Messages and tools in the form that chat templates expect, which differs from OpenAI's in places."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("name", "reasoning_content", "tool_call_id")  # passed on if they have a value
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
NINE_CHARACTERS = re.compile(r"length\s*(!=|<)\s*9")  # Mistral's templates check ids
ONE_CALL = "single tool-call"  # Llama 3's templates refuse several calls in one message


def template_messages(messages: Sequence[Mapping[str, Any]], chat_template: str) -> list[dict[str, Any]]:
    """OpenAI's messages for a chat template.

    - Content is a string: text parts are joined, and null is empty.
    - Arguments of tool calls are objects instead of JSON text, where that text is an object.
    - `developer` is `system`, unless the template knows it.
    - A tool's message has the function's name.
    - Tool call ids have nine letters and digits if the template insists on it.
    - Several calls of one message are several messages if the template insists on it.
    """
    short_ids = NINE_CHARACTERS.search(chat_template) is not None
    names: dict[str, str] = {}  # of functions, by id of the call
    converted = []
    for message in messages:
        role = message["role"]
        if role == "developer" and "developer" not in chat_template:
            role = "system"
        content = message.get("content")
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content or ())
        turn = {"role": role, "content": content} | {key: message[key] for key in KEYS if message.get(key)}
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        names |= {call["id"]: call["function"]["name"] for call in calls}
        if role == "tool" and turn.get("tool_call_id") in names:
            turn.setdefault("name", names[turn["tool_call_id"]])
        if short_ids:
            calls = [call | {"id": _short_id(call["id"])} for call in calls]
            if "tool_call_id" in turn:
                turn["tool_call_id"] = _short_id(turn["tool_call_id"])
        if ONE_CALL in chat_template:
            converted += [turn | {"tool_calls": [call]} for call in calls] or [turn]
        else:
            converted.append(turn | ({"tool_calls": calls} if calls else {}))
    return converted


def template_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's tools for a chat template: all with a description and parameters, which some templates insist on."""
    functions = [tool["function"] for tool in tools]
    return [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": {"type": "object", "properties": {}} | (function.get("parameters") or {}),
            },
        }
        for function in functions
    ]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": call.get("id") or "",
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(function.get("arguments"))},
    }


def _arguments(arguments: Any) -> Any:
    """Arguments as an object; as they are if they are none."""
    if not arguments:
        return {}
    try:
        decoded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


def _short_id(id_: str) -> str:
    """An id of nine letters and digits, the same for the same id."""
    return id_ if SHORT_ID.fullmatch(id_) else hashlib.sha256(id_.encode()).hexdigest()[:9]


def without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for surrogates that are no pair, as escapes in a tool call's arguments can make them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
