"""Tools, reasoning and special tokens in chat completions, as a model with Qwen's or Hermes's template writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from stub_completions import StubCompletionApp, byte_tokenizer, events

TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif -%}"
    "{%- for m in messages -%}{{ m.role }}:{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{%- endfor -%}"
    "|{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    "{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif -%}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "description": "now"}}
LOOSE = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


@pytest.fixture
def server(tmp_path: Path) -> StubCompletionApp:
    server = StubCompletionApp(tmp_path, tokenizer=byte_tokenizer(template=TEMPLATE), context=4096)
    server.engine.reply = b"I will look.\n" + CALL
    return server


def prompt(server: StubCompletionApp, index: int = -1) -> str:
    return bytes(server.engine.requests[index].prompt).decode()


async def test_a_reply_with_a_tool_call(server: StubCompletionApp) -> None:
    answer = await server.chat(tools=[WEATHER, TIME])
    shown = ChatCompletion.model_validate(answer.json())
    choice = shown.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Ulm"}
    assert '"name": "weather"' in prompt(server)
    assert '"name": "time"' in prompt(server)


async def test_a_streamed_tool_call(server: StubCompletionApp) -> None:
    chunks = events(await server.chat(tools=[WEATHER], stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I will look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"].get("name") for call in calls if "id" in call] == ["weather"]
    assert {call["index"] for call in calls} == {0}
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Ulm"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        "tool_calls"
    ]


async def test_a_recorded_conversation_with_tools_is_replayed(server: StubCompletionApp) -> None:
    first = (await server.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    user = {"role": "user", "content": "hi"}
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "sunny"}
    first["tool_calls"][0]["function"]["parsed_arguments"] = {"city": "Ulm"}  # as the SDK's helpers add it
    answer = await server.chat(tools=[WEATHER], messages=[user, first, result])
    assert answer.status_code == 200, answer.text
    assert 'assistant:I will look.<tool_call>{"city": "Ulm"}</tool_call>|tool:sunny|' in prompt(server)


@pytest.mark.parametrize("fields", [{"tool_choice": "none", "tools": [WEATHER]}, {}, {"tools": []}])
async def test_without_tools_to_call_the_text_stays_as_it_is(server: StubCompletionApp, fields: dict[str, Any]) -> None:
    choice = (await server.chat(**fields)).json()["choices"][0]
    assert choice["message"]["content"] == server.engine.reply.decode()
    assert choice["finish_reason"] == "stop"
    assert "<tools>" not in prompt(server)


@pytest.mark.parametrize(
    ("fields", "forced"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, True),
        ({"tools": [{"type": "function", "function": WEATHER["function"] | {"strict": True}}]}, True),  # type: ignore[operator]
    ],
)
async def test_calls_that_must_come_or_must_be_valid_are_forced_by_a_grammar(
    server: StubCompletionApp, fields: dict[str, Any], forced: bool
) -> None:
    answer = await server.chat(**{"tools": [WEATHER, TIME], **fields})
    assert answer.status_code == 200, answer.text
    grammar = server.engine.requests[0].sampling.grammar
    assert (grammar is not None) is forced


async def test_parallel_calls_can_be_switched_off(server: StubCompletionApp) -> None:
    server.engine.reply = CALL + CALL
    both = (await server.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    assert len(both["tool_calls"]) == 2
    assert both["content"] is None
    one = (await server.chat(tools=[WEATHER], parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert len(one["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOSE]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ],
)
async def test_tools_that_cannot_be_served_are_400_and_named(
    server: StubCompletionApp, fields: dict[str, Any], param: str
) -> None:
    answer = await server.chat(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    answer = await StubCompletionApp(tmp_path).chat(tools=[WEATHER])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


async def test_a_call_that_max_tokens_cuts_off_is_no_text(server: StubCompletionApp) -> None:
    server.engine.reply = CALL + b"\n" + CALL
    for length in (5, 14, 26, 30, len(CALL) + 6, len(CALL) + 20):
        answer = (await server.chat(tools=[WEATHER], max_tokens=length)).json()["choices"][0]
        assert answer["finish_reason"] == "length"
        assert not answer["message"]["content"], length
        chunks = events(await server.chat(tools=[WEATHER], max_tokens=length, stream=True))
        assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks), length
    server.engine.reply = b"a < b, or is it"
    assert (await server.chat(tools=[WEATHER], max_tokens=3)).json()["choices"][0]["message"]["content"] == "a <"


async def test_a_stop_string_inside_a_call_is_not_the_end_of_a_call(server: StubCompletionApp) -> None:
    cut = (await server.chat(tools=[WEATHER], stop=["city"])).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    after = (await server.chat(tools=[WEATHER], stop=["</tool_call>"])).json()["choices"][0]
    assert after["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}])
async def test_a_function_without_properties_is_shown_with_none(server: StubCompletionApp, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    assert (await server.chat(tools=[tool])).status_code == 200
    assert '"properties": {}' in prompt(server)


async def test_a_lone_surrogate_in_recorded_arguments_is_replaced(server: StubCompletionApp) -> None:
    function = {"name": "weather", "arguments": '{"city": "\\ud800"}'}
    call = {"id": "c", "type": "function", "function": function}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "hi"}]
    answer = await server.chat(messages=turns)
    assert answer.status_code == 200, answer.text
    assert "\ufffd" in prompt(server) or "ud800" in prompt(server)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"tools": [WEATHER], "tool_choice": "required"},
    ],
)
async def test_a_continued_message_cannot_be_held_to_anything(
    server: StubCompletionApp, fields: dict[str, Any]
) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{"}]
    answer = await server.chat(messages=turns, continue_final_message=True, add_generation_prompt=False, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "continue_final_message")


# --- reasoning -------------------------------------------------------------------------------------------------------


async def test_reasoning_is_a_field_of_its_own(server: StubCompletionApp) -> None:
    server.engine.reply = b"<think>\nhm\n</think>\n\nUlm."
    message = (await server.chat()).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Ulm.")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(await server.chat(stream=True))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Ulm."
    hidden = (await server.chat(include_reasoning=False)).json()["choices"][0]["message"]
    assert "reasoning_content" not in hidden
    assert hidden["content"] == "Ulm."


async def test_reasoning_effort_switches_thinking_where_the_template_knows_it(
    server: StubCompletionApp, tmp_path: Path
) -> None:
    server.engine.reply = b"Ulm."
    assert (await server.chat(reasoning_effort="none")).status_code == 200
    assert prompt(server).endswith("<think></think>")
    assert (await server.chat(reasoning_effort="high")).status_code == 200
    assert prompt(server).endswith("assistant:")
    plain = StubCompletionApp(tmp_path)
    answer = await plain.chat(reasoning_effort="high")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")
    assert (await plain.chat(reasoning_effort="none")).status_code == 200


async def test_developer_is_system_for_templates_that_do_not_know_it(server: StubCompletionApp) -> None:
    server.engine.reply = b"x"
    turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (await server.chat(messages=turns)).status_code == 200
    assert prompt(server).startswith("system:be brief|")
