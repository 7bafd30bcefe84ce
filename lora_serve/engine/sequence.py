"""State of one sequence in the engine: tokens, KV blocks, active adapters."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_serve.adapters.traits import Traits
from lora_serve.engine.fairness import Share
from lora_serve.engine.grammar import GrammarMatcher
from lora_serve.kv.pool import chain
from lora_serve.request import Pooling, Request, Served

VIRTUAL_TOKEN = -1  # a token whose embedding, or keys and values, the adapter provides
IN_FLIGHT_TOKEN = -2  # the last token, sampled or being sampled on the device and not yet read by the host
NEVER_ACTIVE = sys.maxsize  # start of an adapter that is not invoked: no sequence reaches this position


class ActiveAdapter(NamedTuple):
    """An adapter of a sequence.

    Attributes:
        weight: of what it adds to the base's outputs.
        start: the first position at which it adds them.
        replaces: whether it also replaces parts of the base, at all positions.
    """

    digest: str
    weight: float
    start: int
    replaces: bool = False

    def weight_at(self, position: int) -> float | None:
        """Its weight for a row at this position; None if it has no part in the row."""
        if position >= self.start:
            return self.weight
        return 0.0 if self.replaces else None


@dataclass(eq=False)
class Sequence:
    """A request being served.

    Positions count all tokens, including virtual ones.

    Attributes:
        order: admission number; smaller is older.
        adapters: the exact versions leased for it.
        seed: for sampling.
        stop_ids: token ids that end it.
        limit: maximum number of tokens, virtual ones and prompt included.
        traits: of its adapters, by digest; adapters without any may be left out.
        pooling: how its prompt is embedded; None if it generates.
        tokens: virtual tokens, prompt, output.
        computed: how many tokens have their KV in `blocks`.
        blocks: KV blocks in order, covering at least `computed` tokens.
        keys: prefix-cache keys of the full blocks, as far as they were needed.
        indexed: how many of `blocks` are in the prefix index (or were found there).
        cached: prompt tokens found in the prefix cache when it first ran; None before that.
        matcher: state of its grammar, advanced by every token of the output; None if it has none.
        arrived, started: when its request was admitted, and its first step launched (0: not yet), in seconds on the
            engine's clock.
        last_step: number of the last step that it had a row in.
        charged: up to which position its tokens were charged to its share.
        share: what it is charged to; set when it is queued.
        sampled_row: row of its last sampled token in `SampledTokens`, on the device.
        virtual: number of virtual tokens; an adapter that has them is the sequence's only one.
        active: each of its adapters once, ordered by digest.
    """

    request: Request
    order: int
    adapters: tuple[Served, ...]
    seed: int
    stop_ids: frozenset[int]
    limit: int
    traits: Mapping[str, Traits] = field(default_factory=dict)
    pooling: Pooling | None = None
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    indexed: int = 0
    cached: int | None = None
    matcher: GrammarMatcher | None = None
    sampled_row: int = 0
    arrived: float = 0.0
    started: float = 0.0
    last_step: int = 0
    charged: int = 0
    share: Share = field(init=False)

    def __post_init__(self) -> None:
        self.virtual = max((traits.virtual for traits in self.traits.values()), default=0)
        self.tokens = [VIRTUAL_TOKEN] * self.virtual + self.request.prompt
        self.active = self._active()
        self.digests = tuple(adapter.digest for adapter in self.active)
        # What its KV depends on besides the tokens, by the first position that depends on it. KV of virtual tokens is
        # shared by all tenants; the tenant counts from the first token of the prompt on.
        self._key_parts: list[tuple[int, tuple[int | float | str, ...]]] = [
            (self.virtual, ("tenant", self.request.tenant)),
            *((each.start, ("adapter", *each[:3])) for each in self.active),
            *((0, ("replaces", each.digest)) for each in self.active if each.replaces and each.start),
        ]

    def __repr__(self) -> str:
        return f"<Sequence {self.order}: {self.computed}/{len(self.tokens)} computed, {len(self.blocks)} blocks>"

    @property
    def prompt_end(self) -> int:
        """Position of the first generated token."""
        return self.virtual + len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_end

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def last_token_in_flight(self) -> bool:
        """Whether its in-flight token is its last because of the length limit."""
        return self.tokens[-1] == IN_FLIGHT_TOKEN and len(self.tokens) >= self.limit

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether prompt log-probabilities are still to be sent."""
        return self.request.sampling.prompt_logprobs is not None and self.generated == 0

    def append_known(self, tokens: list[int]) -> None:
        """Append tokens that need no sampling.

        If a token is being sampled in their stead, it is dropped.
        """
        if self.tokens[-1] == IN_FLIGHT_TOKEN:
            self.tokens.pop()
        self.tokens += tokens

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether rows of the prompt other than the last are needed, so that it must be computed, not looked up."""
        return self.wants_prompt_logits or (self.pooling is not None and self.pooling.mode != "last")

    def prefix_key(self, block: int, size: int) -> bytes:
        """Prefix-cache key of full block number `block`; `size` is the block size."""
        while len(self.keys) <= block:
            start = len(self.keys) * size
            end = start + size
            parent = self.keys[-1] if self.keys else b""
            for position, name in self._key_parts:
                if start <= position < end:
                    parent = chain(parent, name)
            self.keys.append(chain(parent, self.tokens[start:end]))
        return self.keys[block]

    def _active(self) -> tuple[ActiveAdapter, ...]:
        """Each adapter once; the weights of one that is named twice add up."""
        weights: dict[str, float] = {}
        for adapter in self.adapters:
            weights[adapter.digest] = weights.get(adapter.digest, 0.0) + adapter.weight
        return tuple(
            ActiveAdapter(digest, weights[digest], self._start(traits), traits.replaces)
            for digest, traits in ((digest, self.traits.get(digest, Traits())) for digest in sorted(weights))
        )

    def _start(self, traits: Traits) -> int:
        """The first position at which an adapter adds to the base; depends on the prompt only."""
        invocation = traits.invocation
        found = last_match(self.request.prompt, invocation) if invocation else None
        if found is None:
            return NEVER_ACTIVE if invocation else 0
        return self.virtual + found


def last_match(tokens: Seq[int], pattern: Seq[int]) -> int | None:
    """Index of the last occurrence of a non-empty pattern; None if there is none."""
    wanted = list(pattern)
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start] == wanted[0] and list(tokens[start : start + len(wanted)]) == wanted:
            return start
    return None
