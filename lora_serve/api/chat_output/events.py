"""What a chat model's reply consists of, in order: pieces of text and reasoning, and tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """The next piece of the reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A tool call begins; calls are numbered from 0, and one ends where the next begins."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of a call's arguments, as JSON text."""

    index: int
    text: str


OutputEvent = TextDelta | ReasoningDelta | ToolCallBegin | ToolCallArguments
