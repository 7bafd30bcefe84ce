"""`POST /v1/embeddings` with a stub engine: inputs, formats, refusals."""

from __future__ import annotations

import asyncio
import base64
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from stub_admin import refusal
from stub_completions import BOS, CONTEXT, StubCompletionApp, byte_tokenizer

from lora_serve.api.key_file import KeyFile, hash_key
from lora_serve.errors import BadRequest, Overloaded
from lora_serve.request import AdapterUse, EmbeddingParams


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


async def embed(server: StubCompletionApp, given: Any = "hi", **body: Any) -> httpx.Response:
    return await server.post("/v1/embeddings", {"input": given, **body})


async def prompts(server: StubCompletionApp, given: Any, **body: Any) -> list[list[int]]:
    """The tokens that the engine got for a request."""
    answer = await embed(server, given, **body)
    assert answer.status_code == 200, answer.text
    asked = [request.prompt for request in server.engine.requests]
    vectors = [item["embedding"][:2] for item in answer.json()["data"]]
    assert vectors == [[sum(prompt), len(prompt)] for prompt in asked]  # in order, although the last is ready first
    tokens = sum(map(len, asked))
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    return asked


async def test_the_answer_has_openai_s_shape(server: StubCompletionApp) -> None:
    assert (await embed(server)).json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [104.0 + 105.0, 2.0, 0.5, -0.25]}],
        "model": "base",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }


async def test_base64_is_little_endian_float32(server: StubCompletionApp) -> None:
    answer = await embed(server, ["hi", "ho"], encoding_format="base64")
    packed = [base64.b64decode(item["embedding"]) for item in answer.json()["data"]]
    assert [struct.unpack("<4f", vector)[0] for vector in packed] == [104 + 105, 104 + 111]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("hi", [[104, 105]]),
        (["hi", "a"], [[104, 105], [97]]),
        ([104, 105], [[104, 105]]),
        ([[104, 105], [97]], [[104, 105], [97]]),
    ],
)
async def test_every_form_of_input(server: StubCompletionApp, given: Any, wanted: list[list[int]]) -> None:
    assert await prompts(server, given) == wanted
    assert all(request.sampling.max_tokens == 0 for request in server.engine.requests)


async def test_special_tokens_are_the_tokenizer_s_unless_switched_off(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(bos=True))
    assert await prompts(server, "hi") == [[BOS, 104, 105]]
    server.engine.requests.clear()
    assert await prompts(server, "hi", add_special_tokens=False) == [[104, 105]]


async def test_truncation_keeps_the_beginning_and_special_tokens(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(bos=True))
    assert await prompts(server, ["abcdef", "ab"], truncate_prompt_tokens=3) == [[BOS, 97, 98], [BOS, 97, 98]]
    server.engine.requests.clear()
    plain = {"truncate_prompt_tokens": 3, "add_special_tokens": False}
    assert await prompts(server, "abcdef", **plain) == [[97, 98, 99]]
    server.engine.requests.clear()
    assert await prompts(server, [[1, 2, 3, 4]], truncate_prompt_tokens=2) == [[1, 2]]
    server.engine.requests.clear()
    assert len((await prompts(server, "a" * 4 * CONTEXT, truncate_prompt_tokens=-1))[0]) == CONTEXT


async def test_fields_that_change_nothing_are_accepted(server: StubCompletionApp) -> None:
    answer = await embed(server, user="someone", priority=0, dimensions=None, encoding_format="float", model="base")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "complaint"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty item"),
        ({"input": [[1], []]}, "input", "empty item"),
        ({}, "input", "missing parameter: input"),
        ({"input": None}, "input", "input"),
        ({"input": ["a", 1]}, "input.1", "valid string"),
        ({"input": [1.5]}, "input.0", "valid integer"),
        ({"input": [-1]}, "input.0", "greater than or equal to 0"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 items"),
        ({"input": [258]}, "input", "token ids outside 0..257"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"dimensions": 5}, "dimensions", "an embedding has 4 dimensions"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens", f"the context ({CONTEXT})"),
        ({"priority": 9}, "priority", "less than or equal to 8"),
        ({"temperature": 0}, "temperature", "unknown parameter"),
        ({"messages": []}, "messages", "unknown parameter"),
        ({"adapter": "poet", "model": "clerk"}, "adapter", "different adapters"),
    ],
)
async def test_a_body_that_cannot_be_served_is_refused_by_field(
    server: StubCompletionApp, body: dict[str, Any], param: str, complaint: str
) -> None:
    answer = await server.post("/v1/embeddings", body if "input" in body or not body else {"input": "hi", **body})
    status, field, message = refusal(answer)
    assert (status, field) == (400, param), message
    assert complaint in message
    assert server.engine.requests == []


async def test_special_tokens_alone_are_no_text(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(bos=True))
    status, field, _ = refusal(await embed(server, "abc", truncate_prompt_tokens=1))
    assert (status, field) == (400, "truncate_prompt_tokens")


async def test_an_input_longer_than_the_context_is_refused_in_openai_s_words(server: StubCompletionApp) -> None:
    answer = await embed(server, ["a", "b" * (CONTEXT + 1)])
    status, field, message = refusal(answer)
    assert (status, field, answer.json()["error"]["code"]) == (400, "input", "context_length_exceeded")
    assert message.startswith(f"This model's maximum context length is {CONTEXT} tokens")
    assert server.engine.requests == []


@pytest.mark.parametrize("body", [{"adapter": "poet"}, {"model": "poet"}, {"adapter": {"name": "poet"}}])
async def test_an_adapter_is_chosen_as_for_generation(server: StubCompletionApp, body: dict[str, Any]) -> None:
    answer = await embed(server, dimensions=3, **body)
    assert (answer.json()["model"], answer.json()["adapter"]) == ("poet", "poet@dddddddddddd")
    request = server.engine.requests[0]
    assert request.adapters == (AdapterUse("poet"),)
    assert request.embedding == EmbeddingParams(3)


async def test_an_adapter_that_is_missing_or_not_for_this_key_is_404(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"clerks: {{hash: '{hash_key('sk')}', adapters: [clerk]}}\n")
    server = StubCompletionApp(tmp_path / "store", KeyFile(file))
    for name in ("poet", "nobody"):
        answer = await server.post("/v1/embeddings", {"input": "hi", "adapter": name}, "sk")
        assert refusal(answer) == (404, "adapter", f"adapter {name} does not exist")
    assert (await server.post("/v1/embeddings", {"input": "hi", "adapter": "clerk"}, "sk")).status_code == 200


async def test_the_engine_s_refusal_is_the_answer_and_the_other_inputs_are_aborted(server: StubCompletionApp) -> None:
    server.engine.forever = True
    server.engine.refusals[1] = BadRequest("the base model makes no embeddings", param="model")
    answer = await embed(server, ["a", "b", "c"])
    assert refusal(answer) == (400, "model", "the base model makes no embeddings")
    assert len(server.engine.closed) == 3


async def test_a_fault_in_the_engine_is_500(server: StubCompletionApp) -> None:
    server.engine.breaks = 0
    assert refusal(await embed(server, ["a", "b"]))[0] == 500


async def test_many_inputs_do_not_fill_the_queue_by_themselves(tmp_path: Path) -> None:
    server = StubCompletionApp(tmp_path, max_queue=5)
    assert len(await prompts(server, [[1 + index] for index in range(40)])) == 40
    assert server.engine.most_embedding == 5
    assert len(server.engine.closed) == 40


async def test_a_full_queue_is_429(server: StubCompletionApp) -> None:
    server.engine.refusals[2] = Overloaded("too many wait", retry_after=1)
    assert refusal(await embed(server, ["a", "b", "c", "d"]))[0] == 429


async def test_embeddings_of_one_answer_are_of_one_version_of_the_adapter(server: StubCompletionApp) -> None:
    server.engine.digests = ["d" * 64, "e" * 64]
    answer = await embed(server, ["a", "b"], adapter="poet")
    assert refusal(answer)[0] == 503
    assert answer.headers["Retry-After"] == "1"


async def test_a_client_that_leaves_aborts_all_inputs(server: StubCompletionApp) -> None:
    server.engine.forever = True
    asking = asyncio.ensure_future(embed(server, ["a"] * 300))
    while len(server.engine.requests) < 256:
        await asyncio.sleep(0.001)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(server.engine.closed) == len(server.engine.requests) == 256


async def test_requests_and_prompt_tokens_are_counted(server: StubCompletionApp) -> None:
    await embed(server, ["hi", "you"], adapter="poet")
    server.engine.breaks = 0
    await embed(server)
    shown = (await server.client.get("/metrics")).text
    for line in (
        'lora_serve_requests_total{endpoint="embeddings",outcome="stop"} 1.0',
        'lora_serve_requests_total{endpoint="embeddings",outcome="engine_fault"} 1.0',
        'lora_serve_adapter_requests_total{adapter="poet"} 1.0',
        "lora_serve_prompt_tokens_total 5.0",
        "lora_serve_completion_tokens_total 0.0",
    ):
        assert line in shown
