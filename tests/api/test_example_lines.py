"""Training data is checked line by line: what is an example, what is told of mistakes, and how much work they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_serve.api.fine_tuning import example_lines
from lora_serve.api.fine_tuning.example_lines import (
    LONGEST_LINE,
    MOST_INVALID,
    MOST_TOLD,
    CheckedLines,
    InvalidExamples,
    LineChecker,
    read_examples,
)
from lora_serve.api.fine_tuning.example_schemas import ChatExample, CompletionExample

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
COMPLETION = b'{"prompt": "a", "completion": "b"}'


def check(content: bytes, piece: int = 1 << 18) -> CheckedLines:
    checker = LineChecker()
    for start in range(0, len(content), piece):
        checker.feed(content[start : start + piece])
    return checker.finish()


def mistake(line: bytes | dict[str, Any]) -> tuple[str, str | None]:
    """What is told of one invalid line."""
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    (found,) = check(content).mistakes
    return found.message, found.param


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def preference(**changed: Any) -> dict[str, Any]:
    whole = {
        "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [{"role": "assistant", "content": "go away"}],
    }
    return whole | changed


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (chat(USER, ASSISTANT), "chat"),
        (chat(USER | {"name": "ann"}, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}), "chat"),
        (chat({"role": "developer", "content": [{"type": "text", "text": "x"}]}, USER, ASSISTANT), "chat"),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tools=[TOOL]), "chat"),
        (chat(USER, {"role": "assistant", "function_call": CALL["function"]}, functions=[TOOL["function"]]), "chat"),
        (chat(USER, ASSISTANT, parallel_tool_calls=False, tools=[TOOL]), "chat"),
        ({"prompt": "", "completion": "b"}, "completion"),
        (preference(), "preference"),
    ],
)
def test_the_formats_of_openai_are_accepted(line: dict[str, Any], kind: str) -> None:
    checked = check(json.dumps(line).encode())
    checked.raise_if_invalid()
    assert (checked.kind, checked.examples) == (kind, 1)


@pytest.mark.parametrize(
    ("line", "message", "param"),
    [
        (chat(USER), "last one must be of the assistant", None),
        (chat(USER, ASSISTANT | {"weight": 0}), "no assistant message has weight 1", None),
        (chat(USER, ASSISTANT | {"weight": 2}), "less than or equal to 1", "messages.1.weight"),
        (chat(USER, ASSISTANT | {"weight": True}), "valid integer", "messages.1.weight"),
        (chat(USER | {"weight": 1}, ASSISTANT), "only an assistant message has a weight", "messages.0"),
        (chat(USER, {"role": "assistant"}), "needs content or tool_calls", "messages.1"),
        (chat({"role": "boss", "content": "x"}, ASSISTANT), "Input should be 'system'", "messages.0.role"),
        (chat(USER, ASSISTANT | {"mood": "x"}), "unknown parameter: messages.1.mood", "messages.1.mood"),
        (chat(USER, ASSISTANT, extra=1), "unknown parameter: extra", "extra"),
        (chat(USER, ASSISTANT, tools=[TOOL], functions=[TOOL["function"]]), "functions", None),
        (chat(), "at least 1 item", "messages"),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
            "does not support image input",
            "messages.0.content.0",
        ),
        (
            chat(USER, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "a", "arguments": "[1"}}]}),
            "arguments of a call must be the text of a JSON object",
            "messages.1",
        ),
        ({"prompt": "a"}, "missing parameter: completion", "completion"),
        ({"prompt": "a", "completion": ""}, "at least 1 character", "completion"),
        ({"prompt": ["a"], "completion": "b"}, "valid string", "prompt"),
        (preference(preferred_output=[ASSISTANT, ASSISTANT]), "at most 1 item", "preferred_output"),
        (preference(preferred_output=[USER]), "preferred_output: the message must be of the assistant", None),
        (preference(non_preferred_output=[ASSISTANT]), "are the same", None),
        (preference(input={"messages": [USER, ASSISTANT]}), "must not be of the assistant", "input"),
        ({"text": "x"}, "must have messages, or prompt and completion, or input", None),
        (b'[{"messages": []}]', "every line must be a JSON object of its own", None),
        (b'{"prompt": "a", "completion": NaN}', "not valid JSON", None),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "Detected duplicate key", None),
        (b'{"prompt": "\xff", "completion": "c"}', "not valid JSON: invalid unicode code point at byte", None),
        (b'{"prompt": "\\ud83d", "completion": "c"}', "not valid JSON", None),
        (b'{"prompt": ' + b"[" * 50_000, "not valid JSON: recursion limit exceeded", None),
        (b'{"prompt": "a", "completion": "b"} {}', "not valid JSON: trailing characters at byte", None),
        (b"\xff\xfe{\x00}\x00", "UTF-16", None),
        (b'{"tools": [' + b"{}," * 200_000 + b"{}]}", "more than 100,000 fields", None),
    ],
)
def test_a_mistake_names_the_field(line: dict[str, Any] | bytes, message: str, param: str | None) -> None:
    told, field = mistake(line)
    assert message in told
    assert field == param


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
def test_marks_line_ends_and_blank_lines_of_all_editors_are_accepted_and_count_as_lines(piece: int) -> None:
    content = b"\xef\xbb\xbf" + COMPLETION + b"\r\n\r\n  \n" + COMPLETION + b"\nbad\n\n" + COMPLETION
    checked = check(content, piece)
    assert (checked.examples, checked.lines, checked.invalid) == (3, 7, 1)
    assert [each.line for each in checked.mistakes] == [5]


def test_a_file_has_examples_of_one_kind() -> None:
    checked = check(COMPLETION + b"\n" + json.dumps(chat(USER, ASSISTANT)).encode())
    assert checked.mistakes[0][:2] == (2, "the line is a chat example, and those before it are completion examples")


def test_the_first_mistakes_are_told_and_the_others_counted() -> None:
    checked = check(b"\n".join([COMPLETION, *[b"bad"] * 37]))
    with pytest.raises(InvalidExamples) as refused:
        checked.raise_if_invalid()
    message = refused.value.message
    assert message.startswith("no valid training data in 37 of the 38 lines read: line 2: the line is not valid JSON")
    assert message.endswith(f"; and {37 - MOST_TOLD} more")
    assert message.count("line ") == 2 * MOST_TOLD
    assert refused.value.param == "file"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidExamples, match="no examples"):
        check(content).raise_if_invalid()


def test_a_huge_line_is_not_kept_and_the_next_one_is_read() -> None:
    checker = LineChecker()
    for _ in range(3 * (LONGEST_LINE >> 18)):
        checker.feed(b"x" * (1 << 18))
        assert len(checker._line) <= LONGEST_LINE + 3
    checker.feed(b"\n" + COMPLETION + b"\n")
    checked = checker.finish()
    assert (checked.examples, checked.invalid, checked.lines) == (1, 1, 2)
    assert "has more than 4,194,304 bytes" in checked.mistakes[0].message


def test_a_file_of_nothing_but_mistakes_or_lines_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidExamples, match=f"in {MOST_INVALID:,} of the {MOST_INVALID:,} lines read"):
        check(b"bad\n" * (2 * MOST_INVALID))
    monkeypatch.setattr(example_lines, "MOST_LINES", 1000)
    check(b"\n" * 999)
    with pytest.raises(InvalidExamples, match="more than 1,000 lines"):
        check(b"\n" * 1001)


def test_a_checked_file_is_read_again_with_its_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"\xef\xbb\xbf" + COMPLETION + b"\r\n\n" + json.dumps(chat(USER, ASSISTANT)).encode() + b"\n")
    (first, one), (second, two) = read_examples(file)
    assert (first, second) == (1, 3)
    assert isinstance(one, CompletionExample)
    assert isinstance(two, ChatExample)
    file.write_bytes(COMPLETION + b"\nbad")
    with pytest.raises(InvalidExamples, match=r"^line 2: "):
        list(read_examples(file))
