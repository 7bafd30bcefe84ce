"""Structured output over HTTP: every answer is valid, and grammars made to explode hurt nobody."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import psutil
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field
from server_process import ADAPTERS, ServerProcess

SLOWEST_REFUSAL = 20.0  # seconds; on a machine that does other things too
MOST_MEMORY = 400_000_000  # bytes, for all grammars that stay compiled
LONGEST_GAP = 2.0  # seconds between two tokens of a neighbour
TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--adapters", str(ADAPTERS)) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", 3]}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "number", "minimum": -1, "exclusiveMaximum": 1, "multipleOf": 0.25},
    {"anyOf": [{"const": None}, {"type": "boolean"}]},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "integer", "maximum": 9}},
        "additionalProperties": False,
    },
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
]


def test_answers_match_their_schemas_whatever_else_is_in_the_batch(server: ServerProcess) -> None:
    cases = [
        (schema, {"adapter": adapter, "temperature": temperature, "seed": seed, "stream": False})
        for seed, schema in enumerate(SCHEMAS)
        for adapter in (None, "reverse", "shout")
        for temperature in (0, 1)
    ]

    def answer(case: tuple[dict[str, Any], dict[str, Any]]) -> tuple[str, str]:
        schema, options = case
        outputs = {"json": schema, "disable_any_whitespace": True}
        body = {"prompt": f"{TEXT}\n", "max_tokens": 200, "structured_outputs": outputs, "ignore_eos": True, **options}
        choice = server.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    plain = [server.complete(TEXT, adapter) for adapter in (None, "reverse", "shout")]
    with ThreadPoolExecutor(12) as pool:
        beside = [pool.submit(server.complete, TEXT, adapter) for adapter in (None, "reverse", "shout")]
        answers = list(pool.map(answer, cases))
        assert [each.result() for each in beside] == plain
    complete = 0
    for (schema, _), (text, reason) in zip(cases, answers, strict=True):
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
            complete += 1
    assert complete > 0.8 * len(cases)  # the others were cut at max_tokens


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]
    friends: list[bool] = Field(max_length=2)


def test_the_sdk_parses_a_pydantic_model_that_it_asked_for(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="model", messages=[{"role": "user", "content": "a dog"}], response_format=Pet, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_a_streamed_answer_is_the_same_as_one_at_once(server: ServerProcess) -> None:
    body = {"prompt": f"{TEXT}\n", "max_tokens": 60, "temperature": 0, "n": 2, "guided_regex": "(cat|dog|[a-f]){4,6}!"}
    whole = server.http.post("/v1/completions", json=body).json()["choices"]
    parts = {0: "", 1: ""}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    parts[choice["index"]] += choice["text"]
    assert [choice["text"] for choice in whole] == [parts[0], parts[1]]
    assert all(re.fullmatch("(cat|dog|[a-f]){4,6}!", text) for text in parts.values())


def chain(count: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(count)) + f'\nr{count}: "a"'


def doubled(count: int) -> str:
    return "start: r0\n" + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(count)) + f'\nr{count}: "a"'


def references(count: int) -> dict[str, Any]:
    definitions = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$defs": {**definitions, f"d{count}": {}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "repeated repetitions": {"guided_regex": "((a{1000}){1000}){1000}"},
    "optional repetitions": {"guided_regex": "(((((a?){100}){100}){100}){100}){100}"},
    "exponential states": {"guided_regex": "(a|b)*a(a|b){2000}"},
    "nested groups": {"guided_regex": "(" * 20_000 + "a" + ")" * 20_000},
    "unicode classes": {"guided_regex": r"(\p{L}|\p{N}){1000}(\p{L}|.){1000}"},
    "many alternatives": {"guided_regex": "|".join(f"w{i}" for i in range(7000))},
    "many choices": {"guided_choice": [f"w{i}" for i in range(10_000)]},
    "a long chain of rules": {"guided_grammar": chain(4000)},
    "doubled rules": {"guided_grammar": doubled(2000)},
    "an ambiguous grammar": {"guided_grammar": 'start: s\ns: s s | "a" | '},
    "a nested grammar": {"guided_grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "endless rules": {"guided_grammar": "start: start"},
    "repeated repeated rules": {"guided_grammar": 'start: b{1,10000}\nb: a{1,10000}\na: "x" | "y"'},
    "a large schema": {"guided_json": {"properties": {f"p{i}": {} for i in range(2000)}, "type": "object"}},
    "a schema in a grammar": {
        "guided_grammar": "start: %json " + json.dumps({"properties": {f"p{i}": {} for i in range(3000)}})
    },
    "large enumerations": {"guided_json": {"enum": [f"v{i}" for i in range(20_000)]}},
    "merged alternatives": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(4)]} for i in range(12)
            ]
        }
    },
    "doubled references": {
        "guided_json": {
            "$defs": {
                **{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}, "d30": {}
            },
            "$ref": "#/$defs/d0",
        }
    },
    "a chain of references": {"guided_json": references(4000)},
    "a reference to itself": {"guided_json": {"$ref": "#"}},
    "a long string": {"guided_json": {"type": "string", "minLength": 1_000_000, "pattern": "^(a|b)*a(a|b){500}$"}},
    "long arrays": {"guided_json": {"minItems": 10**6, "items": {"minItems": 10**6, "maxItems": 10**7}}},
    "a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "a URL": {"guided_json": {"$ref": "http://127.0.0.1:1/x"}},
}  # fmt: skip


def memory(server: ServerProcess) -> int:
    """Resident bytes of the engine."""
    found: int = psutil.Process(server.engine_pid).memory_info().rss
    return found


class Neighbour(threading.Thread):
    """Streams completions one after the other; records the longest time between two chunks."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.longest = 0.0
        self.stopped = False
        self.start()

    def run(self) -> None:
        body = {"prompt": "x", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        while not self.stopped:
            last = time.monotonic()
            with self._server.http.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        now = time.monotonic()
                        self.longest, last = max(self.longest, now - last), now
                        if self.stopped:
                            return


def test_grammars_made_to_explode_are_refused_or_served_while_a_neighbour_streams(server: ServerProcess) -> None:
    engine, before = server.engine_pid, memory(server)
    neighbour = Neighbour(server)
    try:
        for name, body in HOSTILE.items():
            started = time.monotonic()
            answer = server.http.post(
                "/v1/completions", json={"prompt": "x", "max_tokens": 40, "temperature": 1, "seed": 1, **body}
            )
            assert time.monotonic() - started < SLOWEST_REFUSAL, name
            assert answer.status_code in (200, 400), (name, answer.text[:300])
            if answer.status_code == 400:
                error = answer.json()["error"]
                assert error["param"].split(".")[0] == next(iter(body)), name
                assert len(error["message"]) < 600
    finally:
        neighbour.stopped = True
        neighbour.join(30)
    assert server.engine_pid == engine, "the engine died"
    assert neighbour.longest < LONGEST_GAP
    assert memory(server) < before + MOST_MEMORY


def test_a_refusal_names_the_field_and_the_reason(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="oneOf") as refused:
        client.completions.create(
            model="model",
            prompt="x",
            extra_body={"guided_json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}},
            stream=True,
        )
    assert refused.value.param == "guided_json"
