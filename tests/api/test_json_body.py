"""JSON bodies: refusing one costs no more than decoding it, and FastAPI still documents them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from stub_completions import StubCompletionApp

from lora_serve.api import json_body
from lora_serve.api.anthropic.message_schemas import CountMessageTokens, CreateMessage
from lora_serve.api.lora_routes import LoadLora, UnloadLora
from lora_serve.api.openai.chat_schemas import ChatCompletion
from lora_serve.api.openai.response_schemas import CreateResponse
from lora_serve.api.openai.schemas import Completion, EmbeddingBody
from lora_serve.api.openai.tokenize import Detokenize, Tokenize
from lora_serve.errors import BadRequest

BODIES = (
    ChatCompletion,
    Completion,
    CountMessageTokens,
    CreateMessage,
    CreateResponse,
    Detokenize,
    EmbeddingBody,
    LoadLora,
    Tokenize,
    UnloadLora,
)


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


async def post(server: StubCompletionApp, path: str, content: bytes) -> tuple[int, str | None, str]:
    answer = await server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def many(item: bytes, megabytes: float) -> bytes:
    return b",".join([item] * int(megabytes * (1 << 20) / (len(item) + 1)))


@pytest.mark.parametrize("megabytes", [0.04, 1, 6])
@pytest.mark.parametrize(
    ("path", "start", "item", "end"),
    [
        ("/v1/completions", b'{"prompt":[', b"[1]", b"]}"),
        ("/v1/completions", b'{"prompt":[', b'""', b"]}"),
        ("/v1/completions", b'{"prompt":[1,', b'"x"', b"]}"),
        ("/v1/completions", b'{"prompt":"x","stop":[', b"1", b"]}"),
        ("/v1/completions", b'{"prompt":"x","adapter":[', b"{}", b"]}"),
        ("/v1/embeddings", b'{"input":[', b"[-1]", b"]}"),
        ("/v1/chat/completions", b'{"messages":[', b"{}", b"]}"),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":[', b"1", b"]}]}"),
        ("/tokenize", b'{"messages":[', b"[]", b"]}"),
        ("/detokenize", b'{"tokens":[', b"-1", b"]}"),
    ],
)
async def test_a_body_of_many_mistakes_is_refused_at_once(
    server: StubCompletionApp, path: str, start: bytes, item: bytes, end: bytes, megabytes: float
) -> None:
    began = time.process_time()
    status, _, message = await post(server, path, start + many(item, megabytes) + end)
    assert time.process_time() - began < 2  # 13 s for the smallest, when every mistake was collected
    assert status == 400
    assert len(message) < 500


@pytest.mark.parametrize("field", ["", "metadata", "logit_bias"])
async def test_an_object_of_many_wrong_fields_is_refused_at_once(server: StubCompletionApp, field: str) -> None:
    wrong: dict[str, Any] = {f"key {index}": [] for index in range(90_000)}
    body = {"prompt": "x", **(wrong if not field else {field: wrong})}
    content = json.dumps(body).encode().replace(b"[]", b"1")
    began = time.process_time()
    status, param, message = await post(server, "/v1/completions", content)
    assert time.process_time() - began < 0.5
    assert (status, param) == (400, field or None)
    assert "more than 1024 fields" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "duplicate key"),
        (b'{"prompt": "x", "temperature": NaN}', "expected value"),
        (b'{"prompt": "\xff"}', "unicode"),
        (b'{"prompt": "\\ud800"}', "escape"),
        (b'{"prompt": [' + b"9" * 1_000_000 + b"]}", "out of range"),
        (b'{"prompt": ' + b"[" * 1000, "recursion"),
        (b'{"prompt": ' + b"[" * 1_000_000, "fields and lists"),
        (b"\xef\xbb\xbf{}", "expected value"),
        (b'{"prompt": "secret words"', "EOF"),
    ],
)
async def test_what_json_does_not_allow_is_refused(server: StubCompletionApp, content: bytes, complaint: str) -> None:
    status, param, message = await post(server, "/v1/completions", content)
    assert (status, param) == (400, None)
    assert complaint in message
    assert "secret" not in message


def test_texts_with_brackets_and_commas_are_not_taken_for_lists_too_soon() -> None:
    code = json.dumps({"prompt": "for (int i = 0; i < n; i++) { a[i] = f(b[i], c: 1); }\n" * 20_000}).encode()
    assert len(code) > 1_000_000
    assert json_body.decode(code) == json.loads(code)
    with pytest.raises(BadRequest):
        json_body.decode(b"[" + many(b"{}", 1) + b"]")


def test_bodies_are_documented(server: StubCompletionApp) -> None:
    document = server.app.openapi()
    described = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert described["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Completion"}
    assert "prompt" in document["components"]["schemas"]["Completion"]["required"]


@pytest.mark.parametrize("body", BODIES)
def test_every_schema_collects_few_mistakes(body: type[BaseModel]) -> None:
    """A list stops at the first mistake, and a dict is checked for its size first; a union's members add up."""
    for path, schema in nodes(body.__pydantic_core_schema__, body.__name__):
        if schema.get("type") == "list" and schema["items_schema"]["type"] != "any":
            assert schema.get("fail_fast"), path
        if schema.get("type") == "dict" and schema["values_schema"]["type"] != "any":
            assert "function-before" in path, path


def nodes(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All parts of a pydantic core schema, with the types of those around them."""
    if isinstance(schema, dict):
        yield path, schema
        for value in schema.values():
            yield from nodes(value, f"{path}/{schema.get('type', '')}")
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from nodes(value, path)
