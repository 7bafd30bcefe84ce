"""Output items of a response while they are generated: messages, reasoning and function calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, ClassVar

from lora_serve.api.openai.chat_call import MadeToolCall


class OutputItem:
    """An output item that grows by pieces of text.

    Attributes:
        prefix: of its id.
        streamed: what its stream events call the text.
        in_parts: whether the text is in a content part.
    """

    prefix: ClassVar[str]
    streamed: ClassVar[str]
    in_parts: ClassVar[bool] = True

    def __init__(self) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def append(self, text: str, logprobs: Iterable[dict[str, Any]] = ()) -> None:
        """Add the next piece."""
        self._pieces.append(text)
        self._logprobs += logprobs

    def part(self) -> dict[str, Any]:
        """The content part with the text so far."""
        raise NotImplementedError

    def delta_fields(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """What the event for a piece says of it."""
        return {"delta": text}

    def done_fields(self) -> dict[str, Any]:
        """What the event for the complete text says of it."""
        return {"text": self.text}

    def item(self, status: str) -> dict[str, Any]:
        """The item as JSON; one in progress has no content yet."""
        raise NotImplementedError

    def _content(self, status: str) -> list[dict[str, Any]]:
        return [] if status == "in_progress" else [self.part()]


class OutputMessage(OutputItem):
    """An answer in text."""

    prefix = "msg"
    streamed = "output_text"

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*self._logprobs]}

    def delta_fields(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"delta": text, "logprobs": logprobs}

    def done_fields(self) -> dict[str, Any]:
        return {"text": self.text, "logprobs": [*self._logprobs]}

    def item(self, status: str) -> dict[str, Any]:
        content = self._content(status)
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


class OutputReasoning(OutputItem):
    """The reasoning before an answer, as the model wrote it: there is no summary."""

    prefix = "rs"
    streamed = "reasoning_text"

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def item(self, status: str) -> dict[str, Any]:
        content = self._content(status)
        return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}


class OutputFunctionCall(OutputItem):
    """A call of a function; its text is the arguments."""

    prefix = "fc"
    streamed = "function_call_arguments"
    in_parts = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self._call = MadeToolCall(name)

    def done_fields(self) -> dict[str, Any]:
        return {"arguments": self.text, "name": self._call.name}

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": self.text,
        }
