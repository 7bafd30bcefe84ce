"""How many prompt tokens a step may take in while other sequences wait for their next token.

Whoever decodes sees a step that also takes in a prompt as a longer gap between two tokens. What a step of tokens alone
lasts, and what a prompt token adds to it, is learned from the steps as they come; from both follows how many prompt
tokens keep a step within `STRETCH` times its usual length. The first few tokens may be free (weights are read anyway)
and the next ones not, so the room grows step by step and what is dearest of late counts. All this decides when a prompt
is read, never what comes out.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.6  # of a step that only decodes; with a step's own noise, streams stay below twice their usual gap
LEAST = 8  # prompt tokens that always go on, however slow they are; rooms are multiples of it, so that sizes repeat


class Pace:
    """Learns from steps; see the module."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=9)  # seconds of steps that only decoded
        self._each: deque[float] = deque(maxlen=3)  # seconds that a prompt token added
        self._most = 0  # prompt tokens up to which that was seen

    def room(self) -> int:
        """Prompt tokens for the next step, should it also decode."""
        if not self._usual or not self._each:
            return 2 * LEAST
        spare = (STRETCH - 1) * statistics.median(self._usual)
        fits = min(spare / max(*self._each, 1e-9), self._most + LEAST)
        return max(LEAST, int(fits) // LEAST * LEAST)

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step was made: sequences that decoded, prompt tokens taken in, how long it took."""
        if prompt == 0:
            self._usual.append(seconds)
        elif decoding == 0:
            self._each.append(seconds / prompt)
            self._most = prompt
        elif self._usual:
            self._each.append(max(0.0, seconds - statistics.median(self._usual)) / prompt)
            self._most = prompt
