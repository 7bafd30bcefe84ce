"""Structured output: each field is lowered to a grammar that allows what it should, or refused by name."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from stub_completions import StubCompletionApp, byte_tokenizer

from lora_serve.api.openai.structured_output import LISTS, MAPS, SINGLE, check_strict, json_schema_grammar
from lora_serve.errors import BadRequest

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOOD, BAD = '{"name": "Jo", "age": 7}', '{"name": "Jo"}'


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


def strict(schema: Any, **more: Any) -> dict[str, Any]:
    schema = {"name": "answer", "schema": schema, "strict": True, **more}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def allows(grammar: str | None, text: str) -> bool:
    """Whether a whole text matches the grammar, as llguidance sees it."""
    assert grammar is not None
    matcher = LLMatcher(LLTokenizer(byte_tokenizer().backend_tokenizer.to_str(), eos_token=[257]), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [*text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


ACCEPTED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
    (strict(PERSON, description="a person"), GOOD, BAD),
    (strict(PERSON, strict=False), GOOD, BAD),
    (strict(PERSON | {"$schema": "http://json-schema.org/draft-07/schema#"}), GOOD, BAD),  # as zod writes it
    (strict({"type": "string", "minLength": 2, "default": "xx"}, strict=None), '"xx"', '"x"'),
    ({"structured_outputs": {"json": PERSON}}, GOOD, BAD),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, GOOD, BAD),
    ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}}, GOOD.replace(" ", ""), GOOD),
    ({"structured_outputs": {"json": PERSON, "whitespace_pattern": "_?"}}, GOOD.replace(" ", "_"), GOOD),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": r"\d{2}/x"}}, "12/x", "1/x"),
    ({"structured_outputs": {"choice": ["yes", 'n"o\n', "é"]}}, 'n"o\n', "ye"),
    ({"structured_outputs": {"grammar": 'start: "a" b*\nb: "b"'}}, "abb", "b"),
    ({"structured_outputs": {"json_object": False, "regex": "a"}}, "a", "b"),
    ({"guided_json": PERSON}, GOOD, BAD),
    ({"guided_regex": "^a+$"}, "aa", ""),
    ({"guided_choice": ["a", ""]}, "", "b"),
    ({"guided_grammar": 'start: "é"'}, "é", "e"),
    ({"guided_json": {"type": "object"}, "guided_whitespace_pattern": ""}, '{"a":1}', '{"a": 1}'),
    (
        strict({"type": "array", "uniqueItems": False, "title": "t", "items": {"$comment": "c"}}, strict=False),
        "[1]",
        "{}",
    ),
    (  # names of properties are not keywords
        strict({"type": "object", "properties": {"not": {"const": {"if": 1}}}, "required": ["not"]}, strict=False),
        '{"not": {"if": 1}}',
        "{}",
    ),
]


@pytest.mark.parametrize("body", [body for body, _, _ in ACCEPTED], ids=str)
async def test_every_field_becomes_a_grammar(server: StubCompletionApp, body: dict[str, Any]) -> None:
    _, good, bad = next(case for case in ACCEPTED if case[0] is body)
    for answer in (await server.complete(**body), await server.chat(**body)):
        assert answer.status_code == 200, answer.text
    for request in server.engine.requests:
        assert allows(request.sampling.grammar, good)
        assert not allows(request.sampling.grammar, bad)


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}], ids=str)
async def test_without_structured_output_there_is_no_grammar(server: StubCompletionApp, body: dict[str, Any]) -> None:
    assert (await server.complete(**body)).status_code == 200
    assert server.engine.requests[0].sampling.grammar is None


async def test_all_choices_have_the_grammar_and_it_names_its_field(server: StubCompletionApp) -> None:
    await server.complete(prompt=["a", "b"], n=2, guided_regex="a")
    sampling = [request.sampling for request in server.engine.requests]
    assert len(sampling) == 4
    assert {(each.grammar is not None, each.grammar_field) for each in sampling} == {(True, "guided_regex")}


async def test_a_long_grammar_is_not_copied_for_thousands_of_sequences(server: StubCompletionApp) -> None:
    answer = await server.complete(prompt=["a"] * 200, guided_regex="a" * 40_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "guided_regex"
    assert (await server.complete(prompt=["a"] * 50, guided_regex="a" * 40_000)).status_code == 200


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


SCHEMA = "response_format.json_schema.schema"
LOOSE = {"strict": False}
REFUSED: list[tuple[dict[str, Any], str]] = [
    # more than one
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object"),
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
    # not in the right form
    ({"structured_outputs": {"structural_tag": {"triggers": []}}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"yaml": "x"}}, "structured_outputs.yaml"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": '{"a":' * 5000}}, "structured_outputs.json"),
    ({"structured_outputs": {"grammar": '{"grammars": []}'}}, "structured_outputs.grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice.0"),
    ({"guided_json": [1]}, "guided_json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (strict(PERSON, name="no blanks"), "response_format.json_schema.name"),
    # too large, too deep
    ({"guided_regex": "a" * 50_001}, "guided_regex"),
    ({"guided_choice": ["a" * 9000] * 30}, "guided_choice"),
    ({"guided_json": {"enum": ["a" * 1000] * 300}}, "guided_json"),
    (strict(nested(60), **LOOSE), SCHEMA),
    ({"guided_json": {"properties": {f"p{i}": {} for i in range(2001)}}}, "guided_json.properties"),
    # keywords that would be ignored
    (strict({"type": "array", "uniqueItems": True}, **LOOSE), f"{SCHEMA}.uniqueItems"),
    (strict({"anyOf": [{"not": {}}]}, **LOOSE), f"{SCHEMA}.anyOf.0.not"),
    (strict({"type": "string", "nullable": True}, **LOOSE), f"{SCHEMA}.nullable"),
    (strict({"x-guidance": {"lenient": True}}, **LOOSE), f"{SCHEMA}.x-guidance"),
    ({"guided_json": {"$defs": {"a": {"items": {"wombat": 1}}}}}, "guided_json.$defs.a.items.wombat"),
    ({"guided_json": {"properties": 3}}, "guided_json.properties"),
    (strict(PERSON | {"properties": [3]}), f"{SCHEMA}.properties"),
    # outside of OpenAI's strict subset
    (strict({"type": "string"}), SCHEMA),
    (strict({"anyOf": [PERSON]}), SCHEMA),
    (strict(PERSON | {"additionalProperties": True}), SCHEMA),
    (strict({"type": "object", "properties": {}}), SCHEMA),
    (strict(PERSON | {"required": ["name"]}), SCHEMA),
    (strict(PERSON | {"allOf": [{}]}), SCHEMA),
    (strict(PERSON | {"properties": {"name": {"oneOf": []}, "age": {}}}), f"{SCHEMA}.properties.name"),
    (strict(PERSON | {"$defs": {"x": {"type": ["object", "null"]}}}), f"{SCHEMA}.$defs.x"),
    (strict(PERSON | {"properties": {"name": True, "age": {}}}), f"{SCHEMA}.properties.name"),
    (strict(nested(12)), SCHEMA + ".properties.a" * 11),
    (strict(PERSON | {"$defs": {"x": {"enum": [*range(1001)]}}}), SCHEMA),
    (strict(PERSON | {"$defs": {f"d{i}": {"enum": ["x" * 1000]} for i in range(130)}}), SCHEMA),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:80])
async def test_what_cannot_be_promised_is_refused_by_name(
    server: StubCompletionApp, body: dict[str, Any], param: str
) -> None:
    for answer in (await server.complete(**body), await server.chat(**body)):
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["param"] == param
        assert len(error["message"]) < 600
    assert server.engine.requests == []


KEYWORDS = [*MAPS, *LISTS, *SINGLE, "type", "enum", "const", "required", "minLength", "not", "title", "$ref"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "string", "x", "#"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING))
def test_no_schema_is_too_odd_to_be_lowered_or_refused(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    for check in (check_strict, json_schema_grammar):
        with suppress(BadRequest):
            check(schema, "field")
    assert json.dumps(schema) == before


async def test_the_schema_of_the_api_shows_the_fields(server: StubCompletionApp) -> None:
    schemas = (await server.client.get("/openapi.json")).json()["components"]["schemas"]
    assert {"structured_outputs", "guided_json", "response_format"} <= schemas["ChatCompletion"]["properties"].keys()
    assert {"json", "regex", "choice", "grammar", "json_object"} <= schemas["StructuredOutputs"]["properties"].keys()
    assert "schema" in schemas["JsonSchema"]["properties"]
