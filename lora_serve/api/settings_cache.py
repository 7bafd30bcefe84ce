"""What the API remembers of adapters with settings: the versions that names stand for, and tokenizers made for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from lora_serve.api.openai.chat_format import ChatFormat
from lora_serve.api.openai.encode import TextEncoder
from lora_serve.messages import ResolvedAdapter

MOST_NAMES = 4_000  # settings may be 100 kB
MOST_TOKENIZERS = 256

Named = tuple[str, str | None]  # an adapter and, perhaps, how its version's digest begins
Writing = tuple[str | None, tuple[str, ...]]  # a chat template of its own, and added tokens


@dataclass(frozen=True)
class PromptTools:
    """What prompts are written and replies are read with."""

    tokenizer: Any
    encoder: TextEncoder
    chat: ChatFormat | None


class SettingsCache:
    """Versions by name, as long as no name of an adapter changes; and tools by what settings say about writing.

    Of aliases nothing is remembered: a request may get another target than the one before.
    """

    def __init__(self) -> None:
        self._state = 0
        self._versions: dict[Named, ResolvedAdapter] = {}
        self._tools: OrderedDict[Writing, PromptTools] = OrderedDict()

    def find(self, named: Named, state: int) -> ResolvedAdapter | None:
        """The version that is known to be meant in this state of all names (`Stats.settings_state`)."""
        return self._versions.get(named) if state == self._state else None

    def keep(self, named: Named, state: int, version: ResolvedAdapter) -> None:
        """Remember the version that is meant in this state of all names."""
        if state != self._state or len(self._versions) >= MOST_NAMES:
            self._state, self._versions = state, {}
        self._versions[named] = version

    def find_tools(self, writing: Writing) -> PromptTools | None:
        """Tools that were made for such settings, if they are kept."""
        if (found := self._tools.get(writing)) is not None:
            self._tools.move_to_end(writing)
        return found

    def keep_tools(self, writing: Writing, tools: PromptTools) -> None:
        """Keep tools; the least recently used ones go."""
        self._tools[writing] = tools
        while len(self._tools) > MOST_TOKENIZERS:
            self._tools.popitem(last=False)


def make_tools(base: PromptTools, writing: Writing) -> PromptTools:
    """The tools of an adapter, from the base's."""
    template, added = writing
    tokenizer, encoder = base.tokenizer, base.encoder
    if added:
        tokenizer = _separate(tokenizer)
        tokenizer.add_tokens([*added])
        encoder = encoder.extended(tokenizer, added)
    if template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return PromptTools(tokenizer, encoder, ChatFormat.of(tokenizer, bounded=template is not None))


def _separate(tokenizer: Any) -> Any:
    """A copy of a Hugging Face tokenizer with added tokens of its own.

    Both share the vocabulary, which takes a second to copy, during which no other thread runs.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return copy.deepcopy(tokenizer)
    own = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(own, part, value)
    known = backend.get_added_tokens_decoder()
    for _, token in sorted(known.items()):
        (own.add_special_tokens if token.special else own.add_tokens)([token])
    if own.get_added_tokens_decoder() != known:  # their ids do not follow each other
        return copy.deepcopy(tokenizer)
    separate = copy.copy(tokenizer)
    separate._tokenizer = own
    return separate
