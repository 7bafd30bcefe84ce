"""Pieces of llguidance grammars, in its Lark dialect, from which each format builds its rule for tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# As chat templates write JSON, so that models see what they were trained on; and no endless white space.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    `parameters` is a JSON schema of the arguments object; None: there are no arguments.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True)
class CallRules:
    """What a grammar has to hold, and pieces of Lark for it.

    Args:
        special_tokens: ids of the vocabulary's special tokens, by text; a marker that is none is a string.
        required: the reply consists of calls; otherwise there may be text, and arguments have to be valid for the
            schema if the function is strict.
        parallel: there may be several calls.
        announced: calls begin with a marker, even where the format does not insist on it: something else may begin as
            they do.
    """

    tools: Sequence[Tool]
    special_tokens: Mapping[str, int]
    required: bool
    parallel: bool
    announced: bool = False

    def special(self, text: str) -> str:
        """A marker as a special token; empty if it is none."""
        return f"<[{self.special_tokens[text]}]>" if text in self.special_tokens else ""

    def marker(self, text: str) -> str:
        """A marker, as a special token or a string."""
        return self.special(text) or literal(text)

    def schema(self, tool: Tool) -> Mapping[str, Any]:
        """JSON schema that the arguments of a call have to be valid for."""
        if tool.parameters is None:
            return NO_PARAMETERS
        return dict(tool.parameters) | ANY_OBJECT if self.required or tool.strict else ANY_OBJECT

    def json(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """A value that is valid for a JSON schema; keywords that llguidance can't hold are left out unless strict."""
        style = JSON_STYLE if strict else JSON_STYLE | {"lenient": True}
        return "%json " + json.dumps({**schema, "x-guidance": style})

    def bodies(self, before: Callable[[str], str], after: str = "", between: str = "") -> str:
        """One of the calls: `before` of the function's name, the Lark `between`, the arguments as JSON, and `after`."""
        calls = (
            " ".join(
                [literal(before(tool.name)), between, self.json(self.schema(tool), strict=tool.strict), literal(after)]
            )
            for tool in self.tools
        )
        return "(" + " | ".join(calls) + ")"

    def marked_calls(self, begin: str, body: str, *, separator: str = "", several: bool = True) -> str:
        """Rule `calls` for a format in which the marker `begin` comes before the body of each call.

        `separator` comes between calls without text; `several` says whether there may be more than one body.
        """
        several = several and self.parallel
        marker = self.marker(begin)
        if self.required:
            return f"calls: {marker} {body}" + (f" ({separator} {marker} {body})*" if several else "")
        repeat = "*" if several else "?"
        if self.special(begin):
            return f"calls: FREE_TEXT? ({marker} {body} FREE_TEXT?){repeat}\n{FREE_TEXT}"
        return f"calls: (call_begin {body}){repeat} FREE_TEXT?\ncall_begin[lazy]: FREE_TEXT? {marker}\n{FREE_TEXT}"


FREE_TEXT = r"FREE_TEXT: /(.|\n)+/"


def literal(text: str) -> str:
    """A Lark string; nothing for an empty one."""
    return json.dumps(text) if text else ""
