"""Where readers of a format put what they find: text and tool calls become output events."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from lora_serve.api.chat_output.events import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin


class EdgeTrimmer:
    """Text without white space at its start and end; white space is held back until more text follows."""

    def __init__(self, *, trim_start: bool) -> None:
        self._started = not trim_start
        self._space: list[str] = []

    def feed(self, text: str) -> str:
        """The text that can be passed on now."""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        end = len(text.rstrip())
        if end == 0:
            self._space.append(text)
            return ""
        self._space.append(text[:end])
        ready, self._space = "".join(self._space), [text[end:]]
        return ready

    def flush(self) -> str:
        """The white space that was held back."""
        space, self._space = "".join(self._space), []
        return space


class CallWriter:
    """Turns text and calls into output events.

    Args:
        known: names of the functions that may be called, any if empty; a mapping also gives their parameters' schemas.
        most: number of calls after which further ones are left out.
        trim: leave out white space next to calls, for which white space at the end of text is held back.
    """

    def __init__(self, known: Collection[str] = (), most: int | None = None, *, trim: bool = False) -> None:
        self.begun = 0
        self._known = known
        self._most = most
        self._trim = trim
        self._text = EdgeTrimmer(trim_start=False)
        self._silent = False  # the current call is left out
        self._arguments: list[str] = []  # of the last call
        self._events: list[OutputEvent] = []

    def knows(self, name: str) -> bool:
        """Whether a function may be called."""
        return not self._known or name in self._known

    def schema(self, name: str) -> Mapping[str, Any]:
        """JSON schema of a function's parameters; empty if it is not known."""
        schema = self._known.get(name) if isinstance(self._known, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}

    def reasoning(self, text: str) -> None:
        """Write reasoning."""
        if text:
            self._events.append(ReasoningDelta(text))

    def text(self, text: str) -> None:
        """Write a piece of the answer."""
        text = self._text.feed(text) if self._trim else text
        if text:
            self._events.append(TextDelta(text))

    def begin(self, name: str) -> None:
        """Begin a call."""
        self._text = EdgeTrimmer(trim_start=True)
        self._silent = self._most is not None and self.begun >= self._most
        if not self._silent:
            self._events.append(ToolCallBegin(self.begun, name))
            self.begun += 1
            self._arguments.clear()

    def arguments(self, text: str) -> None:
        """Write a piece of the current call's arguments."""
        if text and not self._silent:
            self._events.append(ToolCallArguments(self.begun - 1, text))
            self._arguments.append(text)

    @property
    def last_call_is_complete(self) -> bool:
        """Whether the arguments of the last call are a complete JSON text."""
        try:
            json.loads("".join(self._arguments), strict=False)
        except (ValueError, RecursionError):
            return False
        return True

    def end(self) -> None:
        """Write what was held back."""
        if space := self._text.flush():
            self._events.append(TextDelta(space))

    def take_events(self) -> list[OutputEvent]:
        """The events since the last call, those that continue each other joined."""
        events, self._events = self._events, []
        return events if len(events) < 2 else list(_joined(events))


def _joined(events: list[OutputEvent]) -> Iterator[OutputEvent]:
    for _, group in groupby(events, key=lambda event: (type(event), getattr(event, "index", 0))):
        first, *rest = group
        if isinstance(first, ToolCallBegin):
            yield from (first, *rest)
        else:
            texts = [first.text, *(event.text for event in rest if not isinstance(event, ToolCallBegin))]
            yield replace(first, text="".join(texts))
