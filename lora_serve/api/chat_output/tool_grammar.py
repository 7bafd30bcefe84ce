"""Grammars for `tool_choice`: a reply that has to call functions, or whose calls have to be valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llguidance import LLMatcher

from lora_serve.api.chat_output.lark import CallRules, Tool
from lora_serve.api.chat_output.reasoning import ReasoningFormat
from lora_serve.api.chat_output.tool_format import ToolFormat


def tool_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    choice: Literal["auto", "required"] | Tool,
    *,
    parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    reasoning_open: bool = False,
    special_tokens: Mapping[str, int] | None = None,
) -> str:
    """An llguidance grammar for replies with tool calls, as `LLMatcher.grammar_from_lark` returns it.

    Args:
        tools: functions that may be called; at least one.
        choice: "required": one or more calls, with arguments that are valid for the functions' schemas. A tool: one
            call of it. "auto": text, and calls of these functions; arguments of strict ones are valid.
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
        required=named or choice == "required",
        parallel=parallel and not named,
    )
    lark = tool_format.grammar(rules)
    if reasoning is None:
        lark = f"start: calls\n{lark}"
    else:
        lark = f"{_reasoning_rules(reasoning, rules, is_open=reasoning_open)}\n{lark}"
    return LLMatcher.grammar_from_lark(lark)


def _reasoning_rules(reasoning: ReasoningFormat, rules: CallRules, *, is_open: bool) -> str:
    """Rule `start`: the reasoning, which may be missing if it has not begun yet, and `calls`.

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
        return f"start: reasoning calls\n{rest}"
    if not rules.required and not end:
        return "start: calls"
    return f"start: ({begin} reasoning)? calls\n{rest}"


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that llguidance takes for special ones, by text: those, and added ones in angle brackets."""
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }
