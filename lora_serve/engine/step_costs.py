"""What steps cost, learnt from their durations: times that are fixed, and times per row.

    seconds = decode · (1 + rows that decode ÷ 64) + (fixed + token · prompt tokens, if there are any)

`fixed` is what any prompt token costs, however few: such a step may not be replayed from a graph, say. Where steps with
prompt tokens are padded to fixed sizes (buckets), what they are padded by counts as prompt tokens. The three are
estimated from the durations by a Kalman filter, so that recent steps count most, each part changes as slowly as it does
in fact, and what recent steps say nothing of stays as it was. What a row adds differs between devices; as the number of
rows changes slowly, the error is small.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

NOISE = 0.05  # standard deviation of a duration, of the duration
MOST_SURPRISE = 3.0  # standard deviations; what is beyond counts as much as this (another process was busy)
SHORTEST, LONGEST = 1e-5, 600.0  # seconds that a step is taken to last
ENOUGH = 3  # steps with prompt tokens
FEW = 10  # prompt tokens that may take as long as a step
ROWS = 64  # that double a step in which all decode: about twice as many on a GPU, half as many on a CPU
# Standard deviations of decode, fixed and token: at first, of the first duration (the last one divided by its prompt
# tokens), if that has prompt tokens and if it has none and says nothing of what is fixed; and of their change in a step
# that has them, of what they add to it, at least `LEAST` of its duration. Contexts grow, so the first and the last
# change most; the second is a property of device and software.
AT_FIRST, AT_FIRST_WITHOUT_PROMPT = np.array([1.0, 0.2, 1.0]), np.array([1.0, 1.0, 1.0])
CHANGE = np.array([0.02, 0.01, 0.02])
LEAST = 0.02
KNOWN = 0.05  # of a short step's duration: a standard deviation


def padded(tokens: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds so many tokens; beyond the last one nothing is padded."""
    index = bisect_left(buckets, tokens)
    return buckets[index] if index < len(buckets) else tokens


class StepCosts:
    """Durations of steps by rows that decode and prompt tokens, in seconds.

    Args:
        buckets: numbers of tokens that steps with prompt tokens are padded to, ascending.
    """

    def __init__(self, buckets: Sequence[int] = ()) -> None:
        self.buckets = buckets
        self._parts = np.zeros(3)
        self._covariance: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.zeros((3, 3))
        self._with_prompt = self._without = 0  # steps seen
        self._warm = False

    def record(self, decoding: int, prompt: int, seconds: float) -> bool:
        """Learn from a finished step: rows that decoded, prompt tokens, duration; returns whether it was an example."""
        if not self._warm:  # the first step also loads and records what later ones find
            self._warm = True
            return False
        seconds = min(max(seconds, SHORTEST), LONGEST)
        prompt = self._padded(decoding, prompt)
        if not (self._with_prompt or self._without):
            parts = AT_FIRST if prompt else AT_FIRST_WITHOUT_PROMPT
            self._covariance = np.diag((parts * seconds / (1.0, 1.0, prompt or FEW)) ** 2)
        self._with_prompt += prompt > 0
        self._without += prompt == 0
        count = np.array([1 + decoding / ROWS, prompt > 0, prompt])
        expected = float(self._parts @ count)
        change = CHANGE * np.maximum(self._parts * count, LEAST * max(expected, SHORTEST))
        self._covariance += np.diag(np.divide(change, count, out=np.zeros(3), where=count > 0) ** 2)
        shared = self._covariance @ count
        variance = max(0.0, float(count @ shared)) + (NOISE * max(expected, SHORTEST)) ** 2
        most = MOST_SURPRISE * variance**0.5
        surprise = max(-most, min(most, seconds - expected))
        self._parts += shared * (surprise / variance)
        self._covariance -= np.outer(shared, shared) / variance
        floor = (1e-6 * SHORTEST) ** 2  # rounding must not make a variance negative
        np.fill_diagonal(self._covariance, np.maximum(self._covariance.diagonal(), floor))
        for part in range(3):  # what would be negative is 0, and the others are what they are then most likely
            if self._parts[part] < 0:
                self._parts -= self._covariance[part] * (self._parts[part] / self._covariance[part, part])
        self._parts = np.maximum(0.0, self._parts)
        return True

    @property
    def known(self) -> bool:
        """Whether enough steps were seen: of both kinds, or some with prompt tokens, to tell what is fixed of them."""
        return self._with_prompt >= ENOUGH or bool(self._with_prompt and self._without)

    @property
    def fixed_known(self) -> bool:
        """Whether what is fixed of a step with prompt tokens was told apart from what each of them costs."""
        deviation, shortest = float(self._covariance[1, 1]) ** 0.5, float(self._parts[0] + self._parts[1])
        return bool(deviation < KNOWN * shortest)

    @property
    def fixed(self) -> float:
        """Seconds that a step takes longer because there are prompt tokens, however few."""
        return float(self._parts[1])

    @property
    def per_token(self) -> float:
        """Seconds that a prompt token adds."""
        return float(self._parts[2])

    def decode(self, rows: int) -> float:
        """Seconds of a step in which so many rows decode and nothing else happens."""
        return float(self._parts[0]) * (1 + rows / ROWS)

    def mixed(self, rows: int, prompt: float) -> float:
        """Seconds of a step with prompt tokens."""
        return self.decode(rows) + self.fixed + self.per_token * self._padded(rows, math.ceil(prompt))

    def prompt_within(self, rows: int, seconds: float) -> float:
        """Prompt tokens with which a step takes so long; negative if any take longer."""
        return (seconds - self.decode(rows) - self.fixed) / max(self.per_token, 1e-9)

    def filling(self, rows: int, prompt: int) -> int:
        """Prompt tokens, up to so many, that fill a bucket beside these rows; where that leaves none, the next bucket.

        `prompt` itself where nothing is padded.
        """
        index = bisect_right(self.buckets, rows + prompt)
        if not self.buckets or rows + prompt > self.buckets[-1]:
            return prompt
        below = self.buckets[index - 1] if index else 0
        return (below if below > rows else self.buckets[index]) - rows

    def next_filling(self, rows: int, prompt: int) -> int:
        """Prompt tokens that fill the first bucket in which there are more of them than so many."""
        return padded(rows + prompt + 1, self.buckets) - rows

    def _padded(self, rows: int, prompt: int) -> int:
        """Prompt tokens with what is padded."""
        return padded(rows + prompt, self.buckets) - rows if prompt else 0
