"""How many prompt tokens a step may take in while other sequences wait for their next token.

Whoever decodes sees a step that also takes in a prompt as a longer gap between two tokens. What a step of tokens alone
lasts, and what a prompt token adds to it, is learned from the steps as they come; from both follows how many prompt
tokens keep a step within `STRETCH` times its usual length. Where more prompts wait than sequences decode, more would be
lost than won by that, so the extra length grows with their ratio. The first few tokens may be free (weights are read
anyway) and the next ones not, so the room grows by half at most, and what is dearest of late counts. All this
decides when a prompt is read, never what comes out.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.6  # of a step that only decodes; with a step's own noise, streams stay below twice their usual gap
LEAST = 8  # prompt tokens that always go on, however slow they are; rooms are multiples of it, so that sizes repeat


class PrefillPacer:
    """Learns from steps; see the module."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=9)  # seconds of steps that only decoded
        self._each: deque[float] = deque(maxlen=3)  # seconds that a prompt token added
        self._given = 0  # prompt tokens that the last such step took in
        self._room = 0

    def room(self, decoding: int, prompts: int) -> int:
        """Prompt tokens for a step in which so many sequences decode and so many have a prompt to be read."""
        self._room = self._fitting(max(1.0, prompts / decoding))
        return self._room

    def _fitting(self, patience: float) -> int:
        if not self._usual or not self._each:
            return 2 * LEAST
        spare = (STRETCH - 1) * patience * statistics.median(self._usual)
        fits = min(spare / max(*self._each, 1e-9), max(1.5 * self._given, self._given + LEAST))
        return max(LEAST, int(fits) // LEAST * LEAST)

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step was made: sequences that decoded, prompt tokens taken in, how long it took."""
        if prompt == 0:
            self._usual.append(seconds)
        elif decoding == 0:
            self._learn(seconds, prompt)
        elif self._usual and prompt >= self._room:  # fewer would say too little of what a full room takes
            self._learn(seconds - statistics.median(self._usual), prompt)

    def _learn(self, added: float, prompt: int) -> None:
        self._each.append(max(0.0, added) / prompt)
        self._given = prompt
