"""Splits a choice's text into events."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_serve.api.chat_output.events import OutputEvent, TextDelta


class OutputParser:
    """Splits one choice's text, as it comes, into text, reasoning and tool calls."""

    def __init__(
        self,
        tools: Any,
        reasoning: Any,
        *,
        reasoning_open: bool = False,
        known: Collection[str] = (),
        most_calls: int | None = None,
    ) -> None:
        self.tool_calls = 0

    def feed(self, text: str) -> list[OutputEvent]:
        return [TextDelta(text)] if text else []

    def flush(self) -> list[OutputEvent]:
        return []
