"""JSON schemas of callers: their bounds, keywords that would have no effect, and OpenAI's strict subset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_serve.errors import BadRequest

DEEPEST_SCHEMA = 100  # nested objects and arrays
MOST_PROPERTIES = 2000  # of one object; compiling takes a time that grows with their square
LONGEST_PATH = 200  # characters of a schema path in an error message

# Keywords that llguidance enforces, or refuses where it cannot.
ENFORCED = {
    "type", "enum", "const", "allOf", "anyOf", "oneOf", "$ref", "$defs", "definitions", "$id", "$anchor", "$schema",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "contentEncoding", "contentMediaType", "contentSchema", "discriminator",
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


class Subschema(NamedTuple):
    """A schema inside a schema. `path`: of keywords; `objects`: how many objects it is nested in."""

    value: Any
    path: tuple[str, ...]
    objects: int


def check_strict(schema: Any, field: str) -> None:
    """Raise `BadRequest` with the path of the first subschema that is outside of OpenAI's strict subset."""
    check_nesting(schema, field)
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


def check_nesting(schema: Any, field: str) -> None:
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


def without_effectless(schema: Any, field: str) -> Any:
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
