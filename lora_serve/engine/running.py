"""The sequences that hold KV blocks: started, extended, preempted when blocks run out.

The youngest sequence of the share that was served most (`fairness.py`) gives up its blocks. It waits again, and is
prefilled again later, mostly from the prefix cache, once there are blocks for all of its tokens: so it does not take
them from those that it had to make room for. Nobody waits for ever: the oldest sequence of the share that was served
least keeps its blocks, and only new tokens, of which there is an end, change which share that is.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from operator import attrgetter

from lora_serve.engine.fairness import Rank
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import Sequence
from lora_serve.engine.waiting import WaitingQueue
from lora_serve.kv.pool import BlockPool

log = logging.getLogger(__name__)

_order = attrgetter("order")


def _served(seq: Sequence) -> tuple[Rank, int]:
    """Order in which sequences keep their blocks: by what their shares were served, then by age."""
    return seq.share.rank, seq.order


class RunningSequences:
    """Sequences that hold KV blocks; iterates over them in no particular order.

    Attributes:
        started: sequences that started for the first time.
        prefix_tokens, prefix_hits: prompt tokens of these, and how many were found in the prefix cache.
        preemptions: how often one had to give up its blocks.

    Args:
        waiting: where preempted sequences go.
        prefix_cache: look up and index full blocks; blocks of virtual tokens always are.
    """

    def __init__(self, pool: BlockPool, waiting: WaitingQueue, *, prefix_cache: bool) -> None:
        self._pool, self._waiting, self.prefix_cache = pool, waiting, prefix_cache
        self._seqs: dict[Sequence, None] = {}
        self.started = 0
        self.prefix_tokens = 0
        self.prefix_hits = 0
        self.preemptions = 0

    def __repr__(self) -> str:
        return f"<RunningSequences {len(self)}, {self.preemptions} preemptions, {self._pool!r}>"

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._seqs

    @property
    def by_age(self) -> list[Sequence]:
        """The sequences, oldest first."""
        return sorted(self._seqs, key=_order)

    def has_blocks_for(self, seq: Sequence) -> bool:
        """Whether a waiting sequence could start as a whole, nothing of it being found in the prefix cache."""
        return -(-len(seq.tokens) // self._pool.block_size) + len(self) <= self._pool.free

    def start(self, seq: Sequence, budget: int) -> ScheduledSequence | None:
        """Start a waiting sequence with its first chunk; None if there are not enough free blocks for that.

        One that was preempted needs them for all of its tokens.
        """
        found = self._cached_blocks(seq)
        start = len(found) * self._pool.block_size
        count = min(len(seq.tokens) - start, budget)
        end = start + count if seq.cached is None else len(seq.tokens)
        missing = -(-end // self._pool.block_size) - len(found)
        # One spare block per running sequence for its next tokens, so that starting one does not preempt others.
        if missing + len(self) > self._pool.free_after_holding(found):
            return None
        self._pool.hold(found)
        seq.blocks = array("i", found + (self._pool.allocate(missing) or []))
        seq.computed = start
        seq.indexed = len(found)
        if seq.cached is None:
            self.started += 1
            seq.cached = max(0, start - seq.virtual)
            self.prefix_tokens += len(seq.request.prompt)
            self.prefix_hits += seq.cached
        self._seqs[seq] = None
        seq.share.add_holders(1)
        if log.isEnabledFor(logging.DEBUG):
            adapters = "+".join(f"{adapter.name}@{adapter.digest[:12]}" for adapter in seq.adapters) or "base"
            log.debug(
                "admitted %s of %s: %d tokens, %d cached, %d in this step; %d running, %d waiting, %d KV blocks free",
                *(seq.request.id, adapters, len(seq.tokens), start, count),
                *(len(self), len(self._waiting) - 1, self._pool.free),  # it still is in the queue
            )
        return ScheduledSequence(seq, start, count)

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """Allocate blocks for `tokens` tokens of a sequence, preempting others or itself if there are none."""
        while (more := -(-tokens // self._pool.block_size) - len(seq.blocks)) > 0:
            blocks = self._pool.allocate(more)
            if blocks is not None:
                seq.blocks.extend(blocks)
                return True
            victim = max(self._seqs, key=_served)
            self.preempt(victim, seq)
            if victim is seq:
                return False
        return True

    def preempt(self, seq: Sequence, wanting: Sequence | None = None) -> None:
        """Let a sequence give up its blocks and wait again.

        Args:
            wanting: the one that needs blocks; None if the reason is that its adapters have left memory.
        """
        if log.isEnabledFor(logging.DEBUG):
            reason = "its adapter left memory" if wanting is None else f"no KV block is free for {wanting.request.id}"
            log.debug(
                "preempted %s with %d tokens in %d blocks: %s", seq.request.id, seq.computed, len(seq.blocks), reason
            )
        self.remove(seq)
        self._waiting.add(seq)
        self.preemptions += 1

    def remove(self, seq: Sequence, *, forget: bool = False) -> None:
        """Free a sequence's blocks (`forget`: drop them from the prefix index)."""
        del self._seqs[seq]
        seq.share.add_holders(-1)
        self._pool.release(seq.blocks, forget=forget)
        seq.blocks = array("i")
        seq.computed = 0
        seq.indexed = 0

    def mark_computed(self, part: ScheduledSequence) -> None:
        """Record that the KV of a part was computed; its full blocks are added to the prefix index."""
        seq = part.seq
        size = self._pool.block_size
        done = min(part.end, seq.computed)  # 0 if it was preempted meanwhile
        findable = done if self.prefix_cache else min(done, seq.virtual)
        while (seq.indexed + 1) * size <= findable:
            self._pool.index(seq.blocks[seq.indexed], seq.prefix_key(seq.indexed, size))
            seq.indexed += 1

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Indexed blocks that hold the sequence's prefix; at least its last token is always computed."""
        use_cache = self.prefix_cache and not seq.needs_whole_prompt
        size = self._pool.block_size
        whole = (len(seq.tokens) - 1 if use_cache else seq.virtual) // size
        return self._pool.find(seq.prefix_key(block, size) for block in range(whole))
