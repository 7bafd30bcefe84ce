"""From a chat model's reply to content blocks: whole, or as stream events."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import msgspec

from lora_serve.api.chat_output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin

INVALID_JSON = "INVALID_JSON"  # the only key of an input that is no JSON object, as Anthropic's documentation does it


class ContentStream:
    """Stream events of one message's content blocks, of which at most one is open.

    Args:
        show_thinking: whether thinking blocks have their text.
    """

    def __init__(self, show_thinking: bool = True) -> None:
        self._show_thinking = show_thinking
        self._index = -1
        self._open: str | None = None  # type of the open block

    def write(self, event: OutputEvent) -> list[dict[str, Any]]:
        """The stream events for the next piece of the reply."""
        match event:
            case TextDelta(text):
                return [*self._continue("text", text=""), self._delta("text_delta", text=text)]
            case ReasoningDelta(text):
                started = self._continue("thinking", thinking="", signature="")
                return [*started, self._delta("thinking_delta", thinking=text)] if self._show_thinking else started
            case ToolCallBegin(_, name):
                return [*self.end(), self._start("tool_use", id=_tool_use_id(), name=name, input={})]
            case ToolCallArguments(_, text):
                return [self._delta("input_json_delta", partial_json=text)]

    def end(self) -> list[dict[str, Any]]:
        """The stream events that end the open block, if there is one."""
        if self._open is None:
            return []
        signature = [self._delta("signature_delta", signature="")] if self._open == "thinking" else []
        self._open = None
        return [*signature, {"type": "content_block_stop", "index": self._index}]

    def _continue(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Start a block, unless one of this type is open."""
        return [] if self._open == kind else [*self.end(), self._start(kind, **fields)]

    def _start(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._index += 1
        self._open = kind
        return {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **fields}}

    def _delta(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}


def content_blocks(events: Iterable[OutputEvent], show_thinking: bool = True) -> list[dict[str, Any]]:
    """The content blocks of a complete reply: those that its stream would have."""
    blocks: list[dict[str, Any]] = []
    for event in events:
        kind = blocks[-1]["type"] if blocks else None
        match event:
            case TextDelta(text):
                if kind != "text":
                    blocks.append({"type": "text", "text": ""})
                blocks[-1]["text"] += text
            case ReasoningDelta(text):
                if kind != "thinking":
                    blocks.append({"type": "thinking", "thinking": "", "signature": ""})
                blocks[-1]["thinking"] += text if show_thinking else ""
            case ToolCallBegin(_, name):
                blocks.append({"type": "tool_use", "id": _tool_use_id(), "name": name, "input": ""})
            case ToolCallArguments(_, text):
                blocks[-1]["input"] += text
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = _tool_input(block["input"])
    return blocks


def _tool_input(arguments: str) -> dict[str, Any]:
    """Arguments of a call as an object, even if they are malformed or were cut off."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {INVALID_JSON: arguments}


def _tool_use_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"
