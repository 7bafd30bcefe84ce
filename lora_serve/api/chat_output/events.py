"""What a chat model's output consists of, in order, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A tool call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the JSON text of a tool call's arguments."""

    index: int
    text: str


OutputEvent = TextDelta | ReasoningDelta | ToolCallBegin | ToolCallArguments
