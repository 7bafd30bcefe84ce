"""Continuous batching: which sequences run in the next step, with how many tokens, in which KV blocks.

Pure decisions over plain state: no tensors, no clock. Under a token budget, sequences that decode come first with one
token each; prefills take the rest in chunks, and beside sequences that decode no more than the prefill budget. Who is
owed most (`fairness.py`) starts first. A newcomer with a right to a row of a full step gets one at once: sequences that
are owed least take turns in the other rows, and keep their KV meanwhile. A sequence whose adapter is being copied to
the device is left out while others can run; one whose adapter had to leave memory is preempted. A step's work does not
depend on how many sequences wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set

from lora_serve.engine.fairness import AdapterSet, Fairness, Rank
from lora_serve.engine.loaded_sets import IsLoaded, LoadedSets
from lora_serve.engine.prefill_pacer import Demand
from lora_serve.engine.running import RunningSequences
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.sequence import IN_FLIGHT_TOKEN, Sequence
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.engine.waiting import InTurn, WaitingQueue
from lora_serve.kv.pool import BlockPool

PrefillBudget = Callable[[Demand], int]  # → prompt tokens of this step

MOST_HOLDERS = 2  # times the sequences of a step: that hold KV blocks, because newcomers with a right to a row come


def _turn(seq: Sequence) -> tuple[Rank, int]:
    """Order in which prompts are computed: by what is owed, then by age."""
    return seq.share.rank, seq.order


def _turn_in_step(seq: Sequence) -> tuple[Rank, int]:
    """Order in which running sequences get rows of a step: by what is owed, then the one that ran least recently."""
    return seq.share.rank, seq.last_step


class Scheduler:
    """Waiting and running sequences, and what each step computes: `assign_slots`, then `schedule`.

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
        self.waiting = WaitingQueue()
        self.running = RunningSequences(pool, self.waiting, prefix_cache=prefix_cache)
        self.step = 0
        self._loaded = LoadedSets(rotation, lambda: fairness.adapter_sets)
        self._pinned: Set[str] = frozenset()
        # Of the step that was begun: sequences that may run, in order of age; adapters with slots; sets that have all.
        self._runnable: list[Sequence] = []
        self._resident: set[str] = set()
        self._ready: list[AdapterSet] = []

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
            self._loaded.add(seq.digests)

    def assign_slots(
        self, is_loaded: IsLoaded, pinned: Set[str] = frozenset(), *, arrived: Collection[str] = ()
    ) -> list[str]:
        """Begin a step: assign device slots; returns the adapters whose turn begins, which may have to be copied.

        Args:
            is_loaded: whether an adapter (by digest) is in memory, so that it can get a slot at once.
            pinned: adapters that always keep their slot.
            arrived: adapters that came into memory since the last step.
        """
        self.step += 1
        self._pinned = pinned
        self._loaded.look_up(arrived, is_loaded)
        self._resident = self.rotation.assign(self.step, pinned, lambda each: self._loaded.check([each], is_loaded))
        running = [seq for seq in self.running.by_age if not seq.last_token_in_flight]
        ready = self.rotation.resident_sets() if self.waiting else []
        self._loaded.check(dict.fromkeys([*ready, *(seq.digests for seq in running)]), is_loaded)  # may be evicted
        for seq in running:
            if seq.digests not in self._loaded:  # others need the memory first: it must not hold what they wait for
                self.running.preempt(seq)
        self._runnable = [seq for seq in running if seq.digests in self._loaded]
        self._ready = [adapter_set for adapter_set in ready if adapter_set in self._loaded]
        return self.rotation.began

    def schedule(
        self, prefill_budget: PrefillBudget | None = None, copying: Set[str] = frozenset()
    ) -> list[ScheduledSequence]:
        """Schedule the step that was begun and allocate its KV blocks.

        Args:
            prefill_budget: limit on prompt tokens beside sequences that decode; None: the token budget only.
            copying: adapters whose copies to the device are not complete.
        """
        resident = [seq for seq in self._runnable if self._resident.issuperset(seq.digests)]
        scheduled: list[ScheduledSequence] = []
        if copying:
            scheduled = self._fill(
                [seq for seq in resident if copying.isdisjoint(seq.digests)],
                [each for each in self._ready if copying.isdisjoint(each)],
                prefill_budget,
            )
        if not scheduled:  # if only such can run whose adapters are being copied, the step waits for the copies
            scheduled = self._fill(resident, self._ready, prefill_budget)
        if not scheduled:
            # The resident adapters' sequences cannot start because paused ones hold the KV blocks: resume these.
            scheduled = self._fill(self._resumable(), [], prefill_budget)
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
        self.running.mark_computed(part)

    def remove(self, seq: Sequence, *, forget: bool = False) -> None:
        """Remove a waiting or running sequence and free its blocks (`forget`: drop them from the prefix index)."""
        if seq in self.running:
            self.running.remove(seq, forget=forget)
        else:
            self.waiting.remove(seq)
        self.fairness.leave(seq.share)
        if not seq.share.active:
            self.rotation.forget(seq.share)
        if seq.digests not in self.fairness.adapter_sets:
            self._loaded.remove(seq.digests)

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
            self._admit(queue, None if newcomer is None or newcomer in self.running else newcomer, scheduled, budget)
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
        return seq if seq is not None and self.running.has_blocks_for(seq) else None

    def _resumable(self) -> list[Sequence]:
        """Running sequences, oldest first, as long as all their adapters fit the slots; ignores the rotation."""
        chosen: list[Sequence] = []
        digests: set[str] = set()
        for seq in self._runnable:
            if self.rotation.fits(more := digests.union(seq.digests), self._pinned):
                digests = more
                chosen.append(seq)
        return chosen

    def _continue(self, seqs: list[Sequence], scheduled: list[ScheduledSequence], budget: int) -> int:
        """Schedule running sequences; returns the remaining token budget."""
        for seq in seqs:
            if seq not in self.running:
                continue  # just preempted for another one
            count = min(seq.pending, budget)
            if count > 0 and self.running.extend(seq, seq.computed + count):
                scheduled.append(ScheduledSequence(seq, seq.computed, count))
                budget -= count
        return budget

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
            part = self.running.start(seq, budget)
            if part is None:
                break
            newcomer = None if seq is newcomer else newcomer
            queue.remove(seq)
            scheduled.append(part)
            budget -= part.count
        return budget
