"""How many prompt tokens a step may take in while other sequences wait for their next token.

Whoever decodes sees a step that also takes in a prompt as a longer gap between two tokens. What a step of tokens alone
lasts, and what a prompt token adds to it, is learned from the steps as they come; from both follows how many prompt
tokens keep a step within `STRETCH` times its usual length. It decides when a prompt is read, never what comes out.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.7  # of a step that only decodes; with a step's own noise, streams stay below twice their usual gap
LEAST = 8  # prompt tokens that always go on, however slow they are
BEFORE = 16  # as long as nothing is known
SAMPLES = 9


class Pace:
    """Learns from steps; see the module."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=SAMPLES)  # seconds of steps that only decoded
        self._each: deque[float] = deque(maxlen=SAMPLES)  # seconds that a prompt token added

    def room(self) -> int:
        """Prompt tokens for the next step, should it also decode."""
        if not self._usual or not self._each:
            return BEFORE
        spare = (STRETCH - 1) * statistics.median(self._usual)
        return max(LEAST, int(spare / max(statistics.median(self._each), 1e-9)))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step was made: sequences that decoded, prompt tokens taken in, how long it took."""
        if prompt == 0:
            self._usual.append(seconds)
        elif decoding == 0:
            self._each.append(seconds / prompt)
        elif self._usual and seconds > (usual := statistics.median(self._usual)):
            self._each.append((seconds - usual) / prompt)
