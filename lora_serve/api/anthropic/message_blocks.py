"""Content blocks and turns of a conversation, in Anthropic's shapes.

Fields that mean nothing here are accepted: prompts are always cached, so `cache_control` has no effect. Blocks that are
not served are refused with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from lora_serve.api.openai.chat_schemas import CacheControl, FunctionName, Identifier
from lora_serve.api.openai.schemas import Strict, Text
from lora_serve.api.openai.tagged_unions import LONGEST_KIND, NeverValid, by_kind, kind_of

NOT_TEXT = ("image", "document", "audio", "video")


class TextBlock(Strict):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None  # of a recorded answer


class DirectCaller(Strict):
    """Who made a tool call: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Strict):
    """A call of a tool that the assistant made."""

    type: Literal["tool_use"]
    id: Identifier
    name: FunctionName
    input: dict[str, Any]
    caller: DirectCaller | None = None
    toolset_name: None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict):
    """The assistant's reasoning. Signatures are empty here, and not checked."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class RedactedThinkingBlock(Strict):
    """Encrypted reasoning of another server, which cannot be read here and is left out."""

    type: Literal["redacted_thinking"]
    data: Text


class UnsupportedBlock(NeverValid):
    """A content block that is not served."""

    @classmethod
    def refusal(cls, value: Any) -> str:
        kind = kind_of(value)
        if kind in NOT_TEXT:
            return f"this server does not support {kind} input"
        return f"this server does not support content blocks of type {kind[:LONGEST_KIND]}"


OtherBlock = Annotated[UnsupportedBlock, Tag("other block")]
TextBlocks = Annotated[
    list[Annotated[Annotated[TextBlock, Tag("text block")] | OtherBlock, by_kind("block", "text")]],
    Field(max_length=10_000, fail_fast=True),
]


class ToolResultBlock(Strict):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: Text | TextBlocks | None = None
    is_error: bool | None = None
    toolset_name: None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")]
    | Annotated[ToolResultBlock, Tag("tool_result block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking block")]
    | OtherBlock,
    by_kind("block", "text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
BLOCKS_OF_ROLE: dict[str, tuple[type[Strict], ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
}


class Turn(Strict):
    """One message of a conversation.

    The texts of its text blocks are joined by line breaks, and so are messages of one role in a row. A last message of
    the assistant is continued.
    """

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(max_length=10_000, fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Turn:
        for block in self.content if isinstance(self.content, list) else ():
            if not isinstance(block, BLOCKS_OF_ROLE[self.role]):
                raise ValueError(f"a message of role {self.role} has no {block.type} blocks")
        return self
