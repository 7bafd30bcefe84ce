"""From a chat model's reply to a response's output items, and the stream events that announce them."""

from __future__ import annotations

from typing import Any

from lora_serve.api.chat_output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from lora_serve.api.openai.chat_call import ChatOutput
from lora_serve.api.openai.response_items import OutputFunctionCall, OutputItem, OutputMessage, OutputReasoning
from lora_serve.api.openai.response_logprobs import TokenTexts, chat_logprobs
from lora_serve.request import Logprob

Events = list[dict[str, Any]]


class ResponseOutput:
    """The output of one response, of whose items at most the last is open.

    Args:
        texts: of tokens, for log-probabilities.
        top_logprobs: alternatives at each position.

    Attributes:
        items: the complete output items.
        finish_reason: once the reply is complete.
        generated, cached, reasoning: numbers of tokens generated, read from the prefix cache, and in the reasoning.
    """

    def __init__(self, texts: TokenTexts, top_logprobs: int) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.generated = self.cached = self.reasoning = 0
        self._texts = texts
        self._top_logprobs = top_logprobs
        self._open: OutputItem | None = None
        self._unassigned: list[Logprob] = []  # of tokens whose text has not come yet

    def write(self, output: ChatOutput) -> Events:
        """The stream events for the next output of the reply. The last one completes the items."""
        self.generated = output.generated
        self.cached = max(self.cached, output.cached)
        self._unassigned += output.logprobs
        written = [event for piece in output.events for event in self._write(piece)]
        if isinstance(self._open, OutputReasoning):
            self.reasoning = output.generated
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if not self.items and self._open is None:  # an empty answer is an answer
                written += self._begin(OutputMessage())
            written += self.close("incomplete" if output.finish_reason == "length" else "completed")
        return written

    def close(self, status: str) -> Events:
        """The stream events that complete the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        events = [self._event(item, f"response.{item.streamed}.done", item.done_fields())]
        if item.in_parts:
            events.append(self._event(item, "response.content_part.done", {"part": item.part()}))
        done = item.item(status)
        events.append({"type": "response.output_item.done", "output_index": len(self.items), "item": done})
        self.items.append(done)
        return events

    def _write(self, piece: OutputEvent) -> Events:
        logprobs, self._unassigned = self._unassigned, []
        match piece:
            case TextDelta(text):
                return [*self._continue(OutputMessage), self._delta(text, self._shown(logprobs, text))]
            case ReasoningDelta(text):
                return [*self._continue(OutputReasoning), self._delta(text)]
            case ToolCallBegin(_, name):
                return [*self.close("completed"), *self._begin(OutputFunctionCall(name))]
            case ToolCallArguments(_, text):
                return [self._delta(text)]

    def _continue(self, kind: type[OutputMessage | OutputReasoning]) -> Events:
        """Begin an item, unless one of this kind is open."""
        return [] if isinstance(self._open, kind) else [*self.close("completed"), *self._begin(kind())]

    def _begin(self, item: OutputItem) -> Events:
        self._open = item
        index = len(self.items)
        events: Events = [
            {"type": "response.output_item.added", "output_index": index, "item": item.item("in_progress")}
        ]
        if item.in_parts:
            events.append(self._event(item, "response.content_part.added", {"part": item.part()}))
        return events

    def _delta(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        item = self._open
        assert item is not None
        item.append(text, logprobs or ())
        return self._event(item, f"response.{item.streamed}.delta", item.delta_fields(text, logprobs or []))

    def _event(self, item: OutputItem, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """An event about the open item."""
        place: dict[str, Any] = {"item_id": item.id, "output_index": len(self.items)}
        if item.in_parts:
            place["content_index"] = 0
        return {"type": kind, **place, **fields}

    def _shown(self, entries: list[Logprob], text: str) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens that this text consists of: the last ones."""
        missing = len(text.encode())
        first = len(entries)
        while first and missing > 0:
            first -= 1
            missing -= len(self._texts.bytes(entries[first].token))
        shown: list[dict[str, Any]] = chat_logprobs(self._texts, entries[first:], self._top_logprobs)["content"]
        return shown
