"""Messages and tools as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import CONVERSATION, TEMPLATES, render, tool_call

from lora_serve.api.chat_template import template_messages, template_tools


def history(*ids: str) -> list[dict[str, Any]]:
    """A conversation with parallel calls and their results."""
    calls = [tool_call("get_weather", '{"city": "Bonn"}', id_) for id_ in ids]
    results = [{"role": "tool", "tool_call_id": id_, "content": f"sunny {number}"} for number, id_ in enumerate(ids)]
    return [*CONVERSATION, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_calls_with_arguments_as_an_object_and_their_results(name: str) -> None:
    prompt = render(name, [{"role": "system", "content": "Be brief."}, *history("call_PHx2xCZ7", "call_2nd")])
    assert prompt.count("Bonn") == 2
    assert '\\"city' not in prompt, "the arguments were rendered as a JSON string"
    assert "sunny 0" in prompt
    assert "sunny 1" in prompt
    assert "None" not in prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_takes_an_assistant_s_message_without_tool_calls(name: str) -> None:
    turns = [*CONVERSATION, {"role": "assistant", "content": "Sunny.", "tool_calls": None}, *CONVERSATION]
    assert "Sunny." in render(name, turns)


def test_mistral_s_call_ids_have_nine_characters_and_still_match() -> None:
    messages = template_messages(history("call_PHx2xCZ7", "aB3456789"), TEMPLATES["mistral_nemo"])
    first, second = (call["id"] for call in messages[1]["tool_calls"])
    assert len(first) == 9
    assert first.isalnum()
    assert second == "aB3456789"
    assert [message.get("tool_call_id") for message in messages[2:]] == [first, second]
    other = template_messages(history("call_PHx2xCZ7"), TEMPLATES["qwen3"])
    assert other[1]["tool_calls"][0]["id"] == "call_PHx2xCZ7"


def test_llama_s_template_gets_one_call_in_a_message() -> None:
    messages = template_messages(history("a", "b"), TEMPLATES["llama3"])
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant", "tool", "tool"]
    assert [len(message["tool_calls"]) for message in messages[1:3]] == [1, 1]


def test_a_tool_s_message_has_the_function_s_name() -> None:
    assert [message.get("name") for message in template_messages(history("a"), "")] == [None, None, "get_weather"]
    stray = [{"role": "tool", "tool_call_id": "x", "name": "given", "content": "y"}]
    assert template_messages(stray, "")[0]["name"] == "given"
    assert "name" not in template_messages([{"role": "tool", "tool_call_id": "x", "content": "y"}], "")[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ("", {}),
        (None, {}),
        ("[1]", "[1]"),
        ("{broken", "{broken"),
        ("[" * 100_000, "[" * 100_000),
        ({"a": 1}, {"a": 1}),
    ],
    ids=["object", "empty", "null", "array", "broken", "deep", "an object already"],
)
def test_arguments_become_an_object_if_they_are_one(arguments: Any, expected: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": arguments}}]}
    assert template_messages([message], "")[0]["tool_calls"][0]["function"]["arguments"] == expected


def test_content_is_a_string_and_developer_is_system_unless_the_template_knows_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant"}]
    assert template_messages(messages, "{{ messages }}") == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]
    assert template_messages(messages, "if role == 'developer'")[0]["role"] == "developer"


def test_reasoning_is_passed_on_and_what_openai_s_sdk_adds_is_not() -> None:
    message = {"role": "assistant", "content": "x", "reasoning_content": "hm", "refusal": None, "annotations": []}
    assert template_messages([message], "") == [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]


def test_the_messages_given_are_not_changed() -> None:
    messages = history("call_PHx2xCZ7", "b")
    before = json.dumps(messages)
    for template in TEMPLATES.values():
        template_messages(messages, template)
    assert json.dumps(messages) == before


def test_tools_have_a_description_and_parameters() -> None:
    given = {"type": "function", "function": {"name": "f", "strict": True}}
    function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert template_tools([given]) == [{"type": "function", "function": function}]
