"""What every format of tool calls can do: read them from generated text, and force them by a grammar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.lark import CallRules
from lora_serve.api.chat_output.text_reader import Step, TextReader


class ToolFormat(ABC):
    """How one family of models writes tool calls.

    `special_tokens` are markers that the vocabulary may have as special tokens, which detokenization has to keep.
    `stop_tokens` end a reply with calls, besides the model's end-of-sequence tokens.
    """

    name: ClassVar[str]
    special_tokens: ClassVar[tuple[str, ...]]
    stop_tokens: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        """Read a reply to its end."""

    @abstractmethod
    def grammar(self, rules: CallRules) -> str:
        """Lark rule `calls`: a reply's calls, and for `auto` its text."""
