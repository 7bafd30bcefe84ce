"""Grammars for tool calls: whatever is sampled under one is read as valid calls.

The tokenizers are one with a token per byte, and a BPE tokenizer whose tokens span the borders of a call's parts. The
oracle for arguments is jsonschema.
"""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import product
from typing import Any

import jsonschema
import pytest
from chat_templates import TEMPLATES
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from stub_completions import byte_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lora_serve.api.chat_output import (
    OutputParser,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCallArguments,
    ToolCallBegin,
    ToolFormat,
    answer_grammar,
    detect_reasoning_format,
    detect_tool_format,
    special_token_ids,
    tool_grammar,
)

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["°C", "°F"]},
            "place": {"$ref": "#/$defs/place"},
        },
        "required": ["city", "days", "unit"],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "tags": {"type": "array", "items": {"type": "boolean"}}},
                "required": ["lat"],
                "additionalProperties": False,
            }
        },
    },
    strict=True,
)
CLOCK = Tool("get-time", None)
NOTE = Tool("note", {"type": "object", "properties": {"text": {"type": "string"}}})
TOOLS = [WEATHER, CLOCK, NOTE]
KNOWN = {tool.name: tool.parameters or {} for tool in TOOLS}
NO_ARGUMENTS = {"type": "object", "maxProperties": 0}
ENDINGS = ('"', "}", "]", "</think>", "[/THINK]", "\n</parameter>\n", "0", "e")
FREE_TOKENS = 25  # sampled at random; then an end is looked for
MOST_TOKENS = 2_000
NAMES = ["qwen3", "llama3", "qwen_coder", "mistral_nemo", "mistral_small_3_2", "mistral_args"]
MARKERS = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]",
    "<|python_tag|>",
)  # fmt: skip


@cache
def tokenizer(kind: str, special: bool) -> tuple[PreTrainedTokenizerFast, LLTokenizer]:
    made = byte_tokenizer()
    if kind == "bpe":
        samples = [
            json.dumps({"name": "get_weather", "arguments": {"a": [1, {}]}}),
            "}}\n</tool_call>",
            "\n<parameter=",
        ]
        made = made.train_new_from_iterator(samples * 20, 400)
    if special:
        made.add_tokens([AddedToken(marker, special=marker[0] == "[") for marker in MARKERS])
    return made, from_tokenizer(made)


class Sampler:
    """Samples tokens that a grammar allows."""

    def __init__(self, kind: str, special: bool, grammar: str, seed: int) -> None:
        self.tokenizer, llguidance = tokenizer(kind, special)
        self.matcher = LLMatcher(llguidance, grammar, log_level=0)
        assert not self.matcher.is_error(), self.matcher.get_error()
        self.random = random.Random(seed)
        self.tokens: list[int] = []

    def consume(self, tokens: list[int]) -> None:
        assert self.matcher.consume_tokens(tokens), self.matcher.get_error()
        self.tokens += tokens

    def write(self, text: str) -> None:
        """Consume a text, which the grammar has to allow."""
        self.consume(self.encode(text))

    def allows(self, tokens: list[int]) -> bool:
        allowed: int = self.matcher.validate_tokens(tokens)
        return allowed == len(tokens)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def sample(self) -> str:
        """Sample until the grammar ends; the text."""
        count = 0
        while not self.matcher.is_stopped():
            assert count < MOST_TOKENS, f"no end is found: {self.text()[-200:]}"
            if count > FREE_TOKENS and self.matcher.is_accepting() and self.random.random() < 0.5:
                break
            self._sample_one(look_for_end=count > FREE_TOKENS and self.random.random() < 0.7)
            count += 1
        assert self.matcher.is_accepting()
        return self.text()

    def _sample_one(self, *, look_for_end: bool) -> None:
        endings = [ids for text in ENDINGS if self.allows(ids := self.encode(text))] if look_for_end else []
        if endings:
            return self.consume(self.random.choice(endings))
        bias = self.matcher.compute_logit_bias()
        allowed = [token for token in range(len(self.tokenizer)) if bias[token] and not self._is_end(token)]
        specials = [token for token in allowed if self.tokenizer.decode([token]) in MARKERS]
        if specials and self.random.random() < 0.3:
            allowed = specials
        return self.consume([self.random.choice(allowed)]) if allowed else None

    def _is_end(self, token: int) -> bool:
        return token == self.tokenizer.eos_token_id and not self.matcher.is_accepting()

    def text(self) -> str:
        tokens = [token for token in self.tokens if token != self.tokenizer.eos_token_id]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def grammar(name: str, choice: Any, kind: str, special: bool, **options: Any) -> str:
    found = detect_tool_format(TEMPLATES[name])
    assert isinstance(found, ToolFormat)
    ids = special_token_ids(tokenizer(kind, special)[0])
    return tool_grammar(found, TOOLS, choice, special_tokens=ids, **options)


def read(name: str, text: str, **options: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """Text, reasoning and calls of a reply; arguments have to be JSON objects."""
    reasoning = detect_reasoning_format(TEMPLATES[name])
    parser = OutputParser(detect_tool_format(TEMPLATES[name]), reasoning, known=KNOWN, **options)
    events = parser.feed(text) + parser.flush()
    calls = [event.name for event in events if isinstance(event, ToolCallBegin)]
    arguments = [
        "".join(e.text for e in events if isinstance(e, ToolCallArguments) and e.index == index)
        for index in range(len(calls))
    ]
    return (
        "".join(event.text for event in events if isinstance(event, TextDelta)),
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        [(called, json.loads(text)) for called, text in zip(calls, arguments, strict=True)],
    )


def check(calls: list[tuple[str, Any]]) -> None:
    """Assert that arguments are valid."""
    schemas = {tool.name: tool.parameters or NO_ARGUMENTS for tool in TOOLS}
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas[name])


CASES = list(product(NAMES, ["bytes", "bpe"], [False, True]))


@pytest.mark.parametrize(("name", "kind", "special"), CASES)
def test_required_replies_are_valid_calls(name: str, kind: str, special: bool) -> None:
    made = grammar(name, "required", kind, special)
    for seed in range(8):
        text, _, calls = read(name, Sampler(kind, special, made, seed).sample())
        assert text == ""
        assert calls
        check(calls)


@pytest.mark.parametrize("name", NAMES)
def test_parallel_calls_are_possible(name: str) -> None:
    made = grammar(name, "required", "bpe", True)
    replies = (Sampler("bpe", True, made, seed).sample() for seed in range(60))
    assert any(len(read(name, text)[2]) > 1 for text in replies)


@pytest.mark.parametrize(("name", "kind", "special"), CASES)
def test_a_named_function_is_called_once(name: str, kind: str, special: bool) -> None:
    made = grammar(name, WEATHER, kind, special)
    for seed in range(4):
        text, _, calls = read(name, Sampler(kind, special, made, seed).sample())
        assert (text, [called for called, _ in calls]) == ("", ["get_weather"])
        check(calls)


@pytest.mark.parametrize(("name", "special"), list(product(NAMES, [False, True])))
def test_without_parallel_calls_there_is_one(name: str, special: bool) -> None:
    made = grammar(name, "required", "bytes", special, parallel=False)
    for seed in range(4):
        assert len(read(name, Sampler("bytes", special, made, seed).sample())[2]) == 1


@pytest.mark.parametrize(("name", "special"), list(product(["qwen3", "mistral_args"], [False, True])))
@pytest.mark.parametrize("is_open", [False, True])
def test_reasoning_may_come_before_required_calls(name: str, special: bool, is_open: bool) -> None:
    reasoning = detect_reasoning_format(TEMPLATES[name])
    assert reasoning is not None
    made = grammar(name, "required", "bytes", special, reasoning=reasoning, reasoning_open=is_open)
    for seed in range(4):
        sampler = Sampler("bytes", special, made, seed)
        sampler.write(f"hm {'{}'}" if is_open else f"{reasoning.begin}\nhm {'{}'}")
        assert not sampler.matcher.is_accepting()
        sampler.write(f"\n{reasoning.end}\n\n")
        text, thought, calls = read(name, sampler.sample(), reasoning_open=is_open)
        assert (text, thought) == ("", "hm {}")
        assert calls
        check(calls)
    if not is_open:
        assert read(name, Sampler("bytes", special, made, 0).sample())[2]


BEGINS = {
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": {',
    "llama3": '{"name": "get_weather", "parameters": {',
    "qwen_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\n",
    "mistral_nemo": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {',
    "mistral_args": "[TOOL_CALLS]get_weather[ARGS]{",
}


@pytest.mark.parametrize(("name", "special"), list(product(BEGINS, [False, True])))
def test_auto_replies_may_be_text_and_calls_of_strict_functions_are_valid(name: str, special: bool) -> None:
    made = grammar(name, "auto", "bytes", special)
    plain = Sampler("bytes", special, made, 0)
    plain.write("It is {sunny}.")
    assert plain.matcher.is_accepting()
    for seed in range(6):
        sampler = Sampler("bytes", special, made, seed)
        if name != "llama3":
            sampler.write("Let me look.\n")
        sampler.write(BEGINS[name])
        assert not sampler.matcher.is_accepting()
        calls = read(name, sampler.sample())[2]
        assert calls[0][0] == "get_weather"
        jsonschema.validate(calls[0][1], WEATHER.parameters)


ANSWER_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ANSWERS = {
    "json": LLMatcher.grammar_from_json_schema(ANSWER_SCHEMA | {"additionalProperties": False}),
    "regex": LLMatcher.grammar_from_regex("[0-9]{2}"),
    "lark": 'start: "yes" | no\nno: "no"',
}


@pytest.mark.parametrize(("name", "special"), list(product(BEGINS, [False, True])))
def test_a_reply_is_either_calls_or_an_answer_in_the_form_asked_for(name: str, special: bool) -> None:
    made = grammar(name, "auto", "bytes", special, answer=ANSWERS["json"])
    answer = Sampler("bytes", special, made, 0)
    answer.write('{"n": 12}')
    assert answer.matcher.is_accepting()
    assert not Sampler("bytes", special, made, 0).allows(answer.encode("It is"))
    calling = Sampler("bytes", special, made, 1)
    calling.write(f"<|python_tag|>{BEGINS[name]}" if name == "llama3" else BEGINS[name])
    check(read(name, calling.sample())[2])


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("is_open", [False, True])
def test_reasoning_may_come_before_an_answer(kind: str, special: bool, is_open: bool) -> None:
    reasoning = detect_reasoning_format(TEMPLATES["qwen3"])
    assert reasoning is not None
    ids = special_token_ids(tokenizer("bytes", special)[0])
    options: Any = {"reasoning": reasoning, "reasoning_open": is_open, "special_tokens": ids}
    made = answer_grammar(ANSWERS[kind], **options)
    right = {"json": '{"n": 1}', "regex": "42", "lark": "no"}[kind]
    sampler = Sampler("bytes", special, made, 0)
    sampler.write(f"hm</think>\n\n{right}" if is_open else f"<think>hm</think>\n\n{right}")
    assert sampler.matcher.is_accepting()
    if not is_open:
        sampler = Sampler("bytes", special, made, 0)
        sampler.write(right)
        assert sampler.matcher.is_accepting()
        assert not Sampler("bytes", special, made, 0).allows(sampler.encode("maybe"))


def test_without_reasoning_an_answer_s_grammar_stays_as_it_is() -> None:
    assert answer_grammar(ANSWERS["json"]) == ANSWERS["json"]


@pytest.mark.parametrize(("name", "special"), list(product(BEGINS, [False, True])))
def test_auto_calls_are_of_the_functions_given(name: str, special: bool) -> None:
    begin = BEGINS[name].partition("get_weather")[0]
    for choice in ("auto", "required"):
        sampler = Sampler("bytes", special, grammar(name, choice, "bytes", special), 0)
        sampler.write(begin)
        assert sampler.allows(sampler.encode("note"))
        assert not sampler.allows(sampler.encode("delete"))


def test_what_a_schema_asks_for_and_llguidance_cannot_hold_is_an_error_only_if_strict() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "x", "format": "made-up"}}}
    found = detect_tool_format(TEMPLATES["qwen3"])
    assert found is not None
    for strict in (False, True):
        made = tool_grammar(found, [Tool("f", schema, strict)], "required")
        matcher = LLMatcher(tokenizer("bytes", False)[1], made, log_level=0)
        assert matcher.is_error() is strict


@pytest.mark.parametrize(
    "schema", [{}, {"type": ["object", "null"]}, {"type": "string"}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}]
)
def test_arguments_are_an_object_whatever_the_schema_allows(schema: dict[str, Any]) -> None:
    found = detect_tool_format(TEMPLATES["mistral_args"])
    assert found is not None
    sampler = Sampler("bytes", False, tool_grammar(found, [Tool("f", schema)], "required"), 0)
    sampler.write("[TOOL_CALLS]f[ARGS]")
    assert not sampler.allows(sampler.encode("n"))
    assert not sampler.allows(sampler.encode('"'))
    assert sampler.allows(sampler.encode("{"))


def test_a_function_s_schema_may_not_change_how_json_is_written() -> None:
    schema = {"type": "object", "properties": {}, "x-guidance": {"whitespace_flexible": True}}
    found = detect_tool_format(TEMPLATES["qwen3"])
    assert found is not None
    made = tool_grammar(found, [Tool("f", schema)], "required")
    sampler = Sampler("bytes", False, made, 0)
    sampler.write('<tool_call>\n{"name": "f", "arguments": {')
    assert not sampler.allows(sampler.encode("\n\n\n\n"))


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "%json {}", "<tool_call>", "ü"])
def test_names_are_quoted(name: str) -> None:
    found = detect_tool_format(TEMPLATES["qwen3"])
    assert found is not None
    made = tool_grammar(found, [Tool(name)], "required")
    parser = OutputParser(found, None, known=[name])
    assert ToolCallBegin(0, name) in parser.feed(Sampler("bytes", False, made, 0).sample())


def test_special_tokens_are_those_that_llguidance_takes_for_special() -> None:
    made, llguidance = tokenizer("bytes", True)
    ids = special_token_ids(made)
    assert ids.keys() >= set(MARKERS)
    assert all(llguidance.is_special_token(index) for index in ids.values())
    others = [i for i in range(len(made)) if llguidance.is_special_token(i) and i not in ids.values()]
    assert others == [0xFF]  # no UTF-8; llguidance marks special tokens with it
