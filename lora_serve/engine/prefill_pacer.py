"""The prefill budget: how many prompt tokens a step may compute while other sequences wait for their next token.

A step that also prefills is a longer gap between two tokens of the sequences that decode. What a decode step takes, and
what a prompt token adds to it, is learned from the steps as they come; the budget keeps a step within `STRETCH` times its
usual length. Where more prompts wait than sequences decode, more would be lost than won by that, so the extra length
grows with their ratio. The first few tokens may be free (weights are read anyway) and the next ones not, so the budget
grows by half at most, and the highest cost of late counts. This decides when a prompt is computed, never the output.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.6  # of a decode step; with a step's own noise, streams stay below twice their usual gap
LEAST = 8  # prompt tokens that always go on, however slow they are; budgets are multiples of it, so that shapes repeat


class PrefillPacer:
    """Learns from steps; see the module."""

    def __init__(self) -> None:
        self._decode_seconds: deque[float] = deque(maxlen=9)  # of steps without prompt tokens
        self._token_seconds: deque[float] = deque(maxlen=3)  # that a prompt token added
        self._last_prefill = 0  # prompt tokens of the last step that was learned from
        self._budget = 0

    def budget(self, decoding: int, prefills: int) -> int:
        """Prompt tokens for a step in which so many sequences decode and so many are to be prefilled."""
        self._budget = self._affordable(max(1.0, prefills / decoding))
        return self._budget

    def _affordable(self, patience: float) -> int:
        if not self._decode_seconds or not self._token_seconds:
            return 2 * LEAST
        spare = (STRETCH - 1) * patience * statistics.median(self._decode_seconds)
        growth = max(1.5 * self._last_prefill, self._last_prefill + LEAST)
        return max(LEAST, int(min(spare / max(*self._token_seconds, 1e-9), growth)) // LEAST * LEAST)

    def record(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step ran: sequences that decoded, prompt tokens computed, how long it took."""
        if prompt == 0:
            self._decode_seconds.append(seconds)
        elif decoding == 0:
            self._learn(seconds, prompt)
        elif self._decode_seconds and prompt >= self._budget:  # fewer would say too little of what a full budget takes
            self._learn(seconds - statistics.median(self._decode_seconds), prompt)

    def _learn(self, added: float, prompt: int) -> None:
        self._token_seconds.append(max(0.0, added) / prompt)
        self._last_prefill = prompt
