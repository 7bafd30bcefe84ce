"""Splits a chat model's generated text, as it comes, into text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Collection

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.events import OutputEvent
from lora_serve.api.chat_output.reasoning import ReasoningFormat, read_reasoning
from lora_serve.api.chat_output.text_reader import Step, TextReader
from lora_serve.api.chat_output.tool_format import ToolFormat


class OutputParser:
    """Splits one choice's text, as it comes, into text, reasoning and tool calls.

    The events, those that continue each other joined, do not depend on how the text is cut into pieces. What begins
    like a call and is none is text. A call has begun when its name and the start of its arguments have been read; from
    then on it stays one, even if the arguments turn out to be malformed or the text ends in them.

    Args:
        tools: format of tool calls; None: there are none.
        reasoning: tags around reasoning; None: there is none.
        reasoning_open: the prompt ends with the opening tag.
        known: names of the functions that may be called, any if empty. As a mapping, with the JSON schemas of their
            parameters, which formats need that write arguments without types.
        most_calls: number of calls after which further ones are left out.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        *,
        reasoning_open: bool = False,
        known: Collection[str] = (),
        most_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._reasoning_open = reasoning_open
        self._reader = TextReader()
        self._calls = CallWriter(known, most_calls, trim=tools is not None)
        self._steps = self._read()

    def feed(self, text: str) -> list[OutputEvent]:
        """Add text; returns the events that are certain now."""
        self._reader.append(text)
        next(self._steps, None)
        return self._calls.take_events()

    def flush(self, *, cut_off: bool = False) -> list[OutputEvent]:
        """End the text; returns the rest of the events, with what was held back.

        Args:
            cut_off: more text would have come, so that the beginning of a call at its end is not text.
        """
        self._reader.end(cut_off=cut_off)
        next(self._steps, None)
        return self._calls.take_events()

    @property
    def tool_calls(self) -> int:
        """Number of calls begun so far."""
        return self._calls.begun

    @property
    def last_call_is_complete(self) -> bool:
        """Whether the arguments of the last call are a complete JSON text."""
        return self._calls.last_call_is_complete

    def _read(self) -> Step[None]:
        if self._reasoning is not None:
            yield from read_reasoning(self._reader, self._calls, self._reasoning, is_open=self._reasoning_open)
        if self._tools is not None:
            yield from self._tools.read(self._reader, self._calls)
        else:
            yield from self._reader.until((), self._calls.text)
        self._calls.end()
