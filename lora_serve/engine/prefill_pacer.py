"""How many prompt tokens a step may compute while other sequences wait for their next token.

A step with prompt tokens delays the next token of every sequence that decodes: by a time per prompt token, which a
bound on the gap between two tokens limits, and on some devices by a fixed time, however few they are. So prompts

- wait together until they have waited as long as the fixed time delays all who decode, which loses least in sum, but
  never longer than a person notices (`MOST_HELD`), or than a few times the fixed time;
- are then computed in chunks as large as the bound on gaps allows, or whole if no chunk worth its fixed time keeps it;
- are computed in larger chunks if the first token would otherwise come later than is wanted. Where both cannot be kept,
  both are exceeded by the same factor.

Where steps are padded to fixed sizes, a chunk fills one, unless it is all there is and its padding keeps the bound.

The costs are learnt from recent steps (`StepCosts`). All this affects when a prompt is computed, never the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lora_serve.engine.step_costs import StepCosts

STRETCH = 1.6  # times a decode step: the gap that is allowed where none is stated
WAITING = 5.0  # how many streams a waiting prompt counts as: of it nothing is there yet
UNNOTICED_GAP = 0.025  # seconds; a shorter gap is always allowed where none is stated
MOST_HELD = 0.1  # seconds for which prompts wait for others,
MOST_FIXED = 4.0  # or so many times what any of them adds to a step
PROBE = 8  # while it is not known what is fixed of a cost, one of so many chunks is half as large, which tells it
GRANULE = 4  # the smallest budget; others are rounded down by up to a fifth, so that the shapes of batches repeat
MOST_EXCEEDED = 1.05  # times a bound: what counts as keeping it
MOST_GROWTH = 1.5  # times recent steps: what far larger ones cost is a guess
FIRST = 16  # prompt tokens beside sequences that decode before their cost is known


class Demand(NamedTuple):
    """What a step could do: sequences that decode (at least 1), sequences whose prompts wait, and their tokens.

    `oldest`: when the request of one of these prompts arrived, on the pacer's clock: that whose turn is next.
    """

    decoding: int
    prefills: int
    tokens: int
    oldest: float


class PrefillPacer:
    """Decides each step's prefill budget.

    Attributes:
        costs: what was learnt from the durations of steps.
        gaps_exceeded: budgets that exceeded the bound on gaps, because none that is worth its cost keeps it.

    Args:
        itl_target: seconds between two tokens of a sequence that should not be exceeded; None: chosen from the costs.
        ttft_target: seconds to the first token that should not be exceeded; None: no bound.
        buckets: numbers of tokens that steps with prompt tokens are padded to, ascending.
    """

    def __init__(
        self,
        itl_target: float | None = None,
        ttft_target: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        buckets: Sequence[int] = (),
    ) -> None:
        self.costs = StepCosts(buckets)
        self.gaps_exceeded = 0
        self._itl_target, self._ttft_target, self._clock = itl_target, ttft_target, clock
        self._demand: Demand | None = None  # of the step that is being run
        self._held = 0.0  # seconds since when prompts wait and none was computed
        self._waited = 0.0  # seconds that those prompts have waited in this time, summed over them
        self._chunks = 0
        self._largest = FIRST  # prompt tokens of recent steps

    def budget(self, demand: Demand) -> int:
        """Prompt tokens for a step; 0: let prompts wait."""
        self._demand = demand
        budget = self._budget(demand)
        if budget == 0 or budget >= demand.tokens:
            return budget
        return self.costs.filling(demand.decoding, budget) if self.costs.buckets else _rounded(budget)

    def hold(self, demand: Demand) -> int:
        """A budget of 0, for a reason of others: prompts wait for one more step, and that counts as waiting."""
        self._demand = demand
        return 0

    def record(self, decoding: int, prompt: int, seconds: float) -> None:
        """Record a finished step: sequences that decoded, prompt tokens computed, duration in seconds."""
        learnt = self.costs.record(decoding, prompt, seconds)
        demand, self._demand = self._demand, None
        if prompt or demand is None:
            self._held = self._waited = 0.0
            if prompt and learnt:
                self._largest = max(prompt, int(0.9 * self._largest), FIRST)
        else:
            self._held += seconds
            self._waited += seconds * demand.prefills

    def _budget(self, demand: Demand) -> int:
        if not self.costs.known:
            return FIRST
        if self._should_hold(demand):
            return 0
        gap = self._gap(demand)
        chunk = self._chunk(demand, gap)
        self.gaps_exceeded += self.costs.mixed(demand.decoding, min(chunk, demand.tokens)) > MOST_EXCEEDED * gap
        self._chunks += 1
        # A bucket may be more than so many times the one before; what does not reach the next would never grow.
        most = max(MOST_GROWTH * self._largest, self.costs.next_filling(demand.decoding, self._largest))
        chunk = int(min(chunk, most))
        if self._chunks % PROBE == 0 and not self.costs.fixed_known:
            chunk = min(chunk, demand.tokens) // 2
        return max(GRANULE, chunk)

    def _should_hold(self, demand: Demand) -> bool:
        """Whether prompts had better wait for one more step that only decodes."""
        step, fixed = self.costs.decode(demand.decoding), self.costs.fixed
        longest = max(MOST_HELD, MOST_FIXED * fixed)
        if self._ttft_target is not None:
            longest = min(longest, self._ttft_target / 4)
        early = self._waited + step * demand.prefills / 2 < fixed * demand.decoding
        return early and self._held + step < longest

    def _gap(self, demand: Demand) -> float:
        """The longest step that is wanted: the more prompts wait for each stream, the longer."""
        if self._itl_target is not None:
            return self._itl_target
        patience = max(1.0, WAITING * demand.prefills / demand.decoding)
        return max(UNNOTICED_GAP, self.costs.decode(demand.decoding) * (1 + (STRETCH - 1) * patience))

    def _chunk(self, demand: Demand, gap: float) -> int:
        """Prompt tokens of a step, by both bounds."""
        most = self.costs.prompt_within(demand.decoding, gap)
        worth = 0.0  # a chunk takes at least as long as what it costs beside its tokens, unless a gap is stated
        if self._itl_target is None:
            worth = min(demand.tokens, self.costs.fixed / max(self.costs.per_token, 1e-9))
        if most < worth:
            return demand.tokens
        chunk = max(float(GRANULE), most)
        if self._ttft_target is not None:
            while chunk < demand.tokens and self._lateness(demand, chunk) > max(
                1.0, self.costs.mixed(demand.decoding, chunk) / gap
            ):
                chunk *= 1.1
        if chunk < demand.tokens or self.costs.mixed(demand.decoding, demand.tokens) > MOST_EXCEEDED * gap:
            chunk = self.costs.filling(demand.decoding, int(chunk))
        return int(min(chunk, demand.tokens))

    def _lateness(self, demand: Demand, chunk: float) -> float:
        """When all these prompts are computed, in such chunks ÷ when they should be."""
        assert self._ttft_target is not None
        steps = -(-demand.tokens // chunk)
        end = self._clock() - demand.oldest + steps * self.costs.mixed(demand.decoding, chunk)
        return end / self._ttft_target


def _rounded(budget: int) -> int:
    """A budget with two significant binary digits after the first: 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …"""
    granule = 1 << max(0, budget.bit_length() - 3)
    return budget // granule * granule
