"""The input of a response as strict pydantic models: messages, function calls and their results, reasoning.

Whatever OpenAI's SDK or this server produced is accepted back; what is not text is refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Tag

from lora_serve.api.openai.chat_schemas import FunctionName, Identifier, Name
from lora_serve.api.openai.schemas import Strict, Text
from lora_serve.api.openai.tagged_unions import LONGEST_KIND, NeverValid, by_kind, kind_of

MOST_PARTS = 10_000
NOT_TEXT = {"input_image": "image", "input_file": "file", "input_audio": "audio"}

Status = Literal["in_progress", "completed", "incomplete"]


class InputTextPart(Strict):
    type: Literal["input_text"]
    text: Text

    @property
    def shown(self) -> str:
        return self.text


class OutputTextPart(Strict):
    """Text of a recorded answer."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None  # added by the SDK

    @property
    def shown(self) -> str:
        return self.text


class OutputRefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text

    @property
    def shown(self) -> str:
        return self.refusal


class UnsupportedInputPart(NeverValid):
    """A content part that is not text."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        what = NOT_TEXT.get(kind_of(value))
        if what:
            return f"this server does not support {what} input"
        return "a content part must have type input_text, output_text or refusal"

    @property
    def shown(self) -> str:
        return ""


InputPart = Annotated[
    Annotated[InputTextPart, Tag("input_text part")]
    | Annotated[OutputTextPart, Tag("output_text part")]
    | Annotated[OutputRefusalPart, Tag("refusal part")]
    | Annotated[UnsupportedInputPart, Tag("other part")],
    by_kind("part", "input_text", "output_text", "refusal"),
]
Content = Text | Annotated[list[InputPart], Field(max_length=MOST_PARTS, fail_fast=True)]


class MessageItem(Strict):
    """A message, as written by a client or as a response contained it."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Identifier | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    """A function call that the model made. `arguments` is JSON text."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)  # a dump of the SDK's model has `async_`

    type: Literal["function_call"]
    call_id: Identifier
    name: FunctionName
    arguments: Text
    id: Identifier | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None
    async_: Annotated[Literal[False] | None, Field(alias="async")] = None
    parsed_arguments: Any = None  # added by the SDK


class FunctionCallOutputItem(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Content
    id: Identifier | None = None
    status: Status | None = None
    name: Name | None = None
    namespace: None = None
    caller: None = None


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    """The model's reasoning; that of others, which is encrypted, is left out of the prompt."""

    type: Literal["reasoning"]
    id: Identifier | None = None
    summary: Annotated[list[SummaryText], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    encrypted_content: Text | None = None
    status: Status | None = None


class ItemReference(Strict):
    """An item that a response contained, by its id; kept in memory for a while (`item_memory.py`)."""

    type: Literal["item_reference"]
    id: Identifier


class UnsupportedItem(NeverValid):
    """An item that is not served."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        return f"this server does not support items of type {kind_of(value)[:LONGEST_KIND]}"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[ItemReference, Tag("item_reference item")]
    | Annotated[UnsupportedItem, Tag("other item")],
    by_kind(
        "item", "message", "function_call", "function_call_output", "reasoning", "item_reference", missing="message"
    ),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]
