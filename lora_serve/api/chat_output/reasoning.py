"""Reasoning between tags at the start of a reply, as chat templates of reasoning models write it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.api.chat_output.call_writer import CallWriter, EdgeTrimmer
from lora_serve.api.chat_output.text_reader import Step, TextReader


@dataclass(frozen=True)
class ReasoningFormat:
    """The tags around a model's reasoning."""

    begin: str
    end: str

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers that the vocabulary may have as special tokens, which detokenization has to keep."""
        return (self.begin, self.end)


FORMATS = (
    ReasoningFormat("<think>", "</think>"),  # Qwen 3, QwQ, DeepSeek R1, SmolLM3, …
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ReasoningFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)


def detect_reasoning_format(chat_template: str) -> ReasoningFormat | None:
    """The tags that a chat template mentions; None if it knows of no reasoning."""
    return next((form for form in FORMATS if form.end in chat_template), None)


def ends_in_open_reasoning(prompt: str, form: ReasoningFormat, continued: str = "") -> bool:
    """Whether a reply begins inside the reasoning, because the rendered prompt ends there.

    Only the prompt's end counts, as messages may talk about the tags, and the message that the reply continues.
    """
    if prompt.rstrip().endswith(form.begin):
        return True
    return continued.lstrip().startswith(form.begin) and form.end not in continued


def read_reasoning(reader: TextReader, calls: CallWriter, form: ReasoningFormat, *, is_open: bool) -> Step[None]:
    """Consume the reasoning at the start of a reply, if there is any, and the white space after it.

    Without a closing tag everything is reasoning. White space at both ends of the reasoning is left out, and so is
    reasoning that consists of nothing else.
    """
    reader.hold()
    yield from reader.skip()
    if not (yield from reader.literal(form.begin)) and not is_open:
        calls.text(reader.release())
        return
    reader.drop()
    trimmer = EdgeTrimmer(trim_start=True)
    yield from reader.until((form.end,), lambda text: calls.reasoning(trimmer.feed(text)))
    yield from reader.literal(form.end)
    yield from reader.skip()
