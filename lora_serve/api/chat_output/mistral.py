"""Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, and since 2025 `[TOOL_CALLS]name[ARGS]{…}` for each call.

Some of the newer models write `[CALL_ID]` and an id before `[ARGS]`, or leave out `[ARGS]`.
"""

from __future__ import annotations

import json
import re

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.json_reader import read_arguments, read_call_object
from lora_serve.api.chat_output.lark import CallRules
from lora_serve.api.chat_output.text_reader import Step, TextReader
from lora_serve.api.chat_output.tool_format import ToolFormat

BEGIN = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
NAME = re.compile(r"[-\w.:/]+")


class MistralFormat(ToolFormat):
    """Calls after `[TOOL_CALLS]`; all ways are read, and one is forced by grammars.

    Args:
        with_array: force an array of calls.
        with_call_id: otherwise, allow `[CALL_ID]`.
    """

    name = "mistral"
    special_tokens = (BEGIN, ARGS, CALL_ID)

    def __init__(self, *, with_array: bool, with_call_id: bool = False) -> None:
        self._with_array = with_array
        self._with_call_id = with_call_id

    def read(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        """Read a reply to its end."""
        while (yield from reader.until((BEGIN,), calls.text)):
            reader.hold()
            yield from reader.literal(BEGIN)
            yield from reader.skip()
            if (yield from reader.literal("[")):
                yield from self._read_array(reader, calls)
            elif (yield from reader.peek()) == "{":
                yield from read_call_object(reader, calls, (BEGIN,), marked=True)
            else:
                yield from self._read_named(reader, calls)
            calls.text(reader.release())

    def _read_array(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        while True:
            yield from reader.skip()
            is_object = (yield from reader.peek()) == "{"
            if not is_object or not (yield from read_call_object(reader, calls, (BEGIN,), marked=True)):
                return
            reader.hold()
            yield from reader.skip()
            if not (yield from reader.literal(",")):
                if (yield from reader.literal("]")):
                    reader.drop()
                return

    def _read_named(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        pieces: list[str] = []
        yield from reader.run(NAME, pieces.append)
        name = "".join(pieces)
        if not name or not calls.knows(name):
            return
        yield from reader.skip()
        if (yield from reader.literal(CALL_ID)):
            yield from reader.skip(NAME)
        yield from reader.literal(ARGS)
        yield from reader.skip()
        if (yield from reader.peek()) == "{":
            yield from read_arguments(reader, calls, name, (BEGIN,))

    def grammar(self, rules: CallRules) -> str:
        """Lark rule `calls`: a reply's calls, and for `auto` its text."""
        if self._with_array:
            bodies = rules.bodies(lambda name: f'{{"name": {json.dumps(name)}, "arguments": ', "}")
            more = f'(", " {bodies})*' if rules.parallel else ""
            return rules.marked_calls(BEGIN, f'" "? "[" {bodies} {more} "]"', several=False)
        between = rules.marker(ARGS)
        if self._with_call_id:
            between = f"({rules.marker(CALL_ID)} /[a-zA-Z0-9]{{9}}/)? {between}"
        return rules.marked_calls(BEGIN, rules.bodies(lambda name: name, between=between))
