"""Incremental detokenization: sends whole characters only, and holds back text that could become a stop string.

Decodes a window of recent tokens, twenty or so at most, so the cost of a token does not grow with the text. The window
starts at a token boundary at which the text was complete, so that tokenizers put spaces as in the whole text (a
sentencepiece token decodes differently at the start of a text).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_serve.engine.base_tokenizer import decoder

UNFINISHED = "\ufffd"  # what an incomplete UTF-8 character decodes to
LONGEST_CHARACTER = 8  # tokens; a character that is not complete by then never will be
CONTEXT = 6  # prompt tokens that decide whether a space precedes the first token


class Detokenizer:
    """One sequence's text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: the tokens before the text; only the last `CONTEXT` are used.
        stop: strings that end the text.
        include_stop: leave the stop string in the text.
        hidden: tokens without text; None is all special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        hidden: frozenset[int] | None = None,
    ) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._hidden = hidden
        self._decode = decoder(tokenizer, skip_special_tokens=hidden is None)
        self._begin_window(self._visible(prompt[-CONTEXT:]))
        self._held = ""
        self.stop_string: str | None = None  # the one that ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def feed(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that can be sent now, which is empty after a stop string."""
        if self.stopped:
            return ""
        text = self._held
        for token in token_ids if self._hidden is None else self._visible(token_ids):
            text += self._next(token)
        return self._release(text) if self._stop else text

    def flush(self) -> str:
        """End the text; returns what was held back, even incomplete characters."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._decode(self._window)[len(self._before) :], ""
        return text

    def _begin_window(self, token_ids: list[int]) -> None:
        """Start a window at tokens whose text was returned."""
        self._window = token_ids
        self._known = len(token_ids)
        self._before = self._decode(token_ids)

    def _next(self, token: int) -> str:
        self._window.append(token)
        fresh = self._decode(self._window)[len(self._before) :]
        pending = len(self._window) - self._known
        if not fresh and pending > LONGEST_CHARACTER:
            del self._window[self._known]  # a token without text
        if not fresh or (fresh.endswith(UNFINISHED) and pending < LONGEST_CHARACTER):
            return ""
        self._begin_window(self._window[self._known :])
        return fresh

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if self._hidden is None or token not in self._hidden]

    def _release(self, text: str) -> str:
        """Cut the text at the first stop string; hold back a suffix that could become one."""
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, stop = min(found, key=lambda match: (match[0], len(match[1])))
            self.stop_string = stop
            self._held = ""
            return text[: place + len(stop)] if self._include_stop else text[:place]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
