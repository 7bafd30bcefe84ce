"""The prefill budget: how many prompt tokens a step may compute while other sequences wait for their next token.

Prefilling in a step delays the next token of the sequences that decode. The duration of a decode step, and what a
prompt token adds to it, are estimated from recent steps; the budget keeps a step within `STRETCH` times its usual
duration. If more prompts wait than sequences decode, delaying prompts costs more than it saves, so the added time grows
with their ratio. The first few prompt tokens may be free (weights are read anyway) and later ones not, so the budget
grows by half at most per step, and the highest recent cost counts. The budget affects when a prompt is computed, never
the output.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.6  # times a decode step; with noise, gaps between tokens stay below twice the usual
MIN_BUDGET = 8  # prompt tokens, however slow they are; budgets are multiples of it, so that batch shapes repeat


class PrefillPacer:
    """Computes each step's prefill budget from the durations of earlier steps."""

    def __init__(self) -> None:
        self._decode_seconds: deque[float] = deque(maxlen=9)  # durations of steps without prompt tokens
        self._token_seconds: deque[float] = deque(maxlen=3)  # time that a prompt token added to a step
        self._last_prefill = 0  # prompt tokens of the last step in `_token_seconds`
        self._budget = 0

    def budget(self, decoding: int, prefills: int) -> int:
        """Prompt tokens for a step, given how many sequences decode (at least 1) and how many wait for prefill."""
        self._budget = self._affordable(max(1.0, prefills / decoding))
        return self._budget

    def _affordable(self, patience: float) -> int:
        if not self._decode_seconds or not self._token_seconds:
            return 2 * MIN_BUDGET
        spare = (STRETCH - 1) * patience * statistics.median(self._decode_seconds)
        growth = max(1.5 * self._last_prefill, self._last_prefill + MIN_BUDGET)
        return max(MIN_BUDGET, int(min(spare / max(*self._token_seconds, 1e-9), growth)) // MIN_BUDGET * MIN_BUDGET)

    def record(self, decoding: int, prompt: int, seconds: float) -> None:
        """Record a finished step: sequences that decoded, prompt tokens computed, duration in seconds."""
        if prompt == 0:
            self._decode_seconds.append(seconds)
        elif decoding == 0:
            self._add_sample(seconds, prompt)
        elif self._decode_seconds and prompt >= self._budget:  # smaller ones say little about a full one
            self._add_sample(seconds - statistics.median(self._decode_seconds), prompt)

    def _add_sample(self, added: float, prompt: int) -> None:
        self._token_seconds.append(max(0.0, added) / prompt)
        self._last_prefill = prompt
