"""Tokenizing with bounded work: a text far longer than the context is refused before it is tokenized.

Long texts are tokenized in threads of their own, which hold the interpreter's lock only for moments: one for texts of
a usual length, one for the very long, so that those delay only each other.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

SHORT = 2000  # characters that are tokenized at once, without a thread
VERY_LONG = 100_000  # characters
PREFIX = 8  # characters per token of the context; this much of a text is tokenized first
AT_ONCE = 64  # texts


class TextTooLong(Exception):
    """A text has more tokens than allowed; how many was not counted."""


class TextEncoder:
    """The base's tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer. No other thread may change its truncation or padding.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)  # characters of a token
        self._usual = ThreadPoolExecutor(1, "tokenize")
        self._very_long = ThreadPoolExecutor(1, "tokenize-very-long")

    def extended(self, tokenizer: Any, added: Sequence[str]) -> TextEncoder:
        """The same for this tokenizer with added tokens, in the same threads."""
        other = copy.copy(self)
        other._tokenizer, other._backend = tokenizer, getattr(tokenizer, "backend_tokenizer", None)
        other._longest = max(self._longest, *map(len, added))
        return other

    def check_length(self, characters: int, most: int) -> None:
        """Raise `TextTooLong` if no text of so many characters can have `most` tokens."""
        if characters > most * self._longest:
            raise TextTooLong

    async def encode(self, texts: Sequence[str], most: int, *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text.

        Args:
            most: tokens. A text that has many more is not tokenized as a whole.

        Raises: `TextTooLong`. A text with a few tokens more than `most` is encoded all the same.
        """
        for text in texts:
            self.check_length(len(text), most)

        def work() -> list[list[int]]:
            for text in texts:
                if len(text) > most * PREFIX:
                    (first,) = self._ids([text[: most * PREFIX]], special=add_special_tokens)
                    if len(first) > most + self._longest:  # by more than what the cut may have made
                        raise TextTooLong
            return self._ids(texts, special=add_special_tokens)

        return await self.run(work, sum(map(len, texts)))

    async def encode_first(self, texts: Sequence[str], limit: int, *, add_special_tokens: bool) -> list[list[int]]:
        """The first `limit` tokens of each text, between the special tokens that the tokenizer adds.

        Not by the tokenizer's own truncation, which would change it for other threads.

        Raises: `ValueError` if `limit` leaves nothing of a text.
        """
        own = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0

        def work() -> list[list[int]]:
            return [self._first(text, limit - own, special=add_special_tokens) for text in texts]

        return await self.run(work, sum(map(len, texts)))

    async def run(self, work: Callable[[], T], size: int) -> T:
        """The result of tokenizing or detokenizing so many characters or tokens; in a thread if they are many."""
        if size <= SHORT:
            return work()
        threads = self._usual if size <= VERY_LONG else self._very_long
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if self._backend is None:
            found: list[list[int]] = self._tokenizer([*texts], add_special_tokens=special)["input_ids"]
            return found
        ids: list[list[int]] = []
        for start in range(0, len(texts), AT_ONCE):
            # Of the backend's methods, those for batches let other threads run.
            part = [*texts[start : start + AT_ONCE]]
            ids += [encoding.ids for encoding in self._backend.encode_batch_fast(part, add_special_tokens=special)]
        return ids

    def _first(self, text: str, limit: int, *, special: bool) -> list[int]:
        end = max(1, limit) * PREFIX
        while True:
            (encoding,) = self._backend.encode_batch_fast([text[:end]], add_special_tokens=False)
            # Tokens at the cut may differ from those of the whole text.
            if end >= len(text) or len(encoding.ids) > limit + self._longest:
                break
            end *= 2
        if len(encoding.ids) > limit:
            if limit < 1:
                raise ValueError(f"a limit of {limit} tokens leaves nothing of the text")
            encoding.truncate(limit)
        ids: list[int] = self._backend.post_process(encoding, None, special).ids
        return ids
