"""The input of a response as strict pydantic models: messages, function calls and their results, reasoning.

Whatever OpenAI's SDK or this server produced is accepted back; what is not text is refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from lora_serve.api.openai.chat_schemas import FunctionName, Identifier, Name
from lora_serve.api.openai.schemas import Strict, Text

LONGEST_KIND = 50  # characters of a type in a message
MOST_PARTS = 10_000
NOT_TEXT = {"input_image": "image", "input_file": "file", "input_audio": "audio"}
NEVER_VALID = ConfigDict(json_schema_extra={"not": {}})

Status = Literal["in_progress", "completed", "incomplete"]


def kind_of(value: Any) -> str:
    """The `type` of an item, part or tool; only messages may be without."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "message" if kind is None else "unknown"


def by_kind(what: str, *supported: str) -> Discriminator:
    """Choose the union's member by `type`. Tags are not names of fields, which errors would mistake them for."""
    return Discriminator(lambda value: f"{kind} {what}" if (kind := kind_of(value)) in supported else f"other {what}")


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


class UnsupportedInputPart(Strict):
    """A content part that is not text; its validation always fails, with the reason."""

    model_config = NEVER_VALID

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        what = NOT_TEXT.get(kind_of(value))
        raise ValueError(
            f"this server does not support {what} input"
            if what
            else "a content part must have type input_text, output_text or refusal"
        )

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


class UnsupportedItem(Strict):
    """An item that is not served; its validation always fails, with the reason."""

    model_config = NEVER_VALID

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError(f"this server does not support items of type {kind_of(value)[:LONGEST_KIND]}")


InputItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[ItemReference, Tag("item_reference item")]
    | Annotated[UnsupportedItem, Tag("other item")],
    by_kind("item", "message", "function_call", "function_call_output", "reasoning", "item_reference"),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]
