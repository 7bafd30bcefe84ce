"""One request's state inside the engine: its tokens, its KV blocks, and its claims on adapters."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_serve.adapters.traits import Traits
from lora_serve.kv.pool import chain
from lora_serve.request import Request, Served

VIRTUAL = -1  # stands in a sequence's tokens where the adapter gives the embedding, or keys and values
IN_FLIGHT_TOKEN = (
    -2
)  # stands at the end of them for a token that the device has drawn, or will have, and the host not read yet
NEVER = sys.maxsize  # a position that no sequence reaches


class Active(NamedTuple):
    """An adapter of a sequence: its weight, and the position from which on it is active."""

    digest: str
    weight: float
    start: int


@dataclass(eq=False)
class Sequence:
    """A request being served.

    Positions count all tokens, virtual ones too.

    Attributes:
        order: admission number; smaller is older.
        adapters: the exact versions leased for it.
        seed: for its random draws.
        stop_ids: token ids that end it.
        limit: tokens that it may have in the end.
        traits: of its adapters, by digest; plain ones may be left out.
        tokens: virtual ones, prompt, then output.
        computed: how many tokens have their KV in `blocks`.
        blocks: KV blocks in order, covering at least `computed` tokens.
        keys: prefix keys of the full blocks, as far as they were needed.
        indexed: how many of `blocks` are in the prefix index (or were found there).
        cached: prompt tokens that were found in the prefix cache when it first ran.
        row: where the device keeps the token that it drew last for this sequence.
        virtual: how many of its tokens are an adapter's virtual ones; such an adapter is its only one.
        active: each of its adapters once, in an order that depends on the set only.
    """

    request: Request
    order: int
    adapters: tuple[Served, ...]
    seed: int
    stop_ids: frozenset[int]
    limit: int
    traits: Mapping[str, Traits] = field(default_factory=dict)
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    indexed: int = 0
    cached: int | None = None
    row: int = 0

    def __post_init__(self) -> None:
        self.virtual = max((traits.virtual for traits in self.traits.values()), default=0)
        self.tokens = [VIRTUAL] * self.virtual + self.request.prompt
        self.active = self._active()
        self.digests = tuple(adapter.digest for adapter in self.active)
        # What its KV depends on besides the tokens, and from which position on. Virtual tokens are the adapter's own,
        # whoever asks; the tenant matters from the first token on that is the request's.
        self._joining: list[tuple[int, tuple[int | float | str, ...]]] = [
            (self.virtual, ("tenant", self.request.tenant)),
            *((each.start, ("adapter", *each)) for each in self.active),
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
        """Whether the token on its way is its last, whichever it is."""
        return self.tokens[-1] == IN_FLIGHT_TOKEN and len(self.tokens) >= self.limit

    @property
    def needs_previous_tokens(self) -> bool:
        """Whether its next token depends on which ones were drawn: they have to be read first."""
        sampling = self.request.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def wants_prompt_logits(self) -> bool:
        """Its prompt's log-probabilities are asked for and not all sent: its prompt must be computed, not looked up."""
        return self.request.sampling.prompt_logprobs is not None and self.generated == 0

    def key(self, block: int, size: int) -> bytes:
        """Prefix key of full block number `block`."""
        while len(self.keys) <= block:
            start = len(self.keys) * size
            end = start + size
            parent = self.keys[-1] if self.keys else b""
            for position, name in self._joining:
                if start <= position < end:
                    parent = chain(parent, name)
            self.keys.append(chain(parent, self.tokens[start:end]))
        return self.keys[block]

    def _active(self) -> tuple[Active, ...]:
        """Each adapter once: of one that is named twice, the weights add."""
        weights: dict[str, float] = {}
        for adapter in self.adapters:
            weights[adapter.digest] = weights.get(adapter.digest, 0.0) + adapter.weight
        return tuple(Active(digest, weights[digest], self._start(digest)) for digest in sorted(weights))

    def _start(self, digest: str) -> int:
        """Where an adapter becomes active; decided by the prompt alone."""
        invocation = self.traits[digest].invocation if digest in self.traits else ()
        found = last_match(self.request.prompt, invocation) if invocation else None
        if found is None:
            return NEVER if invocation else 0
        return self.virtual + found


def last_match(tokens: Seq[int], pattern: Seq[int]) -> int | None:
    """Where the last occurrence of a non-empty pattern begins."""
    wanted = list(pattern)
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start] == wanted[0] and list(tokens[start : start + len(wanted)]) == wanted:
            return start
    return None
