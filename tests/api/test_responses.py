"""`/v1/responses`, driven by OpenAI's SDK."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseStreamEvent,
)
from pydantic import BaseModel, TypeAdapter
from stub_completions import StubCompletionApp, byte_tokenizer

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.api.openai.response_object import ResponseObject
from lora_serve.errors import Overloaded
from lora_serve.messages import AdapterInfo

TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif -%}"
    "{%- for m in messages -%}{{ m.role }}:"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{%- endfor -%}"
    "|{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    "{%- if enable_thinking is defined %}{{ '+' if enable_thinking else '-' }}{% endif -%}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "description": "of a city", "parameters": SCHEMA, "strict": False}
NOW = {"type": "function", "name": "now", "parameters": None, "strict": None}
ONLY_NOW = {"type": "allowed_tools", "tools": [{"type": "function", "name": "now"}]}
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
REPLY = b"<think>\nhm\n</think>\n\nI will look.\n" + CALL


class City(BaseModel):
    city: str


class Server(StubCompletionApp):
    """A stub server, and OpenAI's SDK as its client."""

    def __init__(self, store: Path, **options: Any) -> None:
        super().__init__(store, **options)
        for name in ("poet", "clerk"):
            self.engine.adapters[name] = AdapterInfo(name, False, [])
        transport = httpx2.ASGITransport(self.app)
        self.sdk = AsyncOpenAI(
            base_url="http://localhost/v1",
            api_key="sk-any",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        )

    async def respond(self, **fields: Any) -> Response:
        answer: Response = await self.sdk.responses.create(**{"model": "base", "input": "hi", **fields})
        return answer

    async def streamed(self, **fields: Any) -> list[ResponseStreamEvent]:
        stream = await self.sdk.responses.create(**{"model": "base", "input": "hi", "stream": True, **fields})
        return [event async for event in stream]

    async def send(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/responses", {"input": "hi", **fields})

    def prompt(self, index: int = -1) -> str:
        return bytes(self.engine.requests[index].prompt).decode()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path, tokenizer=byte_tokenizer(template=TEMPLATE), context=4096)


def refused(answer: httpx.Response) -> tuple[int, str | None, str]:
    """Status, parameter and message of an error; asserts that it has OpenAI's shape."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["message"]


def without_ids(value: Any) -> Any:
    """Output items without what is different each time."""
    return [{key: of for key, of in item.items() if key not in ("id", "call_id")} for item in value]


# --- responses -------------------------------------------------------------------------------------------------------


async def test_a_response_has_every_field_of_the_sdk_s_model(server: Server) -> None:
    server.engine.cached = 4
    body = (await server.send(model="poet", temperature=0.5, max_output_tokens=1000, metadata={"a": "b"})).json()
    assert body.keys() >= Response.model_fields.keys()
    shown = ResponseObject.model_validate(body)
    assert shown.id.startswith("resp_")
    assert (shown.model, shown.adapter) == ("poet", "poet@" + "d" * 12)
    assert (shown.status, shown.error, shown.incomplete_details) == ("completed", None, None)
    assert (shown.temperature, shown.top_p, shown.max_output_tokens) == (0.5, 1.0, 1000)
    assert (shown.metadata, shown.store, shown.truncation) == ({"a": "b"}, True, "disabled")
    answer = Response.model_validate(body)
    assert answer.output_text == "hello"
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", "completed")
    prompt = len(server.engine.requests[0].prompt)
    assert body["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": len("hello") + 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + len("hello") + 1,
    }


async def test_an_adapter_in_the_body(server: Server) -> None:
    answer = await server.respond(extra_body={"adapter": [{"name": "poet", "weight": 0.5}, {"name": "clerk"}]})
    assert answer.model == "poet+clerk"
    assert [(use.name, use.weight) for use in server.engine.requests[0].adapters] == [("poet", 0.5), ("clerk", 1.0)]


async def test_reasoning_text_and_calls_are_items(server: Server) -> None:
    server.engine.reply = REPLY
    answer = await server.respond(tools=[WEATHER, NOW])
    thought, message, call = answer.output
    assert isinstance(thought, ResponseReasoningItem)
    assert isinstance(message, ResponseOutputMessage)
    assert isinstance(call, ResponseFunctionToolCall)
    assert [part.text for part in thought.content or []] == ["hm"]
    assert thought.summary == []
    assert answer.output_text == "I will look."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Ulm"})
    assert call.call_id.startswith("call_")
    assert call.id != call.call_id
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(REPLY) + 1
    assert len("hm") <= answer.usage.output_tokens_details.reasoning_tokens <= len("<think>\nhm\n</think>\n\n")


async def test_a_reply_that_was_cut_off_is_incomplete(server: Server) -> None:
    answer = await server.respond(max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == "hel"
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert message.status == "incomplete"


async def test_an_empty_reply_is_an_empty_message(server: Server) -> None:
    server.engine.reply = b""
    answer = await server.respond()
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert [part.to_dict() for part in message.content] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


async def test_parameters_are_repeated_with_their_defaults(server: Server) -> None:
    chosen = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "City", "schema": SCHEMA, "strict": True}},
        "instructions": "be brief",
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    server.engine.reply = CALL
    sent = (await server.send(**chosen)).json()
    assert sent | chosen | {"text": sent["text"]} == sent
    assert sent["text"] == chosen["text"] | {"verbosity": "medium"}  # type: ignore[operator]
    plain = (await server.send()).json()
    assert (plain["tools"], plain["tool_choice"], plain["parallel_tool_calls"]) == ([], "auto", True)
    assert plain["text"]["format"] == {"type": "text"}
    for body in (sent, plain):
        ResponseObject.model_validate(body)
        Response.model_validate(body)


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_stream_events_have_names_numbers_and_an_order(server: Server) -> None:
    server.engine.reply = REPLY
    answer = await server.send(stream=True, tools=[WEATHER])
    assert answer.headers["content-type"].startswith("text/event-stream")
    names, data = [], []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, sent = event.split("\n")
        names.append(name.removeprefix("event: "))
        data.append(json.loads(sent.removeprefix("data: ")))
    assert names == [event["type"] for event in data]
    assert [event["sequence_number"] for event in data] == [*range(len(data))]
    for event in data:
        TypeAdapter(ResponseStreamEvent).validate_python(event)  # every required field of its type
    assert [name.removeprefix("response.") for name in dict.fromkeys(names)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "completed",
    ]
    places = [(event["type"].split(".")[1], event.get("output_index")) for event in data]
    assert [place for place in places if place[0] == "output_item"] == [("output_item", n) for n in (0, 0, 1, 1, 2, 2)]
    assert [place for place in places if place[0] == "content_part"] == [("content_part", n) for n in (0, 0, 1, 1)]
    assert data[0]["response"]["status"] == "in_progress"
    assert (data[0]["response"]["output"], data[0]["response"]["usage"]) == ([], None)


@pytest.mark.parametrize("reply", [REPLY, b"hello", b"", CALL + CALL, b"<think>\nhm\n</think>\n\n", b"<tool_call>\nno"])
@pytest.mark.parametrize("most", [1000, 20])
async def test_a_stream_adds_up_to_the_response_without_streaming(server: Server, reply: bytes, most: int) -> None:
    server.engine.reply = reply
    server.engine.cached = 3
    include = ["message.output_text.logprobs"]
    fields = {"tools": [WEATHER], "max_output_tokens": most, "include": include, "top_logprobs": 2}
    whole = await server.respond(**fields)
    events = await server.streamed(**fields)
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    final = last.response  # type: ignore[union-attr]
    assert without_ids(final.to_dict()["output"]) == without_ids(whole.to_dict()["output"])
    assert final.usage == whole.usage
    done = [event.item.to_dict() for event in events if event.type == "response.output_item.done"]
    assert done == final.to_dict()["output"]
    texts = dict.fromkeys(range(len(done)), "")
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta  # type: ignore[union-attr]
    for item, text in zip(done, texts.values(), strict=True):
        content: Any = item.get("content")
        assert (content[0]["text"] if content else item["arguments"]) == text


async def test_the_sdk_s_stream_helper(server: Server) -> None:
    server.engine.reply = REPLY
    text = arguments = ""
    async with server.sdk.responses.stream(model="base", input="hi", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
                assert event.snapshot == text
            elif event.type == "response.function_call_arguments.delta":
                arguments += event.delta
        final = await stream.get_final_response()
    assert text == final.output_text == "I will look."
    assert json.loads(arguments) == {"city": "Ulm"}


async def test_an_error_in_the_middle_of_a_stream_is_a_failed_response(server: Server) -> None:
    server.engine.breaks = 3
    events = await server.streamed()
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.failed",
    ]
    failed = events[-1].response  # type: ignore[union-attr]
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("server_error", "it broke")
    assert failed.output[0].content[0].text == "hel"  # type: ignore[union-attr, index]


async def test_the_objects_in_a_stream_have_the_documented_form(server: Server) -> None:
    for breaks, last in ((None, "completed"), (3, "failed")):
        server.engine.breaks = breaks
        lines = (await server.send(stream=True)).text.split("\n")
        sent = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        shown = [ResponseObject.model_validate(event["response"]) for event in sent if "response" in event]
        assert [each.status for each in shown] == ["in_progress", "in_progress", last]


async def test_an_error_before_the_first_token_of_a_stream_is_a_failed_response(server: Server) -> None:
    server.engine.breaks = 0
    assert [event.type for event in await server.streamed()] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert len(server.engine.closed) == 1


async def test_a_bug_in_the_middle_of_a_stream_is_an_exception_of_the_sdk(server: Server) -> None:
    server.engine.reply = [104, -1]  # type: ignore[assignment]  # no such token: detokenizing fails
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    sdk = server.sdk.with_options(http_client=httpx2.AsyncClient(transport=transport))
    with pytest.raises(openai.APIError, match="the server failed on this request"):
        async for _ in await sdk.responses.create(model="base", input="hi", stream=True):
            pass


async def test_a_client_that_leaves_ends_the_generation(server: Server) -> None:
    server.engine.forever = True
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append(b"")
            return {"type": "http.request", "body": b'{"input": "hi", "stream": true}'}
        while len(sent) < 10:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": headers, "query_string": b""}
    async with asyncio.timeout(5):
        await server.app(scope, receive, send)
    assert len(server.engine.closed) == 1
    assert b"response.output_text.delta" in b"".join(sent)
    assert b"response.failed" not in b"".join(sent)


async def test_a_refused_stream_is_an_error_and_no_stream(server: Server) -> None:
    server.engine.refusals = {0: Overloaded("the queue is full", retry_after=3)}
    answer = await server.send(stream=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


# --- logprobs --------------------------------------------------------------------------------------------------------


async def test_logprobs_are_those_of_the_text(server: Server) -> None:
    server.engine.reply = b"<think>\nhm\n</think>\n\nGr\xc3\xbc\xc3\x9fe <b>\n" + CALL
    body = (
        await server.send(tools=[WEATHER], include=["message.output_text.logprobs"], top_logprobs=1, temperature=0)
    ).json()
    (message,) = [item for item in body["output"] if item["type"] == "message"]
    (part,) = message["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == part["text"] == "Grüße <b>"
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {1}
    plain = (await server.send(tools=[WEATHER])).json()
    assert [item["content"][0]["logprobs"] for item in plain["output"] if item["type"] == "message"] == [[]]


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hi", "user:hi|"),
        ([{"role": "user", "content": "hi"}], "user:hi|"),
        ([{"role": "developer", "content": "brief"}, {"role": "user", "content": "hi"}], "system:brief|user:hi|"),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}],
            "user:ab|",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "assistant", "content": "really"},
                {"role": "user", "content": "b"},
            ],
            "user:a|assistant:no|assistant:really|user:b|",
        ),
        (
            [
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}", "status": "completed"},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
            ],
            'assistant:<tool_call>{"x": 1}</tool_call><tool_call>{}</tool_call>|tool:one|tool:two|',
        ),
        (
            [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"role": "assistant", "content": "a"},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
                {"type": "message", "role": "assistant", "content": "b", "phase": "final_answer"},
                {"role": "user", "content": "c"},
            ],
            "assistant:<think>hm</think>a<tool_call>{}</tool_call>|tool:one|assistant:<think>so</think>b|user:c|",
        ),
    ],
)
async def test_the_prompt_of_an_input(server: Server, given: Any, prompt: str) -> None:
    await server.respond(input=given)
    assert server.prompt() == f"{prompt}assistant:"
    await server.respond(input=given, instructions="be kind")
    assert server.prompt() == f"system:be kind|{prompt}assistant:"


async def test_a_recorded_response_is_input_again(server: Server) -> None:
    server.engine.reply = REPLY
    first = await server.sdk.responses.parse(model="base", input="hi", tools=[WEATHER])  # type: ignore[list-item]
    result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "sunny"}  # type: ignore[union-attr]
    await server.respond(input=[{"role": "user", "content": "hi"}, *first.output, result], tools=[WEATHER])
    turn = 'assistant:<think>hm</think>I will look.<tool_call>{"city": "Ulm"}</tool_call>|tool:sunny|assistant:'
    assert server.prompt().endswith(f"user:hi|{turn}")
    raw = [item.to_dict() for item in first.output]  # as stored by clients that keep JSON
    answer = await server.send(input=[{"role": "user", "content": "hi"}, *raw, result], tools=[WEATHER])
    assert answer.status_code == 200, answer.text
    assert server.prompt().endswith(f"user:hi|{turn}")
    dumped = [item.model_dump() for item in first.output]  # with every field of the SDK's models
    null = {"id": None, "status": None, "name": None, "namespace": None, "caller": None}
    await server.respond(input=[{"role": "user", "content": "hi"}, *dumped, result | null], tools=[WEATHER])
    assert server.prompt().endswith(f"user:hi|{turn}")


# --- tools, formats and reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "forced"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "name": "weather"}}, True),
        ({"tool_choice": ONLY_NOW | {"mode": "auto"}}, False),
        ({"tool_choice": ONLY_NOW | {"mode": "required"}}, True),
        ({"tools": [WEATHER | {"strict": True}]}, True),
        ({"tools": [], "text": {"format": {"type": "json_object"}}}, True),
        ({"tools": [], "text": {"format": {"type": "text"}}}, False),
    ],
)
async def test_what_must_come_or_must_be_valid_is_forced_by_a_grammar(
    server: Server, fields: dict[str, Any], forced: bool
) -> None:
    await server.respond(**{"tools": [WEATHER, NOW], **fields})
    assert (server.engine.requests[0].sampling.grammar is not None) is forced


async def test_tools_are_shown_to_the_model_unless_none_may_be_called(server: Server) -> None:
    server.engine.reply = CALL + CALL
    both = await server.respond(tools=[WEATHER, NOW])
    assert [item.type for item in both.output] == ["function_call"] * 2
    assert '"name": "weather"' in server.prompt()
    assert '"name": "now"' in server.prompt()
    one = await server.respond(tools=[WEATHER], parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call"]
    await server.respond(tools=[WEATHER, NOW], tool_choice=ONLY_NOW | {"mode": "auto"})
    assert "weather" not in server.prompt()
    assert '"name": "now"' in server.prompt()
    none = await server.respond(tools=[WEATHER], tool_choice="none")
    assert none.output_text == server.engine.reply.decode()
    assert "weather" not in server.prompt()


async def test_structured_output_is_parsed_by_the_sdk(server: Server) -> None:
    server.engine.reply = b'{"city": "Ulm"}'
    answer = await server.sdk.responses.parse(model="base", input="hi", text_format=City)
    assert answer.output_parsed == City(city="Ulm")
    assert server.engine.requests[0].sampling.grammar is not None
    async with server.sdk.responses.stream(model="base", input="hi", text_format=City) as stream:
        assert (await stream.get_final_response()).output_parsed == City(city="Ulm")
    again = [{"role": "user", "content": "hi"}, *answer.output, {"role": "user", "content": "more"}]
    await server.respond(input=again)
    assert server.prompt() == 'user:hi|assistant:{"city": "Ulm"}|user:more|assistant:'


async def test_reasoning_effort_switches_thinking(server: Server) -> None:
    await server.respond(reasoning={"effort": "none"})
    assert server.prompt().endswith("assistant:-")
    for effort in ("high", "max"):
        await server.respond(reasoning={"effort": effort, "summary": "auto"})
        assert server.prompt().endswith("assistant:+")


async def test_sampling_parameters(server: Server) -> None:
    await server.respond(temperature=0.25, top_p=0.5, max_output_tokens=7)
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.25, 0.5, 7)
    await server.respond()
    assert server.engine.requests[1].sampling.max_tokens == 4096 - len(server.engine.requests[1].prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"store": False, "include": ["reasoning.encrypted_content"]},
        {"background": False, "truncation": "disabled", "service_tier": "auto", "max_tool_calls": 3},
        {"previous_response_id": None, "conversation": None, "prompt": None, "instructions": None, "tools": None},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"text": {"verbosity": "medium"}, "prompt_cache_retention": "24h", "top_logprobs": 0},
    ],
)
async def test_fields_without_effect_are_accepted(server: Server, fields: dict[str, Any]) -> None:
    answer = await server.send(**fields)
    assert answer.status_code == 200, answer.text


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "conv_1"}, "conversation", "stores no responses"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "stores no responses"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "stores no prompts"),
        ({"background": True}, "background", "background"),
        ({"truncation": "auto"}, "truncation", "leaves nothing out"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "knows no verbosity"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation", "pad"),
        ({"stream_options": {}}, "stream_options", "needs stream: true"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"whatever": 1}, "whatever", "unknown parameter"),
        ({"messages": []}, "messages", "unknown parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"include": ["everything"]}, "include.0", "Input should be"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "does not support the tool web_search"),
        ({"tools": [WEATHER, {"type": "mcp", "server_label": "x"}]}, "tools.1", "does not support the tool mcp"),
        ({"tools": [{"type": "x" * 10_000}]}, "tools.0", "does not support the tool xxx"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "missing parameter"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "pattern"),
        ({"tools": [NOW, WEATHER | {"strict": True, "parameters": {"type": "object"}}]},
         "tools.1.parameters", "strict"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "name": "weather"}},
         "tool_choice", "no function weather"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "function"),
        ({"tools": [WEATHER], "tool_choice": ONLY_NOW | {"mode": "auto"}}, "tool_choice.tools", "no function now"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}},
            "text.format.schema",
            "additionalProperties",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing parameter"),
        ({"reasoning": {"effort": "immense"}}, "reasoning.effort", "Input should be"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": 5}, "input", "valid string"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "Input should be"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.id", "not known"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0", "items of type web_search_call"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "function_call", "name": "f", "arguments": "{}"}]},
         "input.1.call_id", "missing parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
         "input.0.content.0", "does not support image input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text"}]}]},
         "input.0.content.1.text", "missing parameter"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
         "input.0.output.0", "does not support file input"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input.0.content.0", "input_text"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 129}, "input", "128"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_400_and_names_the_field(
    server: Server, fields: dict[str, Any], param: str, says: str
) -> None:
    status, named, message = refused(await server.send(**fields))
    assert (status, named) == (400, param), message
    assert says in message
    assert len(message) < 600
    assert server.engine.requests == []


async def test_a_missing_input_is_named(server: Server) -> None:
    assert refused(await server.post("/v1/responses", {}))[:2] == (400, "input")


async def test_an_input_that_is_too_long_is_refused_in_the_sentence_that_clients_know(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await server.respond(input="x" * 5000)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input")
    assert "This model's maximum context length is 4096 tokens." in refusal.value.message


async def test_a_template_without_tools_or_effort_refuses_them(tmp_path: Path) -> None:
    plain = Server(tmp_path)
    assert refused(await plain.send(tools=[WEATHER]))[:2] == (400, "tools")
    status, param, message = refused(await plain.send(reasoning={"effort": "high"}))
    assert (status, param) == (400, "reasoning.effort")
    assert "reasoning_effort" not in message


async def test_an_unknown_model_is_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await server.respond(model="poe")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "did you mean poet" in missing.value.message


@pytest.mark.parametrize("stream", [False, True])
async def test_an_input_may_refer_to_recent_output_items(server: Server, stream: bool) -> None:
    if stream:
        events = [event async for event in await server.respond(stream=True)]
        (item,) = events[-1].response.output
    else:
        (item,) = (await server.respond()).output
    hi = {"role": "user", "content": "hi"}
    again = [hi, {"type": "item_reference", "id": item.id}, hi]
    assert (await server.respond(input=again)).status == "completed"
    sent = [hi, item.to_dict(), hi]
    await server.respond(input=sent)
    referred, whole = server.engine.requests[-2:]
    assert referred.prompt == whole.prompt


async def test_items_are_not_kept_with_store_false(server: Server) -> None:
    (item,) = (await server.respond(store=False)).output
    with pytest.raises(openai.BadRequestError, match="not known"):
        await server.respond(input=[{"type": "item_reference", "id": item.id}])


async def test_responses_are_not_stored(server: Server) -> None:
    id_ = (await server.respond(store=True)).id
    for request in (
        server.sdk.responses.retrieve(id_),
        server.sdk.responses.delete(id_),
        server.sdk.responses.cancel(id_),
        server.sdk.responses.input_items.list(id_),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            await request
        assert missing.value.code == "response_not_found"
        assert "stores no responses" in missing.value.message


async def test_keys_are_needed_and_bind_adapters(tmp_path: Path) -> None:
    keys = Keys({hash_key("sk-any"): Caller("me", adapters=("clerk",))})
    server = Server(tmp_path, keys=keys, tokenizer=byte_tokenizer(template=TEMPLATE))
    assert (await server.post("/v1/responses", {"input": "hi"}, key="other")).status_code == 401
    assert (await server.client.get("/v1/responses/resp_1")).status_code == 401
    with pytest.raises(openai.NotFoundError):
        await server.respond(model="poet")
    assert (await server.respond(model="clerk")).model == "clerk"


async def test_the_schema_documents_the_route(server: Server) -> None:
    paths = (await server.client.get("/openapi.json")).json()["paths"]
    post = paths["/v1/responses"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/CreateResponse")
    assert post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ResponseObject")
    assert "text/event-stream" in post["responses"]["200"]["content"]
