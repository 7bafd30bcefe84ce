"""From pieces of a reply to Anthropic's content blocks: streamed and whole, they are the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_serve.api.anthropic.message_content import ContentStream, content_blocks
from lora_serve.api.chat_output import OutputEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin

REPLIES: list[list[OutputEvent]] = [
    [],
    [TextDelta("Ulm"), TextDelta(".")],
    [ReasoningDelta("h"), ReasoningDelta("m"), TextDelta("Ulm.")],
    [TextDelta("Wait."), ToolCallBegin(0, "now"), TextDelta("Then.")],
    [
        ToolCallBegin(0, "weather"),
        ToolCallArguments(0, '{"city": '),
        ToolCallArguments(0, '"Ulm"}'),
        ToolCallBegin(1, "weather"),
        ToolCallArguments(1, '{"city": "Bern"}'),
    ],
    [ReasoningDelta("hm"), TextDelta("a"), ReasoningDelta("hm"), ToolCallBegin(0, "now"), ToolCallBegin(1, "now")],
]


def streamed(reply: list[OutputEvent], **options: bool) -> list[dict[str, Any]]:
    stream = ContentStream(**options)
    return [event for piece in reply for event in stream.write(piece)] + stream.end()


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream; asserts that each is started, continued and stopped, one after the other."""
    blocks: list[dict[str, Any]] = []
    running = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not running
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"]})
            running = True
            continue
        assert running
        assert event["index"] == len(blocks) - 1
        match event:
            case {"type": "content_block_stop"}:
                running = False
            case {"delta": {"type": "text_delta", "text": text}}:
                blocks[-1]["text"] += text
            case {"delta": {"type": "thinking_delta", "thinking": text}}:
                blocks[-1]["thinking"] += text
            case {"delta": {"type": "signature_delta", "signature": text}}:
                blocks[-1]["signature"] = text
            case {"delta": {"type": "input_json_delta", "partial_json": text}}:
                blocks[-1]["input"] = (blocks[-1]["input"] or "") + text
            case _:
                raise AssertionError(event)
    assert not running
    for block in blocks:
        if block["type"] == "tool_use" and block["input"]:
            block["input"] = json.loads(block["input"])
    return blocks


@pytest.mark.parametrize("show_thinking", [True, False])
@pytest.mark.parametrize("reply", REPLIES)
def test_a_stream_and_a_whole_reply_have_the_same_blocks(reply: list[OutputEvent], show_thinking: bool) -> None:
    whole = content_blocks(reply, show_thinking)
    stream = put_together(streamed(reply, show_thinking=show_thinking))
    ids = [block.pop("id") for block in (*whole, *stream) if block["type"] == "tool_use"]
    assert stream == whole
    assert len(set(ids)) == len(ids)
    assert all(id_.startswith("toolu_") for id_ in ids)


def test_blocks_follow_the_order_of_the_reply() -> None:
    assert [block["type"] for block in content_blocks(REPLIES[3])] == ["text", "tool_use", "text"]
    assert [block["input"] for block in content_blocks(REPLIES[4])] == [{"city": "Ulm"}, {"city": "Bern"}]


def test_omitted_thinking_leaves_an_empty_block() -> None:
    reply = [ReasoningDelta("secret"), TextDelta("Ulm.")]
    assert content_blocks(reply, show_thinking=False)[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert "secret" not in json.dumps(streamed(reply, show_thinking=False))


@pytest.mark.parametrize(
    "arguments", ['{"city": "U', "[1]", "null", "NaN", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 10_000, "{}{}"]
)
def test_arguments_that_are_no_json_object_are_kept_as_text(arguments: str) -> None:
    (block,) = content_blocks([ToolCallBegin(0, "f"), ToolCallArguments(0, arguments)])
    assert block["input"] == {"INVALID_JSON": arguments}


def test_a_call_without_arguments_has_an_empty_input() -> None:
    assert content_blocks([ToolCallBegin(0, "now")])[0]["input"] == {}
