"""Examples to tokens: token ids of training data, and which of them the loss is on.

Of a conversation these are the assistant's messages as the base's chat template writes them, end tokens included: what
the server would have to generate there (`rendered_conversation.py`).

Tokens are those of the whole text, as long as those up to where a reply begins or ends are a beginning of them. Where a
token would reach across, the text is tokenized in pieces, as the server too gets a prompt without its reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

from lora_serve.api.fine_tuning.example_lines import InvalidExamples
from lora_serve.api.fine_tuning.example_schemas import (
    ChatExample,
    CompletionExample,
    Example,
    PreferenceExample,
    TrainingMessage,
)
from lora_serve.api.fine_tuning.rendered_conversation import RenderedConversation, Span
from lora_serve.api.openai.chat_schemas import FunctionTool
from lora_serve.errors import BadRequest


class EncodedSequence(NamedTuple):
    """One sequence to train on.

    Attributes:
        weights: `weights[i]` is the weight of -log p(tokens[i] | tokens[:i]) in the loss: 1, or 0 for context. That of
            the first token is 0.
        truncated: whether its end was cut off.
    """

    tokens: list[int]
    weights: list[float]
    truncated: bool

    @property
    def trained_tokens(self) -> int:
        return sum(weight > 0 for weight in self.weights)


class PreferencePair(NamedTuple):
    """Two sequences with the same prompt, whose tokens have weight 0."""

    chosen: EncodedSequence
    rejected: EncodedSequence


@dataclass
class EncodingCounts:
    """What encoding did so far.

    Attributes:
        examples: all, dropped ones included.
        tokens, trained_tokens: of all sequences that are trained on.
        truncated: examples of which something was cut off, but not all that would be trained on.
        dropped: examples of which nothing to train on was left.
    """

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0


class ExampleEncoder:
    """Encodes examples for one base model.

    Args:
        tokenizer: the base's Hugging Face tokenizer, with its chat template.
        end_tokens: at which the server stops generating.
        most_tokens: of a sequence. Longer ones are cut at their end, as OpenAI does.
        assistants: which assistant messages of a chat example are learnt: all of weight 1, or only the last of these.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_tokens: Sequence[int],
        most_tokens: int,
        assistants: Literal["all", "last"] = "all",
    ) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        own = tokenizer.eos_token_id
        self._end_token = own if own in self._end_tokens else next(iter(end_tokens), None)
        self._most_tokens = most_tokens
        self._assistants = assistants
        self._leading = _leading_special_tokens(tokenizer)
        self.counts = EncodingCounts()

    def encode_all(
        self, examples: Iterable[tuple[int, Example]]
    ) -> Iterator[tuple[int, EncodedSequence | PreferencePair]]:
        """Numbered examples, encoded; those are left out of which nothing to train on remains.

        Raises: `InvalidExamples` that names the line of an example that cannot be encoded.
        """
        for number, example in examples:
            try:
                encoded = self.encode(example)
            except BadRequest as error:
                raise InvalidExamples(f"line {number}: {error.message}", param=error.param) from None
            if encoded is not None:
                yield number, encoded

    def encode(self, example: Example) -> EncodedSequence | PreferencePair | None:
        """Encode an example; None if truncation leaves nothing to train on. Raises `BadRequest`."""
        match example:
            case CompletionExample():
                encoded = [self._completion(example)]
            case ChatExample():
                trained = [index for index, message in enumerate(example.messages) if message.trained]
                learnt = trained[-1:] if self._assistants == "last" else trained
                encoded = [self._chat(example.messages, example.shown_tools, learnt)]
            case PreferenceExample():
                encoded = self._preference(example)
        self.counts.examples += 1
        if not all(each.trained_tokens for each in encoded):
            self.counts.dropped += 1
            return None
        self.counts.tokens += sum(len(each.tokens) for each in encoded)
        self.counts.trained_tokens += sum(each.trained_tokens for each in encoded)
        self.counts.truncated += any(each.truncated for each in encoded)
        return encoded[0] if len(encoded) == 1 else PreferencePair(*encoded)

    # --- kinds -------------------------------------------------------------------------------------------------------

    def _completion(self, example: CompletionExample) -> EncodedSequence:
        text = example.prompt + example.completion
        tokens, weights = self._tokenize(text, [Span(len(example.prompt), len(text))])
        leading = len(self._leading)
        return self._ended([*self._leading, *tokens], [0.0] * leading + weights)

    def _chat(
        self,
        messages: Sequence[TrainingMessage],
        tools: Sequence[FunctionTool],
        trained: Sequence[int],
        *,
        whole: bool = True,
    ) -> EncodedSequence:
        conversation = RenderedConversation(self._tokenizer, messages, tools)
        if (marked := conversation.marked(trained)) is not None:
            return self._cut(*marked)
        text, spans = conversation.replies(trained)
        tokens, weights = self._tokenize(text, spans, whole=whole)
        self._leave_out_what_follows_the_end(tokens, weights)
        if spans[-1].end == len(text):
            return self._ended(tokens, weights)
        return self._cut(tokens, weights)

    def _preference(self, example: PreferenceExample) -> list[EncodedSequence]:
        context, tools = example.input.messages, example.input.tools or []
        outputs = (example.preferred_output, example.non_preferred_output)

        def encode(*, whole: bool) -> list[EncodedSequence]:
            return [self._chat([*context, *output], tools, [len(context)], whole=whole) for output in outputs]

        def prompts(pair: list[EncodedSequence]) -> list[list[int]]:
            return [each.tokens[: each.weights.index(1.0)] for each in pair if 1.0 in each.weights]

        pair = encode(whole=True)
        if any(first != second for first, second in pairwise(prompts(pair))):
            pair = encode(whole=False)  # where one of them begins within a token
        return pair

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str, spans: Sequence[Span], *, whole: bool = True) -> tuple[list[int], list[float]]:
        """Tokens of a text, with weight 1 in the spans.

        Args:
            whole: whether to tokenize it as a whole, if no token reaches across the beginning or end of a span.
        """
        cuts = sorted({0, len(text), *(place for span in spans for place in span)})
        tokens = self._ids(text)
        ends = [len(ids) if tokens[: len(ids)] == ids else -1 for ids in (self._ids(text[:cut]) for cut in cuts[1:-1])]
        counts = [0, *ends, len(tokens)]
        if not whole or any(first > second for first, second in pairwise(counts)):
            pieces = [self._ids(text[start:end]) for start, end in pairwise(cuts)]
            joined = [token for piece in pieces for token in piece]
            if self._decoded(joined) != self._decoded(tokens):
                raise BadRequest(
                    "the tokenizer writes a reply otherwise where it follows its prompt, so that it cannot be told "
                    "where the reply begins: let the prompt end with a line break, or begin the reply with a space"
                )
            tokens = joined
            counts = [0]
            for piece in pieces:
                counts.append(counts[-1] + len(piece))
        weights = [0.0] * len(tokens)
        for (first, last), cut in zip(pairwise(counts), cuts, strict=False):
            if any(span.start <= cut < span.end for span in spans):
                weights[first:last] = [1.0] * (last - first)
        return tokens, weights

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _leave_out_what_follows_the_end(self, tokens: list[int], weights: list[float]) -> None:
        """No loss on what a template writes after a reply's end token: the server has stopped there."""
        for trained, group in groupby(range(len(tokens)), key=lambda index: weights[index] > 0):
            places = list(group)
            ends = [place for place in places if tokens[place] in self._end_tokens]
            if trained and ends:
                weights[ends[-1] + 1 : places[-1] + 1] = [0.0] * (places[-1] - ends[-1])

    def _ended(self, tokens: list[int], weights: list[float]) -> EncodedSequence:
        """A sequence that ends with a reply, with an end token after it if it has none."""
        last = max((place for place, weight in enumerate(weights) if weight), default=None)
        if self._end_token is not None and (last is None or tokens[last] not in self._end_tokens):
            tokens, weights = [*tokens, self._end_token], [*weights, 1.0]
        return self._cut(tokens, weights)

    def _cut(self, tokens: list[int], weights: list[float]) -> EncodedSequence:
        truncated = len(tokens) > self._most_tokens
        tokens, weights = tokens[: self._most_tokens], weights[: self._most_tokens]
        weights[:1] = [0.0] * len(weights[:1])  # nothing comes before the first token that could predict it
        return EncodedSequence(tokens, weights, truncated)


def _leading_special_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as BOS."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special: list[int] = encoded["special_tokens_mask"]
    count = special.index(0) if 0 in special else 0
    return list(encoded["input_ids"][:count])
