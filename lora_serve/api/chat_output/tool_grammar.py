"""Grammars of replies: calls that must come or must be valid, an answer in a given form, and reasoning before them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llguidance import LLMatcher

from lora_serve.api.chat_output.lark import CallRules, Tool
from lora_serve.api.chat_output.reasoning import ReasoningFormat
from lora_serve.api.chat_output.tool_format import ToolFormat

ANSWER = "@answer"  # how Lark rules refer to the answer's grammar


def tool_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    choice: Literal["auto", "required"] | Tool,
    *,
    answer: str | None = None,
    parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    reasoning_open: bool = False,
    special_tokens: Mapping[str, int] | None = None,
) -> str:
    """An llguidance grammar for replies with tool calls.

    Args:
        tools: functions that may be called; at least one.
        choice: "required": one or more calls, with arguments that are valid for the functions' schemas. A tool: one
            call of it. "auto": text, and calls of these functions; arguments of strict ones are valid.
        answer: grammar of the text instead of calls, for "auto"; None is any text, also between calls.
        parallel: there may be several calls.
        reasoning: tags between which the model may reason first.
        reasoning_open: the prompt ends with the opening tag, so that the reply begins inside the reasoning.
        special_tokens: ids of the vocabulary's special tokens (`special_token_ids`).

    A schema that llguidance can't hold is an error when the grammar is compiled if the function is strict; otherwise
    the keywords in question are ignored.
    """
    named = isinstance(choice, Tool)
    rules = CallRules(
        tools=[choice] if isinstance(choice, Tool) else tools,
        special_tokens=special_tokens or {},
        required=named or choice == "required" or answer is not None,
        parallel=parallel and not named,
        announced=answer is not None and choice == "auto",
    )
    lark = tool_format.grammar(rules)
    if choice == "auto" and answer is not None:
        return _with_answer(_reply(f"(calls | {ANSWER})", rules, reasoning, is_open=reasoning_open) + lark, answer)
    return LLMatcher.grammar_from_lark(_reply("calls", rules, reasoning, is_open=reasoning_open) + lark)


def answer_grammar(
    answer: str,
    *,
    reasoning: ReasoningFormat | None = None,
    reasoning_open: bool = False,
    special_tokens: Mapping[str, int] | None = None,
) -> str:
    """An llguidance grammar for replies whose text, after the reasoning, follows the grammar `answer`."""
    if reasoning is None:
        return answer
    rules = CallRules([], special_tokens or {}, required=True, parallel=False)
    return _with_answer(_reply(ANSWER, rules, reasoning, is_open=reasoning_open), answer)


def _with_answer(lark: str, answer: str) -> str:
    """A grammar whose Lark rules refer to another grammar, in Lark or llguidance's JSON, as `ANSWER`."""
    grammars = json.loads(answer)["grammars"] if answer.lstrip().startswith("{") else [{"lark_grammar": answer}]
    named = [{**grammars[0], "name": ANSWER.removeprefix("@")}, *grammars[1:]]
    return json.dumps({"grammars": [{"lark_grammar": lark}, *named]})


def _reply(reply: str, rules: CallRules, reasoning: ReasoningFormat | None, *, is_open: bool) -> str:
    """Rule `start`: a reply, given as Lark, with the reasoning before it."""
    if reasoning is None:
        return f"start: {reply}\n"
    return _reasoning_rules(reply, reasoning, rules, is_open=is_open) + "\n"


def _reasoning_rules(reply: str, reasoning: ReasoningFormat, rules: CallRules, *, is_open: bool) -> str:
    """Rule `start`: the reasoning, which may be missing if it has not begun yet, and the reply.

    For "auto", reasoning between tags that are no special tokens is text like any other.
    """
    begin, end = rules.special(reasoning.begin), rules.special(reasoning.end)
    space = "REASONING_SPACE?" if rules.required else ""  # "auto" may begin with any text
    if begin and end:
        body = f"REASONING? {end} {space}"
    else:
        begin, body = rules.marker(reasoning.begin), f"reasoning_end {space}"
    rest = f"reasoning: {body}\nREASONING: /(.|\\n)+/\nREASONING_SPACE: /[ \\n]{{1,4}}/\n"
    if not end:
        rest += f"reasoning_end[lazy]: REASONING? {rules.marker(reasoning.end)}\n"
    if is_open:
        return f"start: reasoning {reply}\n{rest}"
    if not rules.required and not end:
        return f"start: {reply}"
    return f"start: ({begin} reasoning)? {reply}\n{rest}"


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that llguidance takes for special ones, by text: those, and added ones in angle brackets."""
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }
