"""Hermes 2 Pro and 3, Qwen 2.5, Qwen 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import re

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.json_reader import read_call_object
from lora_serve.api.chat_output.lark import CallRules
from lora_serve.api.chat_output.text_reader import Step, TextReader
from lora_serve.api.chat_output.tool_format import ToolFormat

BEGIN = "<tool_call>"
END = "</tool_call>"
TAIL = re.compile(r"[ \t\r\n}]+")  # some models close one brace too many


class HermesFormat(ToolFormat):
    """A JSON object in tags for each call."""

    name = "hermes"
    special_tokens = (BEGIN, END)

    def read(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        """Read a reply to its end."""
        while (yield from reader.until((BEGIN,), calls.text)):
            reader.hold()
            yield from reader.literal(BEGIN)
            yield from reader.skip()
            is_object = (yield from reader.peek()) == "{"
            if is_object and (yield from read_call_object(reader, calls, (END, BEGIN), marked=True)):
                reader.hold()
                yield from reader.skip(TAIL)
                if (yield from reader.literal(END)):
                    reader.drop()
            calls.text(reader.release())

    def grammar(self, rules: CallRules) -> str:
        """Lark rule `calls`: a reply's calls, and for `auto` its text."""
        bodies = rules.bodies(lambda name: f'{{"name": {json.dumps(name)}, "arguments": ', "}")
        return rules.marked_calls(BEGIN, f'"\\n" {bodies} "\\n" {rules.marker(END)}', separator='"\\n"')
