"""One request's state inside the engine: its tokens, its KV blocks, and its claims on adapters."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from lora_serve.kv.pool import chain
from lora_serve.request import Request, Served


def identity(tenant: str, adapters: Seq[Served]) -> bytes:
    """What KV depends on besides the tokens; two sequences share KV only if this is equal."""
    parts = [tenant, *(f"{adapter.digest}*{adapter.weight!r}" for adapter in adapters)]
    return chain(b"", [*b"\0".join(part.encode() for part in parts)])


@dataclass(eq=False)
class Sequence:
    """A request being served.

    Attributes:
        order: admission number; smaller is older.
        adapters: the exact versions leased for it.
        seed: for its random draws.
        stop_ids: token ids that end it.
        tokens: prompt, then output.
        computed: how many tokens have their KV in `blocks`.
        blocks: KV blocks in order, covering at least `computed` tokens.
        keys: prefix keys of the full blocks, as far as they were needed.
        indexed: how many of `blocks` are in the prefix index (or were found there).
        cached: prompt tokens that were found in the prefix cache when it first ran.
    """

    request: Request
    order: int
    adapters: tuple[Served, ...]
    seed: int
    stop_ids: frozenset[int]
    limit: int
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    indexed: int = 0
    cached: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.root = identity(self.request.tenant, self.adapters)
        self.digests = tuple(dict.fromkeys(adapter.digest for adapter in self.adapters))

    def __repr__(self) -> str:
        return f"<Sequence {self.order}: {self.computed}/{len(self.tokens)} computed, {len(self.blocks)} blocks>"

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Its prompt's log-probabilities are asked for and not all sent: its prompt must be computed, not looked up."""
        return self.request.sampling.prompt_logprobs is not None and self.generated == 0

    def key(self, block: int, size: int) -> bytes:
        """Prefix key of full block number `block`."""
        while len(self.keys) <= block:
            start = len(self.keys) * size
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(chain(parent, self.tokens[start : start + size]))
        return self.keys[block]
