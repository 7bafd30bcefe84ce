"""Generated text becomes text, reasoning and tool calls, however it is cut into pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from chat_templates import CONVERSATION, TEMPLATES, render, tool_call, written_reply
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_serve.api.chat_output import (
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    ReasoningFormat,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    detect_reasoning_format,
    detect_tool_format,
    ends_in_open_reasoning,
)

THINK = ReasoningFormat("<think>", "</think>")
FORMATS = {name: detect_tool_format(template) for name, template in TEMPLATES.items()}
REASONING = {name: detect_reasoning_format(template) for name, template in TEMPLATES.items()}
QWEN, LLAMA, CODER = FORMATS["qwen3"], FORMATS["llama3"], FORMATS["qwen_coder"]
MISTRAL = FORMATS["mistral_nemo"]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "when": {"type": ["string", "null"]},
        "where": {"type": "object"},
    },
}
KNOWN = {"get_weather": SCHEMA, "get_time": {}}


def joined(events: Sequence[OutputEvent]) -> list[Any]:
    """Events as a list: text, ("reasoning", text), (name, arguments)."""
    found: list[Any] = []
    for event in events:
        last = found[-1] if found else None
        match event:
            case TextDelta(text):
                if isinstance(last, str):
                    found[-1] += text
                else:
                    found.append(text)
            case ReasoningDelta(text):
                if isinstance(last, tuple) and last[0] == "reasoning":
                    found[-1] = ("reasoning", last[1] + text)
                else:
                    found.append(("reasoning", text))
            case ToolCallBegin(index, name):
                assert index == sum(isinstance(entry, tuple) and entry[0] != "reasoning" for entry in found)
                found.append((name, ""))
            case ToolCallArguments(index, text):
                assert isinstance(last, tuple)
                assert index == sum(isinstance(entry, tuple) and entry[0] != "reasoning" for entry in found) - 1
                found[-1] = (last[0], last[1] + text)
    return found


def parse(text: str, *arguments: Any, pieces: Sequence[str] | None = None, **options: Any) -> list[Any]:
    parser = OutputParser(*arguments, **options)
    events = [event for piece in (pieces or [text]) for event in parser.feed(piece)]
    return joined(events + parser.flush())


def feed_each(parser: OutputParser, text: str) -> list[tuple[str, list[OutputEvent]]]:
    return [(character, parser.feed(character)) for character in text]


# What templates write is what is read.


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_as_each_template_writes_them_are_read(name: str) -> None:
    arguments = '{"city": "Köln \\"am\\" Rhein", "days": 3, "where": {"lat": 50.9, "in": [true, null]}}'
    message = {"content": None, "tool_calls": [tool_call("get_weather", arguments)]}
    [(called, written)] = parse(written_reply(name, message), FORMATS[name], REASONING[name], known=KNOWN)
    assert (called, json.loads(written)) == ("get_weather", json.loads(arguments))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "llama3"])
def test_parallel_calls_as_each_template_writes_them_are_read(name: str) -> None:
    calls = [tool_call("get_weather", '{"city": "Bonn"}'), tool_call("get_time", "{}", "call00002")]
    text = written_reply(name, {"content": None, "tool_calls": calls})
    read = parse(text, FORMATS[name], REASONING[name])
    expected = [("get_weather", {"city": "Bonn"}), ("get_time", {})]
    assert [(called, json.loads(written)) for called, written in read] == expected
    assert parse(text, FORMATS[name], REASONING[name], most_calls=1) == read[:1]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen_coder", "mistral_args"])
def test_text_before_a_call_stays_text(name: str) -> None:
    message = {"content": "Let me look.", "tool_calls": [tool_call("get_time", "{}")]}
    text = written_reply(name, message)
    assert parse(text, FORMATS[name], REASONING[name]) == ["Let me look.", ("get_time", "{}")]


@pytest.mark.parametrize(("name", "tag"), [("qwen3", "<think>"), ("mistral_args", "[THINK]")])
def test_reasoning_as_each_template_writes_it_is_read(name: str, tag: str) -> None:
    reasoning = REASONING[name]
    assert reasoning is not None
    assert reasoning.begin == tag
    message = {"content": "Sunny.", "reasoning_content": "They ask\n\nabout weather."}
    expected = [("reasoning", "They ask\n\nabout weather."), "Sunny."]
    assert parse(written_reply(name, message), FORMATS[name], reasoning) == expected


def test_a_prompt_that_ends_in_open_reasoning_is_recognised() -> None:
    assert ends_in_open_reasoning(render("qwq", CONVERSATION, add_generation_prompt=True), THINK)
    assert not ends_in_open_reasoning(render("qwen3", CONVERSATION, add_generation_prompt=True), THINK)
    closed = render("qwen3", CONVERSATION, add_generation_prompt=True, enable_thinking=False)
    assert closed.rstrip().endswith("</think>")
    assert not ends_in_open_reasoning(closed, THINK)
    assert ends_in_open_reasoning("assistant: <think>\nhm, so", THINK, "<think>\nhm, so")
    assert not ends_in_open_reasoning("assistant: <think>hm</think>It", THINK, "<think>hm</think>It")
    quoted = [{"role": "user", "content": "What does <think> do?"}]
    assert not ends_in_open_reasoning(render("qwen3", quoted, add_generation_prompt=True), THINK)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", None),
        ("<tool_call>name\n<arg_key>key</arg_key>", None),
        ("<｜tool▁calls▁begin｜>", None),
        ("<|start_header_id|>user<|end_header_id|>", None),
        (TEMPLATES["hermes"], "hermes"),
        (TEMPLATES["qwen2_5"], "hermes"),
        (TEMPLATES["qwen_coder"], "qwen-coder"),
        (TEMPLATES["llama4"], "llama"),
        (TEMPLATES["mistral_nemo"], "mistral"),
    ],
)
def test_the_format_is_detected_from_the_template(template: str, expected: str | None) -> None:
    found = detect_tool_format(template)
    assert (found and found.name) == expected


def test_templates_without_reasoning_have_no_reasoning_format() -> None:
    assert detect_reasoning_format(TEMPLATES["qwen2_5"]) is None


# Replies in each format, with what models get wrong.

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HERMES_CASES = [
    ("just text\n", ["just text\n"]),
    (CALL, [("f", '{"a": 1}')]),
    (f"\n\n{CALL}\n", [("f", '{"a": 1}')]),
    (f"First.\n{CALL}\nThen.\n", ["First.", ("f", '{"a": 1}'), "Then.\n"]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": {}}}}\n</tool_call>', [("f", '{"a": {}}')]),
    ('<tool_call>{"name": "f", "arguments": {}\n</tool_call>', [("f", "{}")]),
    (
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}',
        [("f", "{}"), ("g", "{}")],
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [("f", '{"a": "</tool_call>"}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [("f", '{"a": "x\ny"}')]),
    # Arguments that can't be read, or are not complete, are the client's to judge.
    ('<tool_call>{"name": "f", "arguments": {"a": tru', [("f", '{"a": tru')]),
    ('<tool_call>{"name": "f", "arguments": {a: 1}</tool_call>ok', [("f", "{a: 1}"), "ok"]),
    # What is no call is text.
    ("<tool_call>", ["<tool_call>"]),
    ("<tool_ca", ["<tool_ca"]),
    ('<tool_call>\n{"name": "f"', ['<tool_call>\n{"name": "f"']),
    ("<tool_call>f(1)</tool_call>", ["<tool_call>f(1)</tool_call>"]),
    ('<tool_call>{"name": 1}', ['<tool_call>{"name": 1}']),
    ('<tool_call>{"name": "f", "arguments": [1]}', ['<tool_call>{"name": "f", "arguments": [1]}']),
    ('<tool_call>{"no": "call"}</tool_call>', ['<tool_call>{"no": "call"}</tool_call>']),
    (f"<tool_call> oops {CALL}", ["<tool_call> oops", ("f", '{"a": 1}')]),
    (f"<tool_call>{CALL}", ["<tool_call>", ("f", '{"a": 1}')]),
]
LLAMA_CASES = [
    ('{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
    ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
    ('{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
    ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
    ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}\n', [("f", "{}"), ("g", "{}")]),
    ('ok <|python_tag|>{"name": "f", "parameters": {}}', ["ok", ("f", "{}")]),
    ('{"name": "f", "parameters": {}}\n\nSo; there.', [("f", "{}"), "So; there."]),
    # An answer in JSON is no call.
    ('{"name": "Ada", "age": 36}', ['{"name": "Ada", "age": 36}']),
    ('{"name": "Ada"}', ['{"name": "Ada"}']),
    ('{"a": {"name": "f", "parameters": {}}}', ['{"a": {"name": "f", "parameters": {}}}']),
    ('Like {"name": "f", "parameters": {}}', ['Like {"name": "f", "parameters": {}}']),
    ("<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
]
MISTRAL_CASES = [
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}, "id": "123456789"}]', [("f", '{"a": [1]}')]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
    ('[TOOL_CALLS]f{"a": 1}', [("f", '{"a": 1}')]),
    ('[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
    ("ok[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", ["ok", ("f", "{}"), ("g", "{}")]),
    ('[TOOL_CALLS]{"name": "f", "arguments": {}}', [("f", "{}")]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {}}', [("f", "{}")]),
    ("[TOOL_CALLS] none", ["[TOOL_CALLS] none"]),
    ("[TOOL_CALLS] [1, 2]", ["[TOOL_CALLS] [1, 2]"]),
    ("[TOOL_", ["[TOOL_"]),
]
BEFORE, AFTER = "<tool_call>\n<function=get_weather>\n", "</function>\n</tool_call>"
CODER_CASES = [
    (f"{BEFORE}{AFTER}", [("get_weather", "{}")]),
    (f'{BEFORE}<parameter=city>\n"a"\nb\n</parameter>\n{AFTER}', [("get_weather", '{"city": "\\"a\\"\\nb"}')]),
    (f"{BEFORE}<parameter=city>12</parameter>\n{AFTER}", [("get_weather", '{"city": "12"}')]),
    (f"{BEFORE}<parameter=days>\n3\n</parameter>\n{AFTER} ok", [("get_weather", '{"days": 3}'), "ok"]),
    (f"{BEFORE}<parameter=days>\nthree\n</parameter>\n{AFTER}", [("get_weather", '{"days": "three"}')]),
    (f"{BEFORE}<parameter=days>\nNaN\n</parameter>\n{AFTER}", [("get_weather", '{"days": "NaN"}')]),
    (f"{BEFORE}<parameter=unit>\nC\n</parameter>\n{AFTER}", [("get_weather", '{"unit": "C"}')]),
    (f"{BEFORE}<parameter=when>\n12\n</parameter>\n{AFTER}", [("get_weather", '{"when": "12"}')]),
    (f"{BEFORE}<parameter=when>\nNone\n</parameter>\n{AFTER}", [("get_weather", '{"when": null}')]),
    (f"{BEFORE}<parameter=other>\n[1]\n</parameter>\n{AFTER}", [("get_weather", '{"other": [1]}')]),
    ("<function=get_time></function>", [("get_time", "{}")]),
    (f"{BEFORE}<parameter=city>\nBo", [("get_weather", '{"city": "Bo')]),
    ("<tool_call>\n<function=unknown>\n</function>", ["<tool_call>\n<function=unknown>\n</function>"]),
    ("<tool_call>\n<function=get time>", ["<tool_call>\n<function=get time>"]),
    ("<function", ["<function"]),
]  # fmt: skip
CASES = [
    *((QWEN, text, expected) for text, expected in HERMES_CASES),
    *((LLAMA, text, expected) for text, expected in LLAMA_CASES),
    *((MISTRAL, text, expected) for text, expected in MISTRAL_CASES),
    *((CODER, text, expected) for text, expected in CODER_CASES),
]


@pytest.mark.parametrize(("tools", "text", "expected"), CASES, ids=[text for _, text, _ in CASES])
def test_replies(tools: Any, text: str, expected: list[Any]) -> None:
    options = {"known": KNOWN} if tools is CODER else {}
    assert parse(text, tools, None, **options) == expected
    assert parse(text, tools, None, pieces=list(text), **options) == expected
    thought = f"<think>\nhm\n</think>\n\n{text}"
    assert parse(thought, tools, THINK, pieces=list(thought), **options) == [("reasoning", "hm"), *expected]


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (QWEN, '<tool_call>\n{"name": "g", "arguments": {"a": 1}}\n</tool_call>\n'),
        (LLAMA, '{"name": "g", "parameters": {}}'),
        (MISTRAL, '[TOOL_CALLS]g[ARGS]{"a": 1}'),
        (MISTRAL, '[TOOL_CALLS] [{"arguments": {}, "name": "g"}]'),
    ],
)
def test_a_call_of_an_unknown_function_is_text(tools: Any, text: str) -> None:
    assert parse(text, tools, None, known=["f"]) == [text]
    assert parse(text, tools, None, known=["f", "g"])[0][0] == "g"


def test_calls_after_the_most_are_left_out_and_text_is_not() -> None:
    parser = OutputParser(QWEN, None, most_calls=1)
    assert joined(parser.feed(f"a\n{CALL}\n{CALL}\nb") + parser.flush()) == ["a", ("f", '{"a": 1}'), "b"]
    assert parser.tool_calls == 1


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm\n</think>\n\nHi", False, [("reasoning", "hm"), "Hi"]),
        ("\n<think> a\n\nb </think>Hi\n", False, [("reasoning", "a\n\nb"), "Hi\n"]),
        ("hm\n</think>\n\nHi", True, [("reasoning", "hm"), "Hi"]),
        ("<think>hm</think>Hi", True, [("reasoning", "hm"), "Hi"]),
        ("<think>\n\n</think>\n\nHi", False, ["Hi"]),
        ("</think>Hi", True, ["Hi"]),
        ("hm, </thi", True, [("reasoning", "hm, </thi")]),
        ("<think>hm", False, [("reasoning", "hm")]),
        ("  Hi <think>no</think>", False, ["  Hi <think>no</think>"]),
        ("<thin", False, ["<thin"]),
        ("  \n", False, ["  \n"]),
        ("", True, []),
    ],
)
def test_reasoning(text: str, is_open: bool, expected: list[Any]) -> None:
    for tools in (None, QWEN):
        assert parse(text, tools, THINK, reasoning_open=is_open) == expected
        assert parse(text, tools, THINK, reasoning_open=is_open, pieces=list(text)) == expected


def test_without_formats_text_is_passed_on_as_it_comes() -> None:
    parser = OutputParser(None, None)
    assert parser.feed(" <think>\n") == [TextDelta(" <think>\n")]
    assert parser.feed("") == []
    assert parser.flush() == []


# Streaming.


def test_only_what_could_become_a_marker_is_held_back() -> None:
    parser = OutputParser(QWEN, None)
    for character, events in feed_each(parser, "1<2,<b>,<tool>"):
        if character not in "<tool":
            assert events, f"{character} was held back"


def test_a_name_is_sent_when_it_is_complete_and_arguments_as_they_come() -> None:
    parser = OutputParser(QWEN, None)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.feed("{") == [ToolCallBegin(0, "f"), ToolCallArguments(0, "{")]
    for piece in ('"city', '": "B', "on", 'n"', "}"):
        assert parser.feed(piece) == [ToolCallArguments(0, piece)]
    assert parser.feed("}\n</tool_call>") == []
    assert parser.flush() == []


def test_strings_in_tags_are_sent_as_they_come() -> None:
    parser = OutputParser(CODER, None, known=KNOWN)
    parser.feed(f"{BEFORE}<parameter=city>\n")
    assert parser.feed('a "b"') == [ToolCallArguments(0, 'a \\"b\\"')]


PIECES = [
    "<tool_call>", "</tool_call>", "<tool", "{", "}", '"name": "f"', '"arguments": ', '"parameters": ', ", ", '"', "\\",
    ": ", "[", "]", "1", "true", "\n", " ", "text", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", ";",
    "<|python_tag|>", '{"name": "f", "arguments": {"a": 1}}', "<function=f>", "<parameter=a>", "</parameter>",
    "</function>", "é", "😀", CALL,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=15).map("".join)


@settings(max_examples=400, deadline=None)
@given(
    tools=st.sampled_from([None, QWEN, LLAMA, MISTRAL, CODER]),
    reasoning=st.sampled_from([None, THINK]),
    is_open=st.booleans(),
    most=st.sampled_from([None, 1]),
    known=st.sampled_from([(), ["g"], {"f": {"properties": {"a": {"type": "string"}}}}]),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
@example(QWEN, THINK, True, None, (), f"hm</think>\n\nok\n{CALL}\n{CALL} x", [])
def test_events_do_not_depend_on_how_the_text_is_cut(
    tools: Any, reasoning: Any, is_open: bool, most: int | None, known: Any, text: str, cuts: list[int]
) -> None:
    options = {"reasoning_open": is_open, "most_calls": most, "known": known}
    whole = parse(text, tools, reasoning, **options)
    assert parse(text, tools, reasoning, pieces=list(text), **options) == whole
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    assert parse(text, tools, reasoning, pieces=pieces, **options) == whole


@settings(max_examples=200, deadline=None)
@given(tools=st.sampled_from([QWEN, LLAMA, MISTRAL, CODER]), text=TEXTS)
def test_text_without_calls_is_never_lost(tools: Any, text: str) -> None:
    assert "".join(parse(text, tools, None, known=["unknown"])) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    template=st.sampled_from(["qwen3", "llama4", "mistral_args", "mistral_nemo"]),
    arguments=st.dictionaries(st.text(), JSON, max_size=4),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
def test_arguments_are_exactly_the_text_that_the_model_wrote(
    template: str, arguments: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    marker = "arguments" if template in ("qwen3", "mistral_nemo") else "parameters"
    written = json.dumps(arguments, indent=indent, ensure_ascii=ascii_only)
    body = f'{{"name": "f", "{marker}": {written}}}'
    text = {
        "qwen3": f"<tool_call>\n{body}\n</tool_call>",
        "llama4": body,
        "mistral_nemo": f"[TOOL_CALLS] [{body}]",
        "mistral_args": f"[TOOL_CALLS]f[ARGS]{written}",
    }[template]
    assert parse(text, FORMATS[template], None, pieces=list(text)) == [("f", written)]


LONG_TEXTS = {
    "text": lambda n: "word <b> " * n,
    "white space": lambda n: "\n" * (8 * n),
    "arguments": lambda n: '<tool_call>{"name": "f", "arguments": {"a": "' + "x\\n <tool" * n + '"}}</tool_call>',
    "arguments before the name": lambda n: '<tool_call>{"arguments": {"a": "' + "x\\n <tool" * n + '"}, "name": "f"}',
    "no call": lambda n: '<tool_call>{"id": "' + "<tool_call>{" * n,
    "markers": lambda n: "<tool_call>" * n,
    "nesting": lambda n: '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * (8 * n),
    "reasoning": lambda n: "<think>" + "hm <b>\n\n" * n,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_time_is_linear_in_the_length_of_the_text(kind: str) -> None:
    def seconds(size: int) -> float:
        text = LONG_TEXTS[kind](size)
        pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
        start = time.process_time()
        parse(text, QWEN, THINK, pieces=pieces)
        parse(text, QWEN, THINK)
        return time.process_time() - start

    small = min(seconds(2_000) for _ in range(3))
    large = min(seconds(16_000) for _ in range(2))
    assert large < 30 * small, f"{small:.3f} s for the small text, {large:.3f} s for one eight times as long"
