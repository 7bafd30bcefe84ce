"""Structured output: `response_format`, `structured_outputs` and the `guided_*` fields, lowered to one grammar.

The grammar is llguidance's text form, which the engine compiles. Here only what the client can be told at once is
checked: sizes, nesting, schema keywords that would have no effect, and OpenAI's strict subset of JSON Schema.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llguidance import LLMatcher

from lora_serve.api.openai.json_schema import check_nesting, check_strict, without_effectless
from lora_serve.api.openai.schemas import Generation, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from lora_serve.errors import BadRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST_SCHEMA = 200_000  # characters; of choices, too
LONGEST_GRAMMAR = 50_000  # characters of a regular expression or Lark grammar, which may hold schemas
LARGEST_COPIES = 4_000_000  # characters of a grammar times the sequences that it is sent with
LONG = 20_000  # characters; longer schemas are checked in a thread

# Between JSON's tokens; bounded, or a model that has lost its way would write blanks up to max_tokens.
WHITESPACE = r"[ \t\n\r]{0,40}"

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammar(NamedTuple):
    """A grammar in llguidance's text form, and the request field that it comes from."""

    text: str
    field: str


class Requested(NamedTuple):
    """One of the ways to ask for structured output: what kind of value, in which field."""

    kind: str
    field: str
    value: Any


async def structured_output(body: Generation) -> Grammar | None:
    """The grammar that the output must match, if the body asks for one. Raises `BadRequest`, naming the field."""
    found = list(_requested(body))
    if not found:
        return None
    if len(found) > 1:
        fields = " and ".join(each.field for each in found)
        raise BadRequest(f"{fields}: only one of these can be used at once", param=found[1].field)
    only, options = found[0], _whitespace(body)
    if _size(only.value) > LONG:
        return Grammar(await asyncio.to_thread(_lower, only, options), only.field)
    return Grammar(_lower(only, options), only.field)


def check_copies(grammar: Grammar | None, sequences: int) -> None:
    """Raise `BadRequest` if a grammar is too long for so many sequences, each of which is sent with it."""
    if grammar is not None and len(grammar.text) * sequences > LARGEST_COPIES:
        most = LARGEST_COPIES // len(grammar.text)
        raise BadRequest(
            f"{grammar.field}: a grammar of {len(grammar.text):,} characters can be used for {most} choices at once, "
            f"not for {sequences}",
            param=grammar.field,
        )


def json_schema_grammar(schema: Any, field: str, options: JsonCompileOptions | None = None) -> str:
    """The grammar of the JSON documents that a schema allows.

    Args:
        field: the request field that holds the schema, for errors.
        options: of llguidance; None: with up to 40 blanks between JSON's tokens.

    Raises: `BadRequest` for a schema that is too large, too deep, or has keywords that would be ignored.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise BadRequest(f"{field} must be a JSON Schema that allows something: an object or true", param=field)
    check_nesting(schema, field)
    effective = without_effectless(schema, field)
    text = json.dumps(effective, ensure_ascii=False)
    _check_length(text, field)
    return LLMatcher.grammar_from_json_schema(text, overrides=options or {"whitespace_pattern": WHITESPACE})


def _requested(body: Generation) -> Iterator[Requested]:
    """Every kind of structured output that the body asks for."""
    given = body.response_format
    if isinstance(given, JsonObjectFormat):
        yield Requested("json_object", "response_format", True)
    if isinstance(given, JsonSchemaFormat):
        kind = "strict_json" if given.json_schema.strict else "json"
        yield Requested(kind, "response_format.json_schema.schema", given.json_schema.schema_)
    outputs = body.structured_outputs or StructuredOutputs()
    if outputs.structural_tag is not None:
        raise BadRequest("structural_tag is not supported", param="structured_outputs.structural_tag")
    for kind, here, guided in (
        ("json", outputs.json_, body.guided_json),
        ("regex", outputs.regex, body.guided_regex),
        ("choice", outputs.choice, body.guided_choice),
        ("grammar", outputs.grammar, body.guided_grammar),
        ("json_object", outputs.json_object or None, None),
    ):
        if here is not None:
            yield Requested(kind, f"structured_outputs.{kind}", here)
        if guided is not None:
            yield Requested(kind, f"guided_{kind}", guided)


def _whitespace(body: Generation) -> JsonCompileOptions:
    """How JSON may be spaced."""
    outputs = body.structured_outputs or StructuredOutputs()
    if outputs.disable_any_whitespace:
        return {"whitespace_flexible": False}
    patterns = (outputs.whitespace_pattern, body.guided_whitespace_pattern, WHITESPACE)
    return {"whitespace_pattern": next(pattern for pattern in patterns if pattern is not None)}


def _lower(requested: Requested, options: JsonCompileOptions) -> str:
    kind, field, value = requested
    if isinstance(value, str):
        _check_length(value, field, LONGEST_GRAMMAR if kind in ("regex", "grammar") else LONGEST_SCHEMA)
    match kind:
        case "regex":
            return LLMatcher.grammar_from_regex(value)
        case "choice":
            text = "start: " + " | ".join(map(json.dumps, value))
            _check_length(text, field)
            return LLMatcher.grammar_from_lark(text)
        case "grammar":
            if value.lstrip().startswith("{"):  # llguidance would take it for its own JSON form
                raise BadRequest(f"{field} must be a grammar in Lark's syntax", param=field)
            return LLMatcher.grammar_from_lark(value)
        case "json_object":
            return json_schema_grammar(ANY_OBJECT, field, options)
    schema = _parsed(value, field) if isinstance(value, str) else value
    if kind == "strict_json":
        check_strict(schema, field)
    return json_schema_grammar(schema, field, options)


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{field} is not valid JSON: {str(error)[:100]}", param=field) from error


def _size(value: Any) -> int:
    """A lower bound of the length of a value's text, at most a bit more than `LONG`."""
    size, stack = 0, [value]
    while stack and size <= LONG:
        match stack.pop():
            case str(text):
                size += len(text)
            case dict(items):
                size += len(items)
                stack += [*items.keys(), *items.values()]
            case list(items):
                size += len(items)
                stack += items
    return size


def _check_length(text: str, field: str, most: int = LONGEST_SCHEMA) -> None:
    if len(text) > most:
        raise BadRequest(f"{field} is longer than {most:,} characters", param=field)
