"""From a chat model's generated text to semantic events, and grammars that force tool calls."""

from lora_serve.api.chat_output.detect import detect_tool_format
from lora_serve.api.chat_output.events import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from lora_serve.api.chat_output.lark import Tool
from lora_serve.api.chat_output.parser import OutputParser
from lora_serve.api.chat_output.reasoning import ReasoningFormat, detect_reasoning_format, ends_in_open_reasoning
from lora_serve.api.chat_output.tool_format import ToolFormat
from lora_serve.api.chat_output.tool_grammar import answer_grammar, special_token_ids, tool_grammar

__all__ = [
    "OutputEvent",
    "OutputParser",
    "ReasoningDelta",
    "ReasoningFormat",
    "TextDelta",
    "Tool",
    "ToolCallArguments",
    "ToolCallBegin",
    "ToolFormat",
    "answer_grammar",
    "detect_reasoning_format",
    "detect_tool_format",
    "ends_in_open_reasoning",
    "special_token_ids",
    "tool_grammar",
]
