"""Qwen 3 Coder, Qwen 3.5: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

Values are written without quotes, so that the function's JSON schema has to say which ones are strings. Arguments come
out as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_serve.api.chat_output.call_writer import CallWriter
from lora_serve.api.chat_output.lark import CallRules, Tool, literal
from lora_serve.api.chat_output.text_reader import Step, TextReader
from lora_serve.api.chat_output.tool_format import ToolFormat

BEGIN = "<tool_call>"
END = "</tool_call>"
FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
KEY = re.compile(r"[^<>\s]+")
LITERALS = {"True": "true", "False": "false", "None": "null"}  # written by some models


class QwenCoderFormat(ToolFormat):
    """Calls as nested tags."""

    name = "qwen-coder"
    special_tokens = (BEGIN, END)

    def read(self, reader: TextReader, calls: CallWriter) -> Step[None]:
        """Read a reply to its end."""
        while (yield from reader.until((BEGIN, FUNCTION), calls.text)):
            reader.hold()
            yield from reader.literal(BEGIN)
            yield from reader.skip()
            if (yield from reader.literal(FUNCTION)):
                name = yield from _read_key(reader)
                if name and calls.knows(name):
                    reader.drop()
                    calls.begin(name)
                    yield from _read_parameters(reader, calls, name)
                    reader.hold()
                    yield from reader.skip()
                    if (yield from reader.literal(END)):
                        reader.drop()
            calls.text(reader.release())

    def grammar(self, rules: CallRules) -> str:
        """Lark rule `calls`: a reply's calls, and for `auto` its text."""
        functions = " | ".join(_function(rules, tool) for tool in rules.tools)
        body = f'"\\n" ({functions}) "\\n" {rules.marker(END)}'
        values = f"xml_text[lazy]: XML_TEXT? {literal(PARAMETER_END)}\nXML_TEXT: /(.|\\n)+/"
        return rules.marked_calls(BEGIN, body, separator='"\\n"') + f"\n{values}"


def _read_key(reader: TextReader) -> Step[str]:
    """What comes before the `>` of a tag; empty if it is malformed."""
    pieces: list[str] = []
    yield from reader.run(KEY, pieces.append)
    return "".join(pieces) if (yield from reader.literal(">")) else ""


def _read_parameters(reader: TextReader, calls: CallWriter, name: str) -> Step[None]:
    """Consume a function's parameters and its end, and write a JSON object, which stays open if the text ends."""
    schema = calls.schema(name)
    calls.arguments("{")
    separator = ""
    while True:
        yield from reader.skip()
        if not (yield from reader.literal(PARAMETER)):
            break
        key = yield from _read_key(reader)
        calls.arguments(f"{separator}{_quoted(key)}: ")
        separator = ", "
        if not (yield from _read_parameter(reader, calls, _types(schema, key))):
            return
    if (yield from reader.peek()):
        calls.arguments("}")
    yield from reader.literal(FUNCTION_END)


def _read_parameter(reader: TextReader, calls: CallWriter, types: set[str]) -> Step[bool]:
    """Consume a value and its end, and write it as JSON, strings as they come; False if the text ends in it."""
    yield from reader.literal("\n")
    ends = (f"\n{PARAMETER_END}", PARAMETER_END)
    if types == {"string"}:
        calls.arguments('"')
        end = yield from reader.until(ends, lambda text: calls.arguments(_quoted(text)[1:-1]))
        calls.arguments('"' if end else "")
    else:
        pieces: list[str] = []
        end = yield from reader.until(ends, pieces.append)
        calls.arguments(_value("".join(pieces), types))
    yield from reader.literal(*ends)
    return bool(end)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _value(text: str, types: set[str]) -> str:
    """JSON of a value that is not only a string: what it says, if that is JSON of a type that it may have."""
    stripped = LITERALS.get(text.strip(), text.strip())
    try:
        value = json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    if "string" in types and not types & _types_of(value):
        return _quoted(text)
    return stripped


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _types_of(value: Any) -> set[str]:
    """JSON schema's names of a value's types."""
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case list():
            return {"array"}
        case dict():
            return {"object"}
        case _:
            return set()  # a string in quotes is those quotes too


def _types(schema: Mapping[str, Any], key: str) -> set[str]:
    """Types that a schema allows for a property; empty if it does not say."""
    properties = schema.get("properties")
    declared = properties.get(key) if isinstance(properties, Mapping) else None
    if not isinstance(declared, Mapping):
        return set()
    types = declared.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {str(entry) for entry in types}
    values = declared.get("enum")
    return {"string"} if isinstance(values, list) and all(isinstance(value, str) for value in values) else set()


def _function(rules: CallRules, tool: Tool) -> str:
    """Lark of one function's call: its properties in their order, each of them valid, strings but for their format."""
    schema = rules.schema(tool)
    properties = schema.get("properties") or {}
    definitions = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
    parts = [literal(f"{FUNCTION}{tool.name}>\n")]
    for key, declared in properties.items():
        declared = declared if isinstance(declared, Mapping) else {}
        end = literal(f"\n{PARAMETER_END}\n")
        if _types(schema, key) != {"string"}:
            value = f"{rules.json(definitions | dict(declared), strict=tool.strict)} {end}"
        elif "enum" in declared:
            value = f"({' | '.join(map(literal, declared['enum']))}) {end}"
        else:
            value = 'xml_text "\\n"'
        parameter = f"{literal(f'{PARAMETER}{key}>{chr(10)}')} {value}"
        parts.append(parameter if key in (schema.get("required") or ()) else f"({parameter})?")
    if not properties and schema.get("additionalProperties") is not False:
        parts.append(f"({literal(PARAMETER)} /[^<>\\s]{{1,64}}/ {literal(f'>{chr(10)}')} xml_text {literal(chr(10))})*")
    return " ".join([*parts, literal(FUNCTION_END)])
