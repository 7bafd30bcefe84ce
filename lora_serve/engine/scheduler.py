"""Continuous batching: which sequences run in the next step, with how many tokens, in which KV blocks.

Pure decisions over plain state: no tensors, no clock. Under a token budget, sequences that decode come first with one
token each; prefills take the rest in chunks, oldest first, and beside sequences that decode no more than the prefill
budget. When KV blocks run out, the youngest sequence is preempted: its blocks are freed and it is prefilled again later
(mostly from the prefix cache). A step's work does not depend on how many sequences wait.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from operator import attrgetter

from lora_serve.engine.fairness import AdapterSet, SlotRotation
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.engine.waiting import WaitingQueue
from lora_serve.kv.pool import BlockPool

PrefillBudget = Callable[[int, int], int]  # sequences that decode, sequences to prefill → prompt tokens of this step

_order = attrgetter("order")


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's part of a step: its tokens `start` to `end` are computed.

    `samples`: whether its next token is sampled, because this part includes the last of its tokens, and it generates.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        samples = self.end == len(self.seq.tokens) and self.seq.pooling is None  # fixed now: the tokens grow later
        object.__setattr__(self, "samples", samples)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def awaits_token(self) -> bool:
        """Whether its next token is still to be sampled: a grammar may have forced it since the launch."""
        tokens = self.seq.tokens
        return self.samples and (len(tokens) == self.end or tokens[self.end] == IN_FLIGHT_TOKEN)


class Scheduler:
    """Waiting and running sequences, and what each step computes.

    Attributes:
        running: sequences that hold KV blocks.
        waiting: sequences that do not.

    Args:
        pool: the KV blocks.
        rotation: assigns device slots to adapters.
        max_seqs: maximum number of running sequences.
        max_tokens: token budget of one step.
        prefix_cache: look up and index full blocks; blocks of virtual tokens always are.
    """

    def __init__(
        self, pool: BlockPool, rotation: SlotRotation, *, max_seqs: int, max_tokens: int, prefix_cache: bool
    ) -> None:
        self.pool = pool
        self.rotation = rotation
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self.prefix_cache = prefix_cache
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.step = 0
        self.preemptions = 0
        self.prefix_tokens = 0
        self.prefix_hits = 0
        self._users: Counter[AdapterSet] = Counter()  # sequences by adapter set
        self._unloaded: dict[AdapterSet, None] = {}  # not known to be in memory, in order of arrival
        self._new: list[AdapterSet] = []  # those of `_unloaded` that were not looked up yet

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, step {self.step}, {self.pool!r}>"

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.add(seq)
        self._users[seq.digests] += 1
        if self._users[seq.digests] == 1 and seq.digests:
            self._unloaded[seq.digests] = None
            self._new.append(seq.digests)

    def schedule(
        self,
        is_loaded: Callable[[str], bool],
        pinned: Set[str] = frozenset(),
        prefill_budget: PrefillBudget | None = None,
        *,
        loads_finished: bool = True,
    ) -> list[ScheduledSequence]:
        """Schedule one step and allocate its KV blocks.

        Args:
            is_loaded: whether an adapter (by digest) is in memory, so that it can get a slot at once.
            pinned: adapters that always keep their slot.
            prefill_budget: limit on prompt tokens beside sequences that decode; None: the token budget only.
            loads_finished: whether adapters may have come into memory since the last step.
        """
        self.step += 1
        new, self._new = self._new, []
        self._check_loaded(list(self._unloaded) if loads_finished else new, is_loaded)
        resident = self.rotation.assign(self.step, pinned, lambda each: self._check_loaded([each], is_loaded))
        running = [seq for seq in sorted(self.running, key=_order) if not seq.last_token_in_flight]
        ready = self.rotation.resident_sets() if self.waiting else []
        self._check_loaded(dict.fromkeys([*ready, *(seq.digests for seq in running)]), is_loaded)  # may be evicted
        running = [seq for seq in running if seq.digests not in self._unloaded]
        scheduled = self._fill(
            [seq for seq in running if resident.issuperset(seq.digests)],
            [adapter_set for adapter_set in ready if adapter_set not in self._unloaded],
            prefill_budget,
        )
        if not scheduled:
            # The resident adapters' sequences cannot start because paused ones hold the KV blocks: resume these.
            scheduled = self._fill(self._resumable(running, pinned), [], prefill_budget)
        return scheduled

    @property
    def adapter_sets(self) -> list[AdapterSet]:
        """The adapter sets of all sequences."""
        return list(self._users)

    def users(self, adapter_set: AdapterSet) -> list[Sequence]:
        """All sequences that need exactly these adapters."""
        return [*(seq for seq in self.running if seq.digests == adapter_set), *self.waiting.of(adapter_set)]

    def mark_launched(self, part: ScheduledSequence) -> None:
        """Record that a part was launched, so that the next step can be scheduled before its outputs are read."""
        part.seq.computed = part.end
        if part.samples:
            part.seq.tokens.append(IN_FLIGHT_TOKEN)

    def mark_computed(self, part: ScheduledSequence) -> None:
        """Record that the KV of a part was computed; its full blocks are added to the prefix index."""
        seq = part.seq
        size = self.pool.block_size
        done = min(part.end, seq.computed)  # 0 if it was preempted meanwhile
        findable = done if self.prefix_cache else min(done, seq.virtual)
        while (seq.indexed + 1) * size <= findable:
            self.pool.index(seq.blocks[seq.indexed], seq.prefix_key(seq.indexed, size))
            seq.indexed += 1

    def remove(self, seq: Sequence, *, forget: bool = False) -> None:
        """Remove a waiting or running sequence and free its blocks (`forget`: drop them from the prefix index)."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._free(seq, forget=forget)
        self._users[seq.digests] -= 1
        if self._users[seq.digests]:
            return
        del self._users[seq.digests]
        if seq.digests in self._unloaded:
            del self._unloaded[seq.digests]
        elif seq.digests:
            self.rotation.remove(seq.digests)

    def _check_loaded(self, adapter_sets: Iterable[AdapterSet], is_loaded: Callable[[str], bool]) -> bool:
        """Update which adapter sets are in memory, so that they can get slots; whether all of these are."""
        for adapter_set in adapter_sets:
            if adapter_set not in self._users:  # its last sequence left
                continue
            loaded, was_unloaded = all(map(is_loaded, adapter_set)), adapter_set in self._unloaded
            if loaded and was_unloaded:
                del self._unloaded[adapter_set]
                self.rotation.add(adapter_set)
            elif not loaded and not was_unloaded:
                self._unloaded[adapter_set] = None
                self.rotation.remove(adapter_set)
        return not any(adapter_set in self._unloaded for adapter_set in adapter_sets)

    def _fill(
        self, running: list[Sequence], ready: list[AdapterSet], prefill_budget: PrefillBudget | None
    ) -> list[ScheduledSequence]:
        """Fill a step with running sequences, oldest first, then with waiting ones of the `ready` adapter sets."""
        before = set(self.running)
        scheduled: list[ScheduledSequence] = []
        queued = self.waiting.count(ready)
        budget = self._continue([seq for seq in running if seq.pending == 1], scheduled, self.max_tokens)
        prefills = len(running) - len(scheduled) + queued
        if prefill_budget is not None and scheduled and prefills:
            budget = min(budget, prefill_budget(len(scheduled), prefills))
        budget = self._continue([seq for seq in running if seq.pending > 1], scheduled, budget)
        self._admit(ready, before, scheduled, budget)
        preempted = before.difference(self.running)
        return [part for part in scheduled if part.seq not in preempted]

    def _resumable(self, running: list[Sequence], pinned: Set[str]) -> list[Sequence]:
        """Running sequences, oldest first, as long as all their adapters fit the slots; ignores the rotation."""
        chosen: list[Sequence] = []
        digests: set[str] = set()
        for seq in running:
            if self.rotation.fits(more := digests.union(seq.digests), pinned):
                digests = more
                chosen.append(seq)
        return chosen

    def _continue(self, seqs: list[Sequence], scheduled: list[ScheduledSequence], budget: int) -> int:
        """Schedule running sequences; returns the remaining token budget."""
        for seq in seqs:
            if seq not in self.running:
                continue  # just preempted for an older one
            count = min(seq.pending, budget)
            if count > 0 and self._extend(seq, seq.computed + count):
                scheduled.append(ScheduledSequence(seq, seq.computed, count))
                budget -= count
        return budget

    def _extend(self, seq: Sequence, tokens: int) -> bool:
        """Allocate blocks for `tokens` tokens of a running sequence; if there are none, preempt younger sequences."""
        while (more := -(-tokens // self.pool.block_size) - len(seq.blocks)) > 0:
            blocks = self.pool.allocate(more)
            if blocks is not None:
                seq.blocks.extend(blocks)
                return True
            youngest = max(self.running, key=_order)
            self._preempt(youngest)
            if youngest is seq:
                return False
        return True

    def _admit(
        self, ready: list[AdapterSet], before: Set[Sequence], scheduled: list[ScheduledSequence], budget: int
    ) -> None:
        """Start waiting sequences, oldest first, until one does not fit; skips those preempted in this step."""
        if budget <= 0 or len(self.running) >= self.max_seqs:
            return
        started = []
        for seq in self.waiting.oldest_first(ready):
            if seq in before:
                continue
            part = self._start(seq, budget)
            if part is None:
                break
            started.append(seq)
            scheduled.append(part)
            budget -= part.count
            if budget <= 0:
                break
        for seq in started:
            self.waiting.remove(seq)

    def _start(self, seq: Sequence, budget: int) -> ScheduledSequence | None:
        """Start a waiting sequence with its first chunk; None if there are not enough free blocks."""
        # One spare block per running sequence for its next tokens, so that starting one does not preempt others.
        spare = len(self.running)
        if spare >= self.max_seqs:
            return None
        found = self._cached_blocks(seq)
        start = len(found) * self.pool.block_size
        count = min(len(seq.tokens) - start, budget)
        missing = -(-(start + count) // self.pool.block_size) - len(found)
        if missing + spare > self.pool.free_after_holding(found):
            return None
        self.pool.hold(found)
        seq.blocks = array("i", found + (self.pool.allocate(missing) or []))
        seq.computed = start
        seq.indexed = len(found)
        if seq.cached is None:
            seq.cached = max(0, start - seq.virtual)
            self.prefix_tokens += len(seq.request.prompt)
            self.prefix_hits += seq.cached
        self.running.append(seq)
        return ScheduledSequence(seq, start, count)

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Indexed blocks that hold the sequence's prefix; at least its last token is always computed."""
        use_cache = self.prefix_cache and not seq.needs_whole_prompt
        size = self.pool.block_size
        whole = (len(seq.tokens) - 1 if use_cache else seq.virtual) // size
        return self.pool.find(seq.prefix_key(block, size) for block in range(whole))

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free(seq)
        self.waiting.add(seq)
        self.preemptions += 1

    def _free(self, seq: Sequence, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = array("i")
        seq.computed = 0
        seq.indexed = 0
