"""Llama 3.1 to 4: the reply is `{"name": …, "parameters": {…}}`, several separated by `;` or nothing.

Llama 3 may write `<|python_tag|>` before it, Llama 4 `<|python_start|>` and `<|python_end|>`. Without a marker only an
object at the start of a reply can be a call, and only with both a name and parameters: it may be an answer in JSON.
"""

from __future__ import annotations

import json

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.json_reader import read_call_object
from lora_serve.api.chat_output.lark import CallRules
from lora_serve.api.chat_output.text_reader import Step, TextReader
from lora_serve.api.chat_output.tool_format import ToolFormat

MARKERS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")


class LlamaFormat(ToolFormat):
    """Bare JSON objects."""

    name = "llama"
    special_tokens = MARKERS
    stop_tokens = ("<|eom_id|>", "<|eom|>")

    def read(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        """Read a reply to its end."""
        possible = True  # a call may begin here
        after_call = False
        while True:
            reader.hold()
            yield from reader.skip()
            if after_call and (yield from reader.literal(";")):
                yield from reader.skip()
            while (yield from reader.literal(*MARKERS)):
                possible = True
                yield from reader.skip()
            is_object = possible and (yield from reader.peek()) == "{"
            if is_object and (yield from read_call_object(reader, calls, marked=False)):
                after_call = True
                continue
            calls.text(reader.release())
            possible = after_call = False
            if not (yield from reader.until(MARKERS, calls.text)):
                return

    def grammar(self, rules: CallRules) -> str:
        """Lark rule `calls`: a reply's calls, and for `auto` its text.

        For `auto`, a reply that begins with a brace is a call, unless calls are announced.
        """
        body = rules.bodies(lambda name: f'{{"name": {json.dumps(name)}, "parameters": ', "}")
        marker = rules.special(MARKERS[0])
        begin = rules.marker(MARKERS[0]) if rules.announced else f"{marker}?" if marker else ""
        more = f'("; "? {body})*' if rules.parallel else ""
        forced = f"{begin} {body} {more}"
        if rules.required:
            return f"calls: {forced}"
        text = f"FREE_TEXT? | FREE_TEXT? {marker} {body} {more}" if marker else "FREE_TEXT?"
        return f"calls: {forced} | {text}\nFREE_TEXT: /[ \\t\\r\\n]*[^{{ \\t\\r\\n](.|\\n)*/"
