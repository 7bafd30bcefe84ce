"""A conversation as the base's chat template writes it, and where in that the replies to be learnt are.

A template may say that by `{% generation %}`. Otherwise the conversation is rendered up to the message, with the
generation prompt, and up to its end: both must be beginnings of the whole, or the example is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lora_serve.api.chat_template import ONE_CALL, template_messages, template_tools, without_lone_surrogates
from lora_serve.api.fine_tuning.example_schemas import TrainingMessage
from lora_serve.api.openai.chat_schemas import FunctionTool
from lora_serve.errors import BadRequest

MOST_WORK = 64 << 20  # characters that are rendered for one example
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """Where a reply is, in characters."""

    start: int
    end: int


class RenderedConversation:
    """Messages as a chat template writes them."""

    def __init__(self, tokenizer: Any, messages: Sequence[TrainingMessage], tools: Sequence[FunctionTool]) -> None:
        if not tokenizer.chat_template:
            raise BadRequest("the base model has no chat template; use prompt and completion", param="messages")
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = template_tools([tool.model_dump(exclude_none=True) for tool in tools]) or None
        self._template: str = tokenizer.get_chat_template(tools=self._tools)
        self._written = [message.for_template() for message in messages]
        self._rendered = 0  # characters

    def marked(self, trained: Sequence[int]) -> tuple[list[int], list[float]] | None:
        """Tokens and weights by the template's own marks; None if it does not mark every assistant message once."""
        if not GENERATION.search(self._template):
            return None
        turns = template_messages(self._written, self._template)
        found = self._apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask: list[int] = found["assistant_masks"]
        runs = [list(group) for marked, group in groupby(range(len(mask)), key=mask.__getitem__) if marked]
        wanted = [  # whether each of the turns is learnt
            index in trained
            for index, message in enumerate(self._messages)
            if message.role == "assistant"
            for _ in range(self._turns_of(message))
        ]
        if len(runs) != len(wanted):
            return None
        weights = [0.0] * len(mask)
        for run, learnt in zip(runs, wanted, strict=True):
            for place in run:
                weights[place] = float(learnt)
        return list(found["input_ids"]), weights

    def replies(self, trained: Sequence[int]) -> tuple[str, list[Span]]:
        """The conversation as text, and where its replies are. Raises `BadRequest`."""
        whole = self._render(len(self._messages))
        last = len(self._messages) - 1
        spans = []
        for index in trained:
            prompt = self._render(index, add_generation_prompt=True)
            up_to = whole if index == last else self._render(index + 1)
            if not (whole.startswith(prompt) and whole.startswith(up_to) and len(prompt) <= len(up_to)):
                raise BadRequest(
                    f"messages.{index}: the base's chat template writes what comes before this reply, or the reply, "
                    "otherwise when the conversation goes on, so that it cannot be trained on in place; give it weight "
                    "0, or make the conversation that ends with it an example of its own",
                    param=f"messages.{index}",
                )
            if len(prompt) == len(up_to):
                text = self._messages[index].text
                if index != last or self._messages[index].tool_calls or not text:
                    raise BadRequest(
                        f"messages.{index}: the base's chat template writes nothing for this reply",
                        param=f"messages.{index}",
                    )
                whole += without_lone_surrogates(text)  # a template of single questions: the server generates this
                up_to = whole
            spans.append(Span(len(prompt), len(up_to)))
        return whole, spans

    def _render(self, count: int, **options: Any) -> str:
        """The first so many messages as text."""
        text: str = self._apply(template_messages(self._written[:count], self._template), tokenize=False, **options)
        self._rendered += len(text)
        if self._rendered > MOST_WORK:
            raise BadRequest("messages: too many replies to be learnt for a conversation of this length")
        return without_lone_surrogates(text)

    def _apply(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(turns, tools=self._tools, **options)
        except (TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadRequest(
                f"the base's chat template refuses these messages: {str(error)[:200]}", param="messages"
            ) from error

    def _turns_of(self, message: TrainingMessage) -> int:
        """How many messages `template_messages` makes of one."""
        calls = len(message.tool_calls or ())
        return max(1, calls) if ONE_CALL in self._template else 1
