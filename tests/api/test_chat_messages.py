"""What a conversation may contain: everything that OpenAI's SDK and this server produce, and fields without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from stub_completions import CONTEXT, StubCompletionApp, events

CALLS = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    return StubCompletionApp(tmp_path)


async def test_the_server_s_own_message_is_accepted_back_as_the_sdk_sends_it(server: StubCompletionApp) -> None:
    answer = (await server.chat()).json()
    message = ChatCompletionMessage.model_validate(answer["choices"][0]["message"])
    user = {"role": "user", "content": "hi"}
    again = await server.chat(messages=[user, message.model_dump(), user])
    assert again.status_code == 200, again.text
    assert bytes(server.engine.requests[1].prompt) == b"user:hi|assistant:hello|user:hi|assistant:"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "function_call": None,
         "tool_calls": None, "reasoning_content": None},
        {"role": "assistant", "content": "x", "tool_calls": [], "reasoning": "", "parsed": {"a": 1}},
        {"role": "assistant", "content": None, "refusal": "x"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
)  # fmt: skip
async def test_fields_of_recorded_messages_that_mean_nothing_are_left_out(
    server: StubCompletionApp, message: dict[str, Any]
) -> None:
    answer = await server.chat(messages=[message])
    assert answer.status_code == 200, answer.text
    assert bytes(server.engine.requests[0].prompt) == b"assistant:x|assistant:"


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": None}, "content is missing"),
        ({"role": "tool", "content": "3"}, "tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": CALLS}, "only an assistant"),
        ({"role": "assistant", "audio": {"id": "a"}}, "audio"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "not support image input"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "not support audio input"),
        ({"role": "user", "content": [{"type": "poem", "poem": ""}]}, "type text or refusal"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "size": 1}]}, "messages.1.content.0.size"),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f"}}]},
            "arguments",
        ),
    ],
)
async def test_a_message_that_cannot_be_used_is_400_and_named(
    server: StubCompletionApp, message: dict[str, Any], what: str
) -> None:
    answer = await server.chat(messages=[{"role": "user", "content": "x"}, message])
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"].startswith("messages.1")
    assert what in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "user": "u"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "modalities": ["text"], "prediction": None},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none", "tools": [], "functions": [], "function_call": "auto"},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "top_logprobs": 0, "logprobs": False},
        {"use_beam_search": False, "length_penalty": 1.0, "echo": False, "priority": 0},
        {"response_format": {"type": "text"}, "stop": None, "stream": False, "stream_options": None, "seed": None},
    ],
)
async def test_a_parameter_at_a_value_without_effect_is_accepted(
    server: StubCompletionApp, fields: dict[str, Any]
) -> None:
    answer = await server.chat(**fields)
    assert answer.status_code == 200, answer.text
    shared = ("store", "metadata", "service_tier", "skip_special_tokens", "use_beam_search", "prompt_cache_key")
    answer = await server.complete(suffix=None, best_of=1, **{k: v for k, v in fields.items() if k in shared})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("field", "value"), [("store", True), ("service_tier", "flex"), ("repetition_penalty", 1e-38), ("priority", 9)]
)
async def test_a_parameter_at_a_value_that_is_not_served_is_400_and_named(
    server: StubCompletionApp, field: str, value: Any
) -> None:
    for answer in (await server.chat(**{field: value}), await server.complete(**{field: value})):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_more_tokens_than_the_remaining_context_are_clamped_in_a_chat(
    server: StubCompletionApp, field: str
) -> None:
    answer = await server.chat(**{field: 1_000_000})
    assert answer.status_code == 200, answer.text
    request = server.engine.requests[0]
    assert request.sampling.max_tokens == CONTEXT - len(request.prompt)


async def test_a_conversation_longer_than_the_context_is_refused_in_openai_s_words(server: StubCompletionApp) -> None:
    answer = await server.chat(messages=[{"role": "user", "content": "x" * CONTEXT}])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens.")


async def test_the_first_chunk_comes_with_the_first_token(server: StubCompletionApp) -> None:
    server.engine.reply = b""  # the first token is the end token
    chunks = events(await server.chat(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]
    server.engine.breaks = 0
    server.engine.reply = b"x"
    chunks = events(await server.chat(stream=True))
    assert ["choices" in chunk for chunk in chunks] == [False]  # no token, so no role: only the error
