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

from lora_serve.api.openai.schemas import Generation, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from lora_serve.errors import BadRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST_SCHEMA = 200_000  # characters; of choices, too
LONGEST_GRAMMAR = 50_000  # characters of a regular expression or Lark grammar, which may hold schemas
LARGEST_COPIES = 4_000_000  # characters of a grammar times the sequences that it is sent with
MOST_PROPERTIES = 2000  # of one object; compiling takes a time that grows with their square
DEEPEST_SCHEMA = 100  # nested objects and arrays
LONG = 20_000  # characters; longer schemas are checked in a thread
LONGEST_PATH = 200  # characters of a schema path in an error message

# Between JSON's tokens; bounded, or a model that has lost its way would write blanks up to max_tokens.
WHITESPACE = r"[ \t\n\r]{0,40}"

ANY_OBJECT: dict[str, Any] = {"type": "object"}

# Keywords that llguidance enforces, or refuses where it cannot.
ENFORCED = {
    "type", "enum", "const", "allOf", "anyOf", "oneOf", "$ref", "$defs", "definitions", "$id", "$anchor", "$schema",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "contentEncoding", "contentMediaType", "contentSchema",
}  # fmt: skip
# Keywords whose values are schemas by name, lists of schemas, and schemas.
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SINGLE = frozenset({"items", "additionalProperties", "additionalItems"})
# Keywords that llguidance refuses even where they allow everything; left out there.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "nullable": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}

# OpenAI's strict subset: https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
STRICT_KEYWORDS = ANNOTATIONS | {
    "type", "enum", "const", "anyOf", "$ref", "$defs", "definitions", "properties", "required",
    "additionalProperties", "items", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$schema",
}  # fmt: skip
STRICT_DEPTH = 10  # nested objects
STRICT_PROPERTIES = 5000  # of all objects
STRICT_ENUM_VALUES = 1000
STRICT_NAMES = 120_000  # characters of all property and definition names, enum and const values


class Grammar(NamedTuple):
    """A grammar in llguidance's text form, and the request field that it comes from."""

    text: str
    field: str


class Subschema(NamedTuple):
    """A schema inside a schema. `path`: of keywords; `objects`: how many objects it is nested in."""

    value: Any
    path: tuple[str, ...]
    objects: int


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
    _check_nesting(schema, field)
    effective = _without_effectless(schema, field)
    text = json.dumps(effective, ensure_ascii=False)
    _check_length(text, field)
    return LLMatcher.grammar_from_json_schema(text, overrides=options or {"whitespace_pattern": WHITESPACE})


def check_strict(schema: Any, field: str) -> None:
    """Raise `BadRequest` with the path of the first subschema that is outside of OpenAI's strict subset."""
    _check_nesting(schema, field)
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise BadRequest(f"{field}: with strict: true the root must be of type object", param=field)
    properties = values = names = 0
    for sub in _subschemas(schema, field):
        at = _dotted(field, sub.path)
        if not isinstance(sub.value, dict):
            raise BadRequest(f"{at}: with strict: true a schema must be an object", param=at)
        if unsupported := sorted(sub.value.keys() - STRICT_KEYWORDS):
            raise BadRequest(f"{at}: {unsupported[0][:100]} is not permitted with strict: true", param=at)
        if sub.objects > STRICT_DEPTH:
            raise BadRequest(f"{at}: objects are nested deeper than {STRICT_DEPTH}", param=at)
        declared = sub.value.get("properties", {})
        types = sub.value.get("type")
        if declared or types == "object" or (isinstance(types, list) and "object" in types):
            _check_strict_object(sub.value, declared, at)
        listed = [*sub.value["enum"]] if isinstance(sub.value.get("enum"), list) else []
        listed += [sub.value["const"]] if "const" in sub.value else []
        properties += len(declared)
        values += len(listed)
        definitions = [*sub.value.get("$defs", {}), *sub.value.get("definitions", {})]
        names += sum(map(len, [*declared, *definitions, *(each for each in listed if isinstance(each, str))]))
    for count, most, what in (
        (properties, STRICT_PROPERTIES, "properties"),
        (values, STRICT_ENUM_VALUES, "enum values"),
        (names, STRICT_NAMES, "characters in names and enum values"),
    ):
        if count > most:
            raise BadRequest(f"{field}: {count} {what}; with strict: true at most {most}", param=field)


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


def _check_nesting(schema: Any, field: str) -> None:
    level = [schema]
    for _ in range(DEEPEST_SCHEMA):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise BadRequest(f"{field} is nested deeper than {DEEPEST_SCHEMA} levels", param=field)


def _subschemas(schema: Any, field: str) -> Iterator[Subschema]:
    """A schema and all schemas in it, outer ones first."""
    queue = [Subschema(schema, (), 0)]
    for sub in queue:
        if isinstance(sub.value, dict):
            for key in MAPS & sub.value.keys():
                if not isinstance(sub.value[key], dict):
                    at = _dotted(field, (*sub.path, key))
                    raise BadRequest(f"{at} must be an object", param=at)
            queue += _children(sub)
        yield sub


def _children(sub: Subschema) -> Iterator[Subschema]:
    inside = sub.objects + ("properties" in sub.value)
    for key, value in sub.value.items():
        path = (*sub.path, key)
        if key in MAPS:
            objects = 0 if key in ("$defs", "definitions") else inside
            yield from (Subschema(each, (*path, name), objects) for name, each in value.items())
        elif key in LISTS and isinstance(value, list):
            yield from (Subschema(each, (*path, str(index)), inside) for index, each in enumerate(value))
        elif key in SINGLE and isinstance(value, dict):
            yield Subschema(value, path, inside)


def _without_effectless(schema: Any, field: str) -> Any:
    """The schema without keywords that have no effect. Raises `BadRequest` for those that would be ignored."""
    copied = _copy(schema)
    for sub in _subschemas(copied, field):
        if not isinstance(sub.value, dict):
            continue
        if len(sub.value.get("properties", {})) > MOST_PROPERTIES:
            at = _dotted(field, (*sub.path, "properties"))
            raise BadRequest(f"{at}: an object has more than {MOST_PROPERTIES} properties", param=at)
        for key in [key for key in sub.value if key not in ENFORCED]:
            value = sub.value[key]
            if key in ANNOTATIONS or any(value is other or value == other for other in WITHOUT_EFFECT.get(key, ())):
                del sub.value[key]
                continue
            at = _dotted(field, (*sub.path, key))
            raise BadRequest(f"{at}: this server does not support the keyword {key[:100]}", param=at)
    return copied


def _copy(value: Any) -> Any:
    """A deep copy of JSON, whose nesting is bounded."""
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def _check_strict_object(schema: dict[str, Any], declared: Any, at: str) -> None:
    if schema.get("additionalProperties") is not False:
        raise BadRequest(f"{at}: additionalProperties must be false with strict: true", param=at)
    required = schema.get("required")
    listed = set(map(str, required)) if isinstance(required, list) else set()
    missing = [name for name in declared if name not in listed]
    if missing:
        raise BadRequest(
            f"{at}: with strict: true required must list every property; {missing[0][:100]!r} is missing", param=at
        )


def _dotted(field: str, path: tuple[str, ...]) -> str:
    return ".".join((field, *path))[:LONGEST_PATH]
