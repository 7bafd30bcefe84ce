"""How a model writes messages: found once in its chat template and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_serve.api.chat_output import (
    ReasoningFormat,
    ToolFormat,
    detect_reasoning_format,
    detect_tool_format,
    special_token_ids,
)


@dataclass(frozen=True)
class ChatFormat:
    """A model's messages.

    Attributes:
        template: the text of the chat template, that for tools if there are several.
        tools: how it writes tool calls; None if it makes none that are known here.
        reasoning: how it marks its reasoning; None if it does not reason.
        special_tokens: ids of the vocabulary's special tokens, by text, as grammars refer to them.
        hidden: ids of the special tokens that are not part of a message's text; the markers of tool calls and reasoning
            are, as they are parsed.
        bounded: the template is an adapter's, which may take only so long.
    """

    template: str
    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    special_tokens: Mapping[str, int]
    hidden: frozenset[int]
    bounded: bool = False

    @classmethod
    def of(cls, tokenizer: Any, *, bounded: bool = False) -> ChatFormat | None:
        """The format of a Hugging Face tokenizer's chat template; None if it has none."""
        if not tokenizer.chat_template:
            return None
        template: str = tokenizer.get_chat_template(tools=[{}])
        tools, reasoning = detect_tool_format(template), detect_reasoning_format(template)
        special = special_token_ids(tokenizer)
        markers = {*(tools.special_tokens if tools else ()), *(reasoning.special_tokens if reasoning else ())}
        hidden = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in markers
        }
        return cls(template, tools, reasoning, special, frozenset(hidden), bounded)

    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply with tool calls, besides the model's end tokens."""
        names = self.tools.stop_tokens if self.tools else ()
        return tuple(self.special_tokens[name] for name in names if name in self.special_tokens)
