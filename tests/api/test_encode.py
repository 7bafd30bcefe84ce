"""Texts far longer than the context are refused before they are tokenized; all others have the tokenizer's tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from stub_completions import BOS, CONTEXT, StubCompletionApp, byte_tokenizer

from lora_serve.api.openai.encode import PREFIX, SHORT, TextEncoder, TextTooLong
from lora_serve.cli import load_tokenizer
from lora_serve.config import ServeConfig

DEMO = Path(__file__).parents[2] / "demo" / "model"
LONG = 4_000_000  # characters, the most that a schema allows


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a " * (LONG // 2)}, "prompt"),
        ("/v1/completions", {"prompt": ["short", "a" * LONG]}, "prompt"),
        ("/v1/completions", {"prompt": [97] * 900_000, "echo": True}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * LONG}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 500}] * 1000}, "messages"),
        ("/v1/embeddings", {"input": ["a" * LONG]}, "input"),
        ("/v1/embeddings", {"input": [[97] * 900_000]}, "input"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * LONG}]}, "messages"),
    ],
)
async def test_a_prompt_far_beyond_the_context_is_refused_at_once(
    server: StubCompletionApp, path: str, body: dict[str, Any], field: str
) -> None:
    began = time.process_time()
    answer = await server.post(path, body)
    assert time.process_time() - began < 0.5
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    assert error["message"].startswith(
        f"This model's maximum context length is {CONTEXT} tokens. However, your {field}"
    )
    assert server.engine.requests == []


async def test_a_prompt_little_longer_than_the_context_is_counted(server: StubCompletionApp) -> None:
    answer = await server.complete(prompt="a" * (CONTEXT + 2))
    assert f"your prompt resulted in {CONTEXT + 2} tokens" in answer.json()["error"]["message"]


async def test_a_text_is_refused_by_its_first_part() -> None:
    """Short enough by its characters, were they all in the longest token; but its beginning has too many tokens."""
    most = 100
    encoder = TextEncoder(byte_tokenizer())  # its longest token is of four characters
    with pytest.raises(TextTooLong):
        await encoder.encode(["a" * (most * 4 + 1)], most, add_special_tokens=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["long" * 25])
    encoder = TextEncoder(tokenizer)
    with pytest.raises(TextTooLong):
        await encoder.encode(["a" * most * 90], most, add_special_tokens=False)
    (ids,) = await encoder.encode(["long" * 25 * most], most, add_special_tokens=False)
    assert len(ids) == most  # many times the prefix, and as long as allowed


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("size", [0, 10, SHORT + 1, 120_000])
async def test_other_texts_have_the_tokens_of_the_tokenizer(size: int, special: bool) -> None:
    tokenizer = load_tokenizer(ServeConfig(model=str(DEMO)))
    text = ("reverse: héllo wörld 🙂\n" * (size // 10))[:size]
    (ids,) = await TextEncoder(tokenizer).encode([text], 1_000_000, add_special_tokens=special)
    assert ids == tokenizer(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("limit", [3, 100, 5000])
async def test_truncated_texts_have_the_first_tokens_of_the_whole(limit: int) -> None:
    tokenizer = load_tokenizer(ServeConfig(model=str(DEMO)))
    texts = ["short", "count: one two three " * 20_000, " " * limit * PREFIX * 3 + "end"]
    encoder = TextEncoder(tokenizer)
    whole = await encoder.encode(texts, 1_000_000, add_special_tokens=False)
    cut = await encoder.encode_first(texts, limit, add_special_tokens=False)
    assert cut == [ids[:limit] for ids in whole]


async def test_truncation_of_the_tokenizers_file_does_not_shorten_a_prompt() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert await TextEncoder(tokenizer).encode(["abcdef"], 10, add_special_tokens=True) == [[BOS, *b"abcdef"]]


async def test_tokenize_and_detokenize_have_limits(server: StubCompletionApp) -> None:
    longer = await server.post("/tokenize", {"prompt": "a" * 10 * CONTEXT})  # than the context: to count it
    assert longer.json()["count"] == 10 * CONTEXT
    for path, body in (("/tokenize", {"prompt": "a" * 1_000_001}), ("/detokenize", {"tokens": [97] * 200_001})):
        answer = await server.post(path, body)
        assert answer.status_code == 400
        assert "at most" in answer.json()["error"]["message"]
