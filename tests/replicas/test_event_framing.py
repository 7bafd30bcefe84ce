"""Streams on their way through an endpoint: whole events, and an end for a broken one that clients understand."""

from __future__ import annotations

import json

import anthropic
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sse_client import client_of

from lora_serve.api import error_handlers
from lora_serve.api.sse import CHUNKS
from lora_serve.errors import AdapterNotFound, Overloaded, Unavailable
from lora_serve.replicas.event_framing import (
    EventFraming,
    error_event,
    event_may_succeed_elsewhere,
    is_last,
    is_prelude,
    may_succeed_elsewhere,
)

LOST = Unavailable("the server ended while it served this request")


@given(st.lists(st.binary(min_size=1, max_size=6).filter(lambda part: b"\n" not in part)), st.data())
def test_events_are_whole_however_the_bytes_come(contents: list[bytes], data: st.DataObject) -> None:
    events = [b"data: " + content + b"\n\n" for content in contents]
    stream = b"".join(events) + b"data: cut"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    framing = EventFraming()
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [event for piece in pieces for event in framing.feed(piece)] == events


def test_a_stream_begins_with_its_first_content() -> None:
    assert is_prelude(b'event: response.created\ndata: {"type":"response.created"}\n\n')
    assert is_prelude(b": keep-alive\n\n")
    assert not is_prelude(b'data: {"choices":[]}\n\n')
    assert not is_prelude(b"event: message_start\ndata: {}\n\n")


@pytest.mark.parametrize(
    "event", [b"data: [DONE]\n\n", b"event: message_stop\ndata: {}\n\n", b"event: response.completed\ndata: {}\n\n"]
)
def test_a_stream_that_breaks_after_its_last_event_is_complete(event: bytes) -> None:
    assert is_last(event)
    assert not is_last(b'data: {"choices":[{"text":"[DONE]"}]}\n\n')


def test_what_one_replica_cannot_serve_may_succeed_at_another() -> None:
    def body(error: Exception) -> bytes:
        return json.dumps(error_handlers.body(error)).encode()  # type: ignore[arg-type]

    assert may_succeed_elsewhere(503, body(LOST))
    assert may_succeed_elsewhere(429, body(Overloaded("full")))
    assert not may_succeed_elsewhere(404, body(AdapterNotFound("no")))
    assert not may_succeed_elsewhere(429, b'{"error": {"code": "rate_limit_exceeded"}}')  # a key's quota
    assert not may_succeed_elsewhere(503, b"<html>")
    assert event_may_succeed_elsewhere(error_event("/v1/completions", LOST, None).partition(b"data: [DONE]")[0])
    assert event_may_succeed_elsewhere(error_event("/v1/messages", LOST, None))
    assert event_may_succeed_elsewhere(
        b'event: response.failed\ndata: {"response":{"error":{"code":"unavailable"}}}\n\n'
    )
    assert not event_may_succeed_elsewhere(CHUNKS.encode({"choices": [{"text": "unavailable"}]}))


def test_clients_raise_an_error_for_a_stream_that_broke() -> None:
    chunk = CHUNKS.encode({"id": "1", "object": "text_completion", "choices": [{"index": 0, "text": "a"}]})
    with client_of(chunk + error_event("/v1/completions", LOST, "r1")) as http:
        client = openai.OpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0)
        completion = client.completions.create(model="m", prompt="a", stream=True)
        assert next(completion).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="the server ended"):
            next(completion)
    with client_of(error_event("/v1/responses", LOST, "r1")) as http:
        client = openai.OpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0)
        with pytest.raises(openai.APIError, match="the server ended"):
            list(client.responses.create(model="m", input="a", stream=True))
    with client_of(error_event("/v1/messages", LOST, "r1"), httpx2) as http:
        other = anthropic.Anthropic(api_key="k", base_url="http://test", http_client=http, max_retries=0)
        with pytest.raises(anthropic.APIError, match="the server ended"):
            list(
                other.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "a"}], stream=True)
            )
