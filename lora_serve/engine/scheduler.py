"""Continuous batching: which sequences run in the next step, with how many tokens, in which KV blocks.

Pure decisions over plain state: no tensors, no clock. Under a token budget, sequences that decode come first with one
token each; prefills take the rest in chunks, and beside sequences that decode no more than the prefill budget. Who is
owed most (`fairness.py`) starts first. A newcomer with a right to a row of a full step gets one at once: sequences that
are owed least take turns in the other rows, and keep their KV meanwhile. When KV blocks run out, the youngest sequence
is preempted: its blocks are freed and it is prefilled again later (mostly from the prefix cache); so is one whose
adapter had to leave memory. A step's work does not depend on how many sequences wait.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass, field
from operator import attrgetter

from lora_serve.engine.fairness import AdapterSet, Fairness, Rank
from lora_serve.engine.prefill_pacer import Demand
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.engine.waiting import InTurn, WaitingQueue
from lora_serve.kv.pool import BlockPool

PrefillBudget = Callable[[Demand], int]  # → prompt tokens of this step

MOST_HOLDERS = 2  # times the sequences of a step: that hold KV blocks, because newcomers with a right to a row come

_order = attrgetter("order")


def _turn(seq: Sequence) -> tuple[Rank, int]:
    """Order in which prompts are computed: by what is owed, then by age."""
    return seq.share.rank, seq.order


def _turn_in_step(seq: Sequence) -> tuple[Rank, int]:
    """Order in which running sequences get rows of a step: by what is owed, then the one that ran least recently."""
    return seq.share.rank, seq.last_step


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
    def decodes(self) -> bool:
        """Whether it is one token after the prompt, and not the rest of a prompt."""
        return self.count == 1 and self.start >= self.seq.prompt_end

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
        fairness: who is owed most.
        max_seqs: maximum number of sequences in one step.
        max_tokens: token budget of one step.
        prefix_cache: look up and index full blocks; blocks of virtual tokens always are.
    """

    def __init__(
        self,
        pool: BlockPool,
        rotation: SlotRotation,
        fairness: Fairness,
        *,
        max_seqs: int,
        max_tokens: int,
        prefix_cache: bool,
    ) -> None:
        self.pool = pool
        self.rotation = rotation
        self.fairness = fairness
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self.prefix_cache = prefix_cache
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.step = 0
        self.preemptions = 0
        self.started = 0
        self.prefix_tokens = 0
        self.prefix_hits = 0
        self._unloaded: dict[AdapterSet, None] = {}  # not known to be in memory
        self._unloaded_with: dict[str, set[AdapterSet]] = {}  # those of them that contain an adapter
        self._new: list[AdapterSet] = []  # those of `_unloaded` that were not looked up yet

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, step {self.step}, {self.pool!r}>"

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        is_needed = seq.digests in self.fairness.adapter_sets
        request = seq.request
        seq.share = self.fairness.enter(request.tenant, request.weight, request.priority, seq.digests)
        self.waiting.add(seq)
        if is_needed:
            self.rotation.update(seq.digests)
        elif seq.digests:
            self._mark_unloaded(seq.digests)
            self._new.append(seq.digests)

    def schedule(
        self,
        is_loaded: Callable[[str], bool],
        pinned: Set[str] = frozenset(),
        prefill_budget: PrefillBudget | None = None,
        *,
        arrived: Collection[str] = (),
    ) -> list[ScheduledSequence]:
        """Schedule one step and allocate its KV blocks.

        Args:
            is_loaded: whether an adapter (by digest) is in memory, so that it can get a slot at once.
            pinned: adapters that always keep their slot.
            prefill_budget: limit on prompt tokens beside sequences that decode; None: the token budget only.
            arrived: adapters that came into memory since the last step.
        """
        self.step += 1
        new, self._new = self._new, []
        self._check_loaded(
            [*new, *(each for digest in arrived for each in self._unloaded_with.get(digest, ()))], is_loaded
        )
        resident = self.rotation.assign(self.step, pinned, lambda each: self._check_loaded([each], is_loaded))
        running = [seq for seq in sorted(self.running, key=_order) if not seq.last_token_in_flight]
        ready = self.rotation.resident_sets() if self.waiting else []
        self._check_loaded(dict.fromkeys([*ready, *(seq.digests for seq in running)]), is_loaded)  # may be evicted
        for seq in running:
            if seq.digests in self._unloaded:  # others need the memory first: it must not hold what they wait for
                self._preempt(seq)
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
        return list(self.fairness.adapter_sets)

    def users(self, adapter_set: AdapterSet) -> list[Sequence]:
        """All sequences that need exactly these adapters."""
        return [*(seq for seq in self.running if seq.digests == adapter_set), *self.waiting.of(adapter_set)]

    def mark_launched(self, part: ScheduledSequence) -> None:
        """Record that a part was launched, so that the next step can be scheduled before its outputs are read."""
        seq = part.seq
        seq.last_step = self.step
        # What is computed again after a preemption is not charged again. A token that was sampled was charged then; one
        # that a grammar forced was not.
        start = max(part.start, seq.charged)
        forced = max(0, part.end - max(start, seq.prompt_end) - 1)
        seq.share.charge(max(0, min(part.end, seq.prompt_end) - start) + forced, int(part.samples))
        seq.charged = max(seq.charged, part.end)
        seq.computed = part.end
        if part.samples:
            seq.tokens.append(IN_FLIGHT_TOKEN)

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
        if seq in self.running:
            self.running.remove(seq)
            seq.share.add_holders(-1)
        else:
            self.waiting.remove(seq)
        self._free(seq, forget=forget)
        self.fairness.leave(seq.share)
        if not seq.share.active:
            self.rotation.forget(seq.share)
        if seq.digests in self.fairness.adapter_sets:
            return
        if seq.digests in self._unloaded:
            self._unmark_unloaded(seq.digests)
        elif seq.digests:
            self.rotation.remove(seq.digests)

    def _check_loaded(self, adapter_sets: Iterable[AdapterSet], is_loaded: Callable[[str], bool]) -> bool:
        """Update which adapter sets are in memory, so that they can get slots; whether all of these are."""
        for adapter_set in adapter_sets:
            if adapter_set not in self.fairness.adapter_sets:  # its last sequence left
                continue
            loaded, was_unloaded = all(map(is_loaded, adapter_set)), adapter_set in self._unloaded
            if loaded and was_unloaded:
                self._unmark_unloaded(adapter_set)
                self.rotation.add(adapter_set)
            elif not loaded and not was_unloaded:
                self._mark_unloaded(adapter_set)
                self.rotation.remove(adapter_set)
        return not any(adapter_set in self._unloaded for adapter_set in adapter_sets)

    def _mark_unloaded(self, adapter_set: AdapterSet) -> None:
        self._unloaded[adapter_set] = None
        for digest in adapter_set:
            self._unloaded_with.setdefault(digest, set()).add(adapter_set)

    def _unmark_unloaded(self, adapter_set: AdapterSet) -> None:
        del self._unloaded[adapter_set]
        for digest in adapter_set:
            self._unloaded_with[digest].remove(adapter_set)
            if not self._unloaded_with[digest]:
                del self._unloaded_with[digest]

    def _fill(
        self, running: list[Sequence], ready: list[AdapterSet], prefill_budget: PrefillBudget | None
    ) -> list[ScheduledSequence]:
        """Fill a step with running sequences, then with waiting ones of the `ready` adapter sets."""
        before = set(self.running)
        rows = self._owed_most(running, min(self.max_seqs, self.max_tokens))
        decoding = [seq for seq in rows if seq.pending == 1]
        prefilling = sorted((seq for seq in rows if seq.pending > 1), key=_turn)
        queue = self.waiting.in_turn(ready)
        free = self.max_seqs - len(self.running)
        newcomer = self._newcomer(queue) if free <= 0 else None
        able = int(newcomer is not None) if free <= 0 else min(free, self.waiting.count(ready))
        budget = self.max_tokens - len(decoding)
        if prefill_budget is not None and decoding and len(prefilling) + able:
            following = prefilling[0] if prefilling else newcomer or queue.first
            budget = min(budget, prefill_budget(self._demand(decoding, prefilling, following, able)))
        if newcomer is not None and len(rows) == self.max_seqs:
            if budget <= 0 or (prefilling and _turn(prefilling[0]) < _turn(newcomer)):
                newcomer = None  # others' prompts come first
            else:
                staying = set(self._owed_most(rows, self.max_seqs - 1))
                decoding = [seq for seq in decoding if seq in staying]
                prefilling = [seq for seq in prefilling if seq in staying]
        scheduled: list[ScheduledSequence] = []
        self._continue(decoding, scheduled, self.max_tokens)
        if prefilling and before.issubset(self.running):
            budget = self._admit(queue, newcomer, scheduled, budget, before=_turn(prefilling[0]))
        budget = self._continue(prefilling, scheduled, budget)
        if before.issubset(self.running):  # otherwise there is no memory for more
            self._admit(queue, None if newcomer in self.running else newcomer, scheduled, budget)
        holders = set(self.running)
        return [part for part in scheduled if part.seq in holders]

    def _demand(
        self, decoding: list[Sequence], prefilling: list[Sequence], following: Sequence | None, able: int
    ) -> Demand:
        """What the prefill budget depends on.

        Args:
            following: whose prompt is next.
            able: how many waiting sequences could start.
        """
        tokens = sum(seq.pending for seq in prefilling) + self.waiting.mean_tokens * able
        oldest = 0.0 if following is None else following.arrived
        return Demand(len(decoding), len(prefilling) + able, int(tokens), oldest)

    @staticmethod
    def _owed_most(seqs: list[Sequence], rows: int) -> list[Sequence]:
        """So many of the sequences, in the order in which they are given: of a share, those that ran least recently."""
        if len(seqs) <= rows:
            return seqs
        chosen = set(sorted(seqs, key=_turn_in_step)[:rows])
        return [seq for seq in seqs if seq in chosen]

    def _newcomer(self, queue: InTurn) -> Sequence | None:
        """The next waiting sequence that has a right to a row although all are taken, if there is KV for it."""
        if len(self.running) >= MOST_HOLDERS * self.max_seqs:
            return None
        seq = queue.first_entitled(self.max_seqs)
        if seq is None:
            return None
        blocks = -(-len(seq.tokens) // self.pool.block_size)
        return seq if blocks + len(self.running) <= self.pool.free else None

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
        self,
        queue: InTurn,
        newcomer: Sequence | None,
        scheduled: list[ScheduledSequence],
        budget: int,
        *,
        before: tuple[Rank, int] | None = None,
    ) -> int:
        """Start waiting sequences in turn until one does not fit, or the `newcomer` if all rows are taken.

        Args:
            before: only those whose turn is before this one.

        Returns: the remaining token budget.
        """
        while budget > 0:
            full = len(self.running) >= self.max_seqs
            seq = newcomer if full else queue.first
            if seq is None or (before is not None and _turn(seq) >= before):
                break
            part = self._start(seq, budget)
            if part is None:
                break
            newcomer = None if seq is newcomer else newcomer
            queue.remove(seq)
            scheduled.append(part)
            budget -= part.count
        return budget

    def _start(self, seq: Sequence, budget: int) -> ScheduledSequence | None:
        """Start a waiting sequence with its first chunk; None if there are not enough free blocks."""
        found = self._cached_blocks(seq)
        start = len(found) * self.pool.block_size
        count = min(len(seq.tokens) - start, budget)
        missing = -(-(start + count) // self.pool.block_size) - len(found)
        # One spare block per running sequence for its next tokens, so that starting one does not preempt others.
        if missing + len(self.running) > self.pool.free_after_holding(found):
            return None
        self.pool.hold(found)
        seq.blocks = array("i", found + (self.pool.allocate(missing) or []))
        seq.computed = start
        seq.indexed = len(found)
        if seq.cached is None:
            self.started += 1
            seq.cached = max(0, start - seq.virtual)
            self.prefix_tokens += len(seq.request.prompt)
            self.prefix_hits += seq.cached
        self.running.append(seq)
        seq.share.add_holders(1)
        return ScheduledSequence(seq, start, count)

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Indexed blocks that hold the sequence's prefix; at least its last token is always computed."""
        use_cache = self.prefix_cache and not seq.needs_whole_prompt
        size = self.pool.block_size
        whole = (len(seq.tokens) - 1 if use_cache else seq.virtual) // size
        return self.pool.find(seq.prefix_key(block, size) for block in range(whole))

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        seq.share.add_holders(-1)
        self._free(seq)
        self.waiting.add(seq)
        self.preemptions += 1

    def _free(self, seq: Sequence, *, forget: bool = False) -> None:
        self.pool.release(seq.blocks, forget=forget)
        seq.blocks = array("i")
        seq.computed = 0
        seq.indexed = 0
