"""`/v1/messages` and `/v1/messages/count_tokens`, driven by Anthropic's SDK."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic import AsyncAnthropic, beta_async_tool
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel
from stub_completions import CONTEXT, StubCompletionApp, byte_tokenizer

from lora_serve import errors as tree
from lora_serve.api.anthropic.message_schemas import MessageReply
from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.messages import AdapterInfo

TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif -%}"
    "{%- for m in messages -%}{{ m.role }}:"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{%- endfor -%}"
    "|{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    "{%- if enable_thinking is defined %}{{ '+' if enable_thinking else '-' }}{% endif -%}"
)
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
NOW = {"name": "now", "input_schema": {"type": "object"}}
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
REPLY = b"<think>\nhm\n</think>\n\nI will look.\n" + CALL


class Server(StubCompletionApp):
    """A stub server, and Anthropic's SDK as its client."""

    def __init__(self, store: Path, **options: Any) -> None:
        super().__init__(store, **options)
        for name in ("poet", "clerk"):
            self.engine.adapters[name] = AdapterInfo(name, False, [])
        transport = httpx2.ASGITransport(self.app)
        self.sdk = AsyncAnthropic(
            base_url="http://localhost",
            api_key="sk-any",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        )

    async def message(self, **fields: Any) -> Message:
        answer: Message = await self.sdk.messages.create(
            **{"model": "base", "max_tokens": 1000, "messages": HI, **fields}
        )
        return answer

    async def streamed(self, **fields: Any) -> list[RawMessageStreamEvent]:
        stream = await self.sdk.messages.create(
            **{"model": "base", "max_tokens": 1000, "messages": HI, "stream": True, **fields}
        )
        return [event async for event in stream]

    async def post_message(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/messages", {"max_tokens": 10, "messages": HI, **fields})

    def prompt(self, index: int = -1) -> str:
        return bytes(self.engine.requests[index].prompt).decode()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path, tokenizer=byte_tokenizer(template=TEMPLATE), context=4096)


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, type and message of an error; asserts that it has Anthropic's shape."""
    body = answer.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    return answer.status_code, body["error"]["type"], body["error"]["message"]


# --- responses -------------------------------------------------------------------------------------------------------


async def test_a_message_has_anthropic_s_shape(server: Server) -> None:
    server.engine.cached = 4
    message = await server.message(model="poet")
    shown = MessageReply.model_validate(message.to_dict(exclude_unset=True))
    assert shown.id.startswith("msg_")
    assert (shown.model, shown.adapter) == ("poet", "poet@" + "d" * 12)
    assert [block.model_dump(exclude_unset=True) for block in shown.content] == [{"type": "text", "text": "hello"}]
    assert (shown.stop_reason, shown.stop_sequence) == ("end_turn", None)
    prompt = len(server.engine.requests[0].prompt)
    assert shown.usage.model_dump() == {
        "input_tokens": prompt - 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": len("hello") + 1,
    }


async def test_stream_events_have_names_and_an_order(server: Server) -> None:
    server.engine.reply = REPLY
    answer = await server.post_message(stream=True, tools=[WEATHER], max_tokens=1000)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names, data = [], []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, sent = event.split("\n")
        names.append(name.removeprefix("event: "))
        data.append(json.loads(sent.removeprefix("data: ")))
    assert names == [event["type"] for event in data]
    assert [name for name in names if name != "content_block_delta"] == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    assert data[0]["message"]["content"] == []
    assert data[0]["message"]["stop_reason"] is None
    assert {event["delta"]["type"] for event in data if event["type"] == "content_block_delta"} == {
        "thinking_delta",
        "signature_delta",
        "text_delta",
        "input_json_delta",
    }
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == len(REPLY) + 1


async def test_a_stream_adds_up_to_the_message_without_streaming(server: Server) -> None:
    server.engine.reply = REPLY
    server.engine.cached = 3
    whole = await server.message(tools=[WEATHER])
    async with server.sdk.messages.stream(model="base", max_tokens=1000, messages=HI, tools=[WEATHER]) as stream:
        text = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "I will look."
    shown, expected = final.to_dict(exclude_none=True), whole.to_dict(exclude_none=True)
    for message in (shown, expected):
        message.pop("id")
        message["content"][2].pop("id")
    assert shown == expected


async def test_the_first_event_comes_with_the_first_token(server: Server) -> None:
    server.engine.reply = b""  # the first token is the end token
    events = await server.streamed()
    assert [event.type for event in events] == ["message_start", "message_delta", "message_stop"]
    server.engine.reply, server.engine.breaks = b"x", 0
    with pytest.raises(anthropic.APIStatusError) as broken:
        await server.streamed()
    assert broken.value.type == "api_error"


async def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_sdk(server: Server) -> None:
    server.engine.breaks = 2
    answer = await server.post_message(stream=True)
    *_, last = answer.text.removesuffix("\n\n").split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == "it broke"
    with pytest.raises(anthropic.APIStatusError, match="it broke"):
        await server.streamed()
    assert len(server.engine.closed) == 2


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "text"),
    [
        ({}, "end_turn", None, "hello"),
        ({"max_tokens": 2}, "max_tokens", None, "he"),
        ({"stop_sequences": ["xx", "lo"]}, "stop_sequence", "lo", "hel"),
        ({"stop_sequences": ["lo!"]}, "end_turn", None, "hello"),
    ],
)
async def test_why_a_message_stopped(
    server: Server, fields: dict[str, Any], reason: str, sequence: str | None, text: str
) -> None:
    message = await server.message(**fields)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": text}]
    ended = next(event for event in await server.streamed(**fields) if event.type == "message_delta")
    assert (ended.delta.stop_reason, ended.delta.stop_sequence) == (reason, sequence)


async def test_adapters_are_composed_as_on_every_route(server: Server) -> None:
    weighted = [{"name": "poet", "weight": 0.5}, {"name": "clerk@dd", "weight": 2.0}]
    answer = (await server.post_message(adapter=weighted)).json()
    assert answer["adapter"] == ["poet@" + "d" * 12, "clerk@" + "d" * 12]
    uses = server.engine.requests[0].adapters
    assert [(use.name, use.version, use.weight) for use in uses] == [("poet", None, 0.5), ("clerk", "dd", 2.0)]


async def test_max_tokens_is_clamped_to_the_remaining_context(server: Server) -> None:
    assert (await server.post_message(max_tokens=1_000_000)).status_code == 200
    request = server.engine.requests[0]
    assert request.sampling.max_tokens == 4096 - len(request.prompt)


# --- tools -----------------------------------------------------------------------------------------------------------


async def test_a_tool_call_and_its_result_are_sent_back(server: Server) -> None:
    server.engine.reply = REPLY
    message = await server.message(tools=[WEATHER, NOW])
    assert message.stop_reason == "tool_use"
    thinking, text, call = message.content
    assert (thinking.type, text.type, call.type) == ("thinking", "text", "tool_use")
    assert call.type == "tool_use"
    assert call.id.startswith("toolu_")
    assert (call.name, call.input) == ("weather", {"city": "Ulm"})
    assert '"description": "of a city"' in server.prompt()
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [*HI, message.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]}]
    await server.message(tools=[WEATHER], messages=turns)
    called = 'assistant:<think>hm</think>I will look.<tool_call>{"city": "Ulm"}</tool_call>'
    assert server.prompt().endswith(f"</tools>user:hi|{called}|tool:sunny|user:Well?|assistant:")


async def test_the_tool_runner_of_the_sdk(server: Server) -> None:
    server.engine.reply = REPLY

    @beta_async_tool
    async def weather(city: str) -> str:
        """Weather of a city."""
        server.engine.reply = b"Sunny."
        return f"sunny in {city}"

    runner = server.sdk.beta.messages.tool_runner(model="poet", max_tokens=1000, tools=[weather], messages=HI)
    messages = [message async for message in runner]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert "|tool:sunny in Ulm|" in server.prompt()


@pytest.mark.parametrize(
    ("choice", "forced", "calls"),
    [
        (None, False, 2),
        ({"type": "auto"}, False, 2),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, 1),
        ({"type": "any"}, True, 2),
        ({"type": "tool", "name": "weather"}, True, 2),
        ({"type": "none"}, False, 0),
    ],
)
async def test_the_choice_of_tools(server: Server, choice: dict[str, Any] | None, forced: bool, calls: int) -> None:
    server.engine.reply = CALL + CALL
    message = await server.message(tools=[WEATHER, NOW], **({} if choice is None else {"tool_choice": choice}))
    assert (server.engine.requests[0].sampling.grammar is not None) is forced
    assert [block.type for block in message.content].count("tool_use") == calls
    assert message.stop_reason == ("tool_use" if calls else "end_turn")


async def test_an_answer_with_a_schema_is_forced_by_a_grammar(server: Server) -> None:
    server.engine.reply = b'{"city": "Ulm"}'

    class City(BaseModel):
        city: str

    parsed = await server.sdk.messages.parse(model="base", max_tokens=100, messages=HI, output_format=City)
    assert parsed.parsed_output == City(city="Ulm")
    assert (await server.post_message(output_format={"type": "json_schema", "schema": SCHEMA})).status_code == 200
    assert all(request.sampling.grammar is not None for request in server.engine.requests)


async def test_an_input_that_was_cut_off_is_not_taken_for_a_complete_one(server: Server) -> None:
    server.engine.reply = CALL
    message = await server.message(tools=[WEATHER], max_tokens=CALL.index(b"Ulm") + 1)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.input.keys() == {"INVALID_JSON"}
    assert message.stop_reason == "max_tokens"


async def test_a_failed_tool_says_so(server: Server) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    failed = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no clock", "is_error": True}
    await server.message(
        messages=[*HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": [failed]}]
    )
    assert "|tool:Error: no clock|" in server.prompt()


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"system": "Be brief."}, "system:Be brief.|user:hi|assistant:"),
        ({"system": ""}, "user:hi|assistant:"),
        ({"system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}, "system:A\nB|user:hi|assistant:"),
        ({"messages": [*HI, *HI]}, "user:hi\nhi|assistant:"),
        ({"messages": [*HI, {"role": "system", "content": "Now brief."}]}, None),
        (
            {"messages": [*HI, {"role": "system", "content": "Brief."}, *HI]},
            "user:hi|system:Brief.|user:hi|assistant:",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": "Well"}]}, "user:hi|assistant:Well"),
        ({"messages": [*HI, {"role": "assistant", "content": []}]}, "user:hi|assistant:"),
        (
            {"messages": [*HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, *HI]},
            "user:hi|assistant:a\nb|user:hi|assistant:",
        ),
        (
            {
                "messages": [
                    *HI,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "thinking", "thinking": "hm", "signature": "of another server"},
                            {"type": "text", "text": "a", "citations": None},
                        ],
                    },
                    *HI,
                ]
            },
            "user:hi|assistant:<think>hm</think>a|user:hi|assistant:",
        ),
    ],
)
async def test_turns_become_the_template_s_messages(server: Server, fields: dict[str, Any], prompt: str | None) -> None:
    answer = await server.post_message(**fields)
    if prompt is None:
        assert refused(answer) == (400, "invalid_request_error", "there is no message to answer")
        return
    assert answer.status_code == 200, answer.text
    assert server.prompt() == prompt


@pytest.mark.parametrize(
    ("thinking", "end"),
    [
        (None, "assistant:"),
        ({"type": "enabled", "budget_tokens": 2048}, "assistant:+"),
        ({"type": "adaptive"}, "assistant:+"),
        ({"type": "disabled"}, "assistant:-"),
    ],
)
async def test_thinking_switches_the_template_s_reasoning(
    server: Server, thinking: dict[str, Any] | None, end: str
) -> None:
    await server.message(**({} if thinking is None else {"thinking": thinking}))
    assert server.prompt().endswith(end)


async def test_thinking_can_be_left_out_of_the_answer(server: Server) -> None:
    server.engine.reply = REPLY
    thinking = (await server.message(thinking={"type": "adaptive", "display": "omitted"})).content[0]
    assert thinking.to_dict() == {"type": "thinking", "thinking": "", "signature": ""}


async def test_a_template_without_thinking_or_tools(tmp_path: Path) -> None:
    plain = Server(tmp_path)
    for accepted in ({"type": "disabled"}, {"type": "adaptive"}):
        assert (await plain.post_message(thinking=accepted)).status_code == 200
    status, _, message = refused(await plain.post_message(thinking={"type": "enabled", "budget_tokens": 2048}))
    assert (status, "no thinking" in message) == (400, True)
    assert refused(await plain.post_message(tools=[WEATHER]))[0] == 400
    assert (await plain.post_message(output_config={"effort": "high"})).status_code == 200
    assert "effort" in refused(await plain.post_message(output_config={"effort": "low"}))[2]


async def test_fields_without_effect_are_accepted_as_coding_agents_send_them(server: Server) -> None:
    cached = {"type": "ephemeral", "ttl": "1h", "scope": "global"}
    answer = await server.client.post(
        "/v1/messages?beta=true",
        headers={
            "x-api-key": "any",
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "interleaved-thinking-2025-05-14,context-management-2025-06-27",
        },
        json={
            "model": "base",
            "max_tokens": 32000,
            "system": [{"type": "text", "text": "You code.", "cache_control": cached}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": cached}]}],
            "tools": [WEATHER | {"cache_control": cached, "type": "custom", "eager_input_streaming": True}],
            "metadata": {"user_id": "user_" + "0" * 200},
            "thinking": {"type": "enabled", "budget_tokens": 31999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "cache_control": cached,
            "service_tier": "auto",
            "temperature": 1,
            "top_k": 0,
            "stream": True,
            "container": None,
            "mcp_servers": [],
            "output_config": {},
        },
    )
    assert answer.status_code == 200, answer.text
    assert "event: message_stop" in answer.text
    assert server.prompt().endswith("</tools>system:You code.|user:hi|assistant:+")


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


def output(schema: dict[str, Any]) -> dict[str, Any]:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (block(**IMAGE), "messages.0.content.0: this server does not support image input"),
        (block(type="document", source={}), "does not support document input"),
        (block(type="tool_result", tool_use_id="t", content=[IMAGE]), "does not support image input"),
        (block(type="server_tool_use", id="x"), "content blocks of type server_tool_use"),
        (block(type="x" * 1000), "content blocks of type"),
        (block(text="hi"), "content blocks of type unknown"),
        (block(type="text", text="hi", colour="red"), "unknown parameter: messages.0.content.0.colour"),
        (block(type="text"), "missing parameter: messages.0.content.0.text"),
        (block(type="tool_use", id="x", name="f", input={}), "messages.0: a message of role user has no tool_use"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "missing parameter: messages.0.content"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "no message to answer"),
        (
            {"messages": [*HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}]},
            "no text to continue",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]}
                ]
            },
            "no tool_result",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            "prompt is too long: This model's maximum context length is 4096 tokens",
        ),
        ({"system": [IMAGE]}, "system.0: this server does not support image input"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools.0: this server has no tool of type",
        ),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{"name": "f"}]}, "missing parameter: tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice any needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice has a name"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "no function f"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"n": 2}, "unknown parameter: n"),
        ({"adapter": []}, "adapter"),
        ({"model": "poet", "adapter": "clerk"}, "different adapters"),
        (output({"type": "object", "if": {}}), "output_config.format.schema"),
        ({**output({}), "output_format": {"type": "json_schema", "schema": {}}}, "exclude each other"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "missing parameter: output_config.format.schema"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"tools": [WEATHER | {"strict": True}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER | {"input_schema": nested(600)}]}, "recursion limit"),
        ({"response_format": {"type": "text"}}, "unknown parameter: response_format"),
        ({"thread": {"type": "create"}}, "holds no conversations"),
    ],
)
async def test_what_is_not_served_is_400_and_named(server: Server, fields: dict[str, Any], what: str) -> None:
    answer = await server.post_message(**fields)
    status, kind, message = refused(answer)
    assert (status, kind) == (400, "invalid_request_error")
    assert what in message
    assert len(message) < 500
    assert server.engine.requests == []


async def test_max_tokens_is_required(server: Server) -> None:
    answer = await server.post("/v1/messages", {"messages": HI})
    assert refused(answer) == (400, "invalid_request_error", "missing parameter: max_tokens")


# --- errors ----------------------------------------------------------------------------------------------------------


async def test_errors_become_the_sdk_s_exception_classes(server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model poett does not exist; did you mean poet") as missing:
        await server.message(model="poett")
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="unknown parameter: n"):
        await server.message(extra_body={"n": 2})
    requests = len(server.engine.requests)
    server.engine.refusals = {requests: tree.Overloaded("full"), requests + 1: tree.Unavailable("restarting")}
    with pytest.raises(anthropic.RateLimitError, match="full") as full:
        await server.message()
    assert full.value.response.headers["Retry-After"] == "1"
    with pytest.raises(anthropic.InternalServerError, match="restarting") as restarting:
        await server.message(stream=True)
    assert (restarting.value.status_code, restarting.value.type) == (503, "overloaded_error")


async def test_errors_outside_a_message_have_the_same_shape(tmp_path: Path) -> None:
    server = Server(tmp_path, keys=Keys({hash_key("k"): Caller("alice", adapters=("cl*",))}), max_body=1000)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        unknown = await server.post(path, {}, key="wrong")
        assert refused(unknown)[:2] == (401, "authentication_error")
        assert refused(await server.post(path, {}, key="k"))[:2] == (400, "invalid_request_error")
        large = await server.post(path, {"messages": "x" * 2000}, key="k")
        assert refused(large)[:2] == (413, "request_too_large")
        wrong_method = await server.client.get(path, headers={"x-api-key": "k"})
        assert refused(wrong_method)[0] == 405
        hidden = await server.post(path, {"model": "poet", "max_tokens": 5, "messages": HI}, key="k")
        assert refused(hidden)[:2] == (404, "not_found_error")
        broken = await server.client.post(
            path, content="{", headers={"x-api-key": "k", "content-type": "application/json"}
        )
        assert refused(broken)[:2] == (400, "invalid_request_error")
    absent = await server.client.get("/v1/messages/batches", headers={"x-api-key": "k"})
    assert refused(absent)[:2] == (404, "not_found_error")
    assert "error" in (await server.client.get("/v1/messagesx")).json()  # not of this API: OpenAI's shape


# --- token counts ----------------------------------------------------------------------------------------------------


async def test_counted_tokens_are_those_of_the_message(server: Server) -> None:
    body: dict[str, Any] = {
        "model": "poet",
        "system": "Be brief.",
        "messages": HI,
        "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 2048},
    }
    counted = await server.sdk.messages.count_tokens(**body)
    message = await server.message(**body)
    assert counted.input_tokens == message.usage.input_tokens
    assert len(server.engine.requests) == 1


async def test_a_prompt_beyond_the_context_is_counted(tmp_path: Path) -> None:
    server = Server(tmp_path)
    turns = [{"role": "user", "content": "x" * 2 * CONTEXT}]
    counted = await server.sdk.messages.count_tokens(model="base", messages=turns)
    assert counted.input_tokens == len(f"user:{'x' * 2 * CONTEXT}|assistant:")


async def test_tokens_of_an_unknown_model_are_404(server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="did you mean poet"):
        await server.sdk.messages.count_tokens(model="base:poett", messages=HI)


# --- documentation ---------------------------------------------------------------------------------------------------


async def test_the_schema_describes_bodies_and_responses(server: Server) -> None:
    schema = server.app.openapi()
    for path, body, reply in (
        ("/v1/messages", "CreateMessage", "MessageReply"),
        ("/v1/messages/count_tokens", "CountMessageTokens", "MessageTokenCount"),
    ):
        route = schema["paths"][path]["post"]
        assert route["requestBody"]["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{body}"}
        shown = route["responses"]["200"]["content"]["application/json"]["schema"]
        assert shown == {"$ref": f"#/components/schemas/{reply}"}
        error = route["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert error == {"$ref": "#/components/schemas/AnthropicError"}
    parts = schema["components"]["schemas"]
    assert parts["CreateMessage"]["required"] == ["messages", "max_tokens"]
    assert parts["UnsupportedBlock"]["not"] == parts["ServerTool"]["not"] == {}
