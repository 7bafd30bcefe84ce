"""Who runs in the next step, with how many tokens, in which blocks. Plain state, no tensors, no clock.

Continuous batching under a token budget: sequences that decode come first with one token each, then prompts take what
is left of the budget in chunks, oldest first, and beside sequences that decode no more than these can wait for. When
blocks run out the youngest sequence is preempted: it gives its blocks back and reads its tokens again later (mostly
from the prefix index).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from lora_serve.engine.fairness import SlotRotation
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.kv.pool import BlockPool

Room = Callable[[int, int], int]  # sequences that decode, others → prompt tokens for these


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: tokens `start` to `end` of it are computed.

    `last` says whether this brings the sequence to where its next token is drawn.
    """

    seq: Sequence
    start: int
    count: int
    last: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "last", self.end == len(self.seq.tokens))  # which grow afterwards

    @property
    def end(self) -> int:
        return self.start + self.count


class Scheduler:
    """Queues of sequences, and the decision over them.

    Args:
        pool: the KV blocks.
        turns: who is seated when adapters outnumber slots.
        max_seqs: sequences that may hold KV at once.
        max_tokens: tokens in one step.
        prefix_cache: look up and index full blocks; those of virtual tokens always are.
    """

    def __init__(
        self, pool: BlockPool, rotation: SlotRotation, *, max_seqs: int, max_tokens: int, prefix_cache: bool
    ) -> None:
        self.pool = pool
        self.rotation = rotation
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.step = 0
        self.preemptions = 0
        self.prefix_tokens = 0
        self.prefix_hits = 0

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, step {self.step}, {self.pool!r}>"

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def plan(
        self, loaded: Callable[[str], bool], pinned: Set[str] = frozenset(), room: Room | None = None
    ) -> list[Work]:
        """Decide one step; blocks for it are allocated.

        Args:
            loaded: whether an adapter (by digest) is in host memory, so that it could be seated at once.
            pinned: adapters that are never unseated.
            room: how many prompt tokens may be taken in beside sequences that decode; None: the token budget alone
                decides.
        """
        self.step += 1
        able = [seq for seq in self._by_age() if not seq.last_token_in_flight and all(map(loaded, seq.digests))]
        resident = self.rotation.assign_slots(self.step, [seq.digests for seq in able], pinned)
        work = self._work([seq for seq in able if resident.issuperset(seq.digests)], room)
        if not work:
            # Those whose turn it is cannot start because paused sequences hold the room: let these run on.
            work = self._work(self._resume(able, pinned), room)
        return work

    def mark_launched(self, item: Work) -> None:
        """The device was given this: what comes next may be planned, though nothing is known of it yet."""
        item.seq.computed = item.end
        if item.last:
            item.seq.tokens.append(IN_FLIGHT_TOKEN)

    def computed(self, item: Work) -> None:
        """The step ran: the tokens of `item` have their KV; full blocks become findable."""
        seq = item.seq
        size = self.pool.block_size
        done = min(item.end, seq.computed)  # nothing, if it was preempted meanwhile
        findable = done if self.prefix_cache else min(done, seq.virtual)
        while (seq.indexed + 1) * size <= findable:
            self.pool.index(seq.blocks[seq.indexed], seq.key(seq.indexed, size))
            seq.indexed += 1

    def remove(self, seq: Sequence, *, forget: bool = False) -> None:
        """Take a sequence out, wherever it is, and free its blocks (`forget`: their content is not to be trusted)."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._free(seq, forget=forget)

    def _by_age(self) -> list[Sequence]:
        return sorted(self.running + self.waiting, key=lambda seq: seq.order)

    def _work(self, seqs: list[Sequence], room: Room | None) -> list[Work]:
        """One step's work out of `seqs`, oldest first."""
        running = set(self.running)
        work: list[Work] = []
        budget = self._continue([s for s in seqs if s in running and s.pending == 1], work, self.max_tokens)
        if room is not None and 0 < len(work) < len(seqs):
            budget = min(budget, room(len(work), len(seqs) - len(work)))
        budget = self._continue([s for s in seqs if s in running and s.pending > 1], work, budget)
        self._admit([s for s in seqs if s not in running], work, budget)
        preempted = running.difference(self.running)
        return [item for item in work if item.seq not in preempted]

    def _resume(self, able: list[Sequence], pinned: Set[str]) -> list[Sequence]:
        """Running sequences whose adapters fit the slots together, turns aside."""
        chosen: list[Sequence] = []
        digests: set[str] = set()
        for seq in able:
            if seq in self.running and self.rotation.fits(more := digests.union(seq.digests), pinned):
                digests = more
                chosen.append(seq)
        return chosen

    def _continue(self, seqs: list[Sequence], work: list[Work], budget: int) -> int:
        for seq in seqs:
            if seq not in self.running:
                continue  # preempted for an older one a moment ago
            count = min(seq.pending, budget)
            if count > 0 and self._extend(seq, seq.computed + count):
                work.append(Work(seq, seq.computed, count))
                budget -= count
        return budget

    def _extend(self, seq: Sequence, tokens: int) -> bool:
        """Give a running sequence blocks for `tokens` tokens, preempting younger ones if need be."""
        while (more := self._lacking(seq, tokens)) > 0:
            blocks = self.pool.allocate(more)
            if blocks is not None:
                seq.blocks.extend(blocks)
                return True
            youngest = max(self.running, key=lambda other: other.order)
            self._preempt(youngest)
            if youngest is seq:
                return False
        return True

    def _admit(self, seqs: list[Sequence], work: list[Work], budget: int) -> None:
        for seq in seqs:
            if budget <= 0:
                return
            item = self._start(seq, budget)
            if item is None:
                return
            work.append(item)
            budget -= item.count

    def _start(self, seq: Sequence, budget: int) -> Work | None:
        """Move a waiting sequence to running with blocks for its first chunk, if there is room."""
        found = self._find(seq)
        start = len(found) * self.pool.block_size
        count = min(len(seq.tokens) - start, budget)
        lacking = -(-(start + count) // self.pool.block_size) - len(found)
        # One spare block for each that runs: room for their next tokens, so that admitting is not preempting.
        spare = len(self.running)
        if spare >= self.max_seqs or lacking + spare > self.pool.free_after_holding(found):
            return None
        self.pool.hold(found)
        seq.blocks = array("i", found + (self.pool.allocate(lacking) or []))
        seq.computed = start
        seq.indexed = len(found)
        if seq.cached is None:
            seq.cached = max(0, start - seq.virtual)
            self.prefix_tokens += len(seq.request.prompt)
            self.prefix_hits += seq.cached
        self.waiting.remove(seq)
        self.running.append(seq)
        return Work(seq, start, count)

    def _find(self, seq: Sequence) -> list[int]:
        """Indexed blocks that hold the beginning of the sequence; at least its last token is always computed."""
        looked_up = self.prefix_cache and not seq.wants_prompt_logits
        size = self.pool.block_size
        whole = (len(seq.tokens) - 1 if looked_up else seq.virtual) // size
        return self.pool.find(seq.key(block, size) for block in range(whole))

    def _lacking(self, seq: Sequence, tokens: int) -> int:
        return -(-tokens // self.pool.block_size) - len(seq.blocks)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.waiting.append(seq)
        self._free(seq)
        self.preemptions += 1

    def _free(self, seq: Sequence, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = array("i")
        seq.computed = 0
        seq.indexed = 0
