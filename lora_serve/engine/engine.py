"""The engine: take messages, make one step, tell what happened. Synchronous, one thread, no sockets.

Where the device is not the host, a step is planned and launched while the one before it still runs, and only then are
the outcomes of that one read: the device never waits for Python. A sequence may so be one step further than is known;
what was computed for one that has ended is dropped.

It never touches the disk and never waits: loading, checking and storing adapters happen in the registry's threads, and
their results are picked up at the beginning of a step.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from lora_serve.adapters.registry import InMemory, Lease, LoadFailed, Registry
from lora_serve.config import ServeConfig
from lora_serve.engine.admission import check, check_room
from lora_serve.engine.in_flight import InFlightStep, launch
from lora_serve.engine.operations import start
from lora_serve.engine.prefill_pacer import PrefillPacer
from lora_serve.engine.runner import Runner, SequenceOutput
from lora_serve.engine.scheduler import Scheduler, Work
from lora_serve.engine.sequence import Sequence
from lora_serve.engine.startup import assemble
from lora_serve.errors import BadRequest, Failure, Overloaded, ServeError, Unavailable
from lora_serve.messages import (
    Abort,
    Call,
    Drain,
    EngineInfo,
    Generate,
    Reply,
    Stats,
    StepReport,
    Update,
)
from lora_serve.request import Admitted, Event, Finished, Logprob, Request, Served, Tokens

log = logging.getLogger(__name__)

LEAST_TOKENS = 16  # that a step may take, however little memory there is


class Engine:
    """One resident base serving many sequences.

    Args:
        info: what callers must know of the base.
        scheduler, runner, registry: decisions, device, adapters.
        max_queue: sequences that may wait.
    """

    def __init__(
        self, info: EngineInfo, scheduler: Scheduler, runner: Runner, registry: Registry, *, max_queue: int
    ) -> None:
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._registry = registry
        self._max_queue = max_queue
        self._sequences: dict[str, Sequence] = {}
        self._leases: dict[str, list[Lease]] = {}
        self._prompt_logprobs: dict[str, list[Logprob | None]] = {}
        self._events: list[Event] = []
        self._replies: list[Reply] = []
        self._draining: list[int] | None = None  # ids of the calls to answer when nothing runs any more
        self._flight: InFlightStep | None = None
        self._landed = 0.0  # when the last flight did
        self._pace = PrefillPacer()
        self._admitted = 0
        self._steps = 0
        self._stalled = True  # nothing can run until a message or a finished load changes that

    @classmethod
    def build(
        cls,
        config: ServeConfig,
        *,
        wake: Callable[[], None],
        progress: Callable[[str, float], None],
        overlap: bool | None = None,
    ) -> Engine:
        """Load the base and everything around it; raises ModelUnsupported and other ServeErrors if that cannot be.

        Args:
            ahead: see `assemble`.
        """
        parts = assemble(config, wake, progress, overlap)
        return cls(parts.info, parts.scheduler, parts.runner, parts.registry, max_queue=config.max_queue)

    @property
    def busy(self) -> bool:
        """Whether another step would do something now."""
        running = bool(self._sequences) and not self._stalled
        return bool(self._events) or bool(self._replies) or running or self.step_in_flight

    @property
    def step_in_flight(self) -> bool:
        """Whether a step runs on the device whose outcomes are not read yet."""
        return self._flight is not None

    def receive(self, message: Generate | Abort | Call) -> None:
        """Take one message in. Refusals become events or replies; nothing is raised."""
        self._stalled = False
        if isinstance(message, Generate):
            try:
                self._admit(message.request)
            except ServeError as error:
                self._events.append(Finished(message.request.id, "error", failure=Failure.of(error)))
        elif isinstance(message, Abort):
            seq = self._sequences.get(message.request_id)
            if seq is not None:
                self._finish(seq, "abort")
        else:
            self._call(message)

    def step(self) -> Update:
        """Launch a step, if anything can run, and land the one before; returns all events since the last call."""
        if self._registry.poll():
            self._stalled = False
        self._load_ahead()
        report = self._land() if self._flight is not None and self._flight.steers else None
        work = self._scheduler.plan(self._loaded, self._registry.pinned, self._pace.room)
        before, self._flight = self._flight, self._fly(work) if work else None
        if before is not None:
            report = self._settled(before)
        if self._flight is not None and (self._runner.out_of_memory or not self._runner.overlap):
            report = self._land()
        self._take_less()
        self._stalled = not work and report is None  # what landed may have made room
        if self._draining is not None and not self._sequences:
            self._replies += [Reply(call) for call in self._draining]
            self._draining = []
        events, self._events = self._events, []
        return Update(events, None, report)

    def replies(self) -> list[Reply]:
        """Answers to calls that became ready."""
        replies, self._replies = self._replies, []
        return replies

    def stats(self) -> Stats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        stats = Stats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            kv_blocks_used=pool.used,
            kv_blocks=pool.blocks,
            prefix_tokens_total=scheduler.prefix_tokens,
            prefix_hit_tokens_total=scheduler.prefix_hits,
            preemptions_total=scheduler.preemptions,
            steps_total=self._steps,
            waiting_adapters=sorted({adapter.name for seq in scheduler.waiting for adapter in seq.adapters}),
        )
        self._registry.fill(stats)
        return stats

    def close(self) -> None:
        """End all that runs (a last `step` hands out the events) and free the adapters."""
        for seq in list(self._sequences.values()):
            self._finish(seq, "error", Unavailable("the server is shutting down", retry_after=5))
        self._registry.close()

    # --- requests ------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Check a request, lease its adapters and queue it; raises the ServeError that refuses it."""
        if self._draining is not None:
            raise Unavailable("the server is shutting down", retry_after=5)
        if request.id in self._sequences:
            raise BadRequest("a request with this id is already running", param="request_id")
        if len(self._scheduler.waiting) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests are waiting already", retry_after=1)
        leases: list[Lease] = []
        try:
            for use in request.adapters:
                leases.append(self._registry.acquire(use))
            check(request, leases, self.info)
            check_room(leases, self._registry.pinned, self._scheduler.rotation)
        except ServeError:
            for lease in leases:
                self._registry.release(lease)
            raise
        seq = self._sequence(request, leases)
        self._admitted += 1
        self._sequences[request.id] = seq
        self._leases[request.id] = leases
        self._scheduler.add(seq)
        self._events.append(Admitted(request.id, list(seq.adapters)))

    def _sequence(self, request: Request, leases: list[Lease]) -> Sequence:
        sampling = request.sampling
        virtual = max((lease.traits.virtual for lease in leases), default=0)
        return Sequence(
            request=request,
            order=self._admitted,
            adapters=tuple(Served(lease.name, lease.digest, lease.weight) for lease in leases),
            seed=int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed,
            stop_ids=frozenset(sampling.stop_token_ids)
            | (frozenset() if sampling.ignore_eos else frozenset(self.info.eos_token_ids)),
            limit=min(virtual + len(request.prompt) + sampling.max_tokens, self.info.max_model_len),
            traits={lease.digest: lease.traits for lease in leases},
        )

    def _fly(self, work: list[Work]) -> InFlightStep:
        """Start a step; what comes after it may be planned."""
        flight = launch(work, self._runner, self._registry)
        for item in flight.work:
            self._scheduler.mark_launched(item)
        return flight

    def _take_less(self) -> None:
        """After a step that ran out of memory: smaller ones from now on."""
        if self._runner.out_of_memory:
            self._runner.out_of_memory = False
            self._scheduler.max_tokens = max(LEAST_TOKENS, self._scheduler.max_tokens // 2)
            log.warning("a step ran out of memory; steps take %d tokens at most now", self._scheduler.max_tokens)

    def _land(self) -> StepReport | None:
        """Wait for the step that runs."""
        flight, self._flight = self._flight, None
        return None if flight is None else self._settled(flight)

    def _settled(self, flight: InFlightStep) -> StepReport:
        """Wait for a step and take its results; what it took of the device's time."""
        for outcome in flight.landing():
            if self._sequences.get(outcome.work.seq.request.id) is outcome.work.seq:  # else it ended meanwhile
                self._settle(outcome)
        self._steps += 1
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.started, self._landed), now
        tokens, decoding = (sum(item.count for item in flight.work), sum(item.count == 1 for item in flight.work))
        self._pace.note(decoding, tokens - decoding, seconds)
        return StepReport(len(flight.work), tokens, flight.adapters, seconds)

    def _settle(self, outcome: SequenceOutput) -> None:
        """Take one sequence's result of the step."""
        item, seq = outcome.work, outcome.work.seq
        if outcome.failure is not None:
            self._finish(seq, "error", outcome.failure, forget=True)
            return
        self._scheduler.computed(item)
        prompt_logprobs = None if outcome.prompt_logprobs is None else self._collect(item, outcome.prompt_logprobs)
        if outcome.token is None:
            return
        cached = seq.cached or 0
        if item.end < seq.limit and outcome.token not in seq.stop_ids:
            seq.tokens[item.end] = outcome.token
            logprobs = None if outcome.logprob is None else [outcome.logprob]
            self._events.append(Tokens(seq.request.id, [outcome.token], logprobs, prompt_logprobs, cached))
            if item.end + 1 == seq.limit:
                self._finish(seq, "length")
            return
        if prompt_logprobs is not None or item.end == seq.prompt_end:
            self._events.append(Tokens(seq.request.id, [], None, prompt_logprobs, cached))
        if item.end >= seq.limit:
            self._finish(seq, "length")
        else:
            self._finish(seq, "stop", stop_token=outcome.token)

    def _collect(self, item: Work, found: list[Logprob]) -> list[Logprob | None] | None:
        """Gather a chunked prompt's log-probabilities; all of them once the prompt is done."""
        request = item.seq.request
        if item.start <= item.seq.virtual:  # it begins, perhaps again
            self._prompt_logprobs[request.id] = [None]
        self._prompt_logprobs[request.id] += found
        return self._prompt_logprobs.pop(request.id) if item.last else None

    def _finish(
        self,
        seq: Sequence,
        reason: str,
        error: ServeError | None = None,
        *,
        stop_token: int | None = None,
        forget: bool = False,
    ) -> None:
        """The one way out, on every path: blocks, leases and state are freed."""
        self._scheduler.remove(seq, forget=forget)
        del self._sequences[seq.request.id]
        self._prompt_logprobs.pop(seq.request.id, None)
        for lease in self._leases.pop(seq.request.id):
            self._registry.release(lease)
        self._events.append(Finished(seq.request.id, reason, stop_token, None if error is None else Failure.of(error)))

    # --- adapters ------------------------------------------------------------------------------------------------

    def _loaded(self, digest: str) -> bool:
        return isinstance(self._registry.state(digest), InMemory)

    def _load_ahead(self) -> None:
        """Ask for adapters that the oldest sequences lack, as many as there are slots; end those whose load failed."""
        lacking: dict[str, None] = {}
        for seq in list(self._sequences.values()):
            for digest in seq.digests:
                state = self._registry.state(digest)
                if isinstance(state, LoadFailed):
                    self._finish(seq, "error", state.error)
                    break
                if not isinstance(state, InMemory):
                    lacking[digest] = None
        for digest in list(lacking)[: self._scheduler.rotation.slots]:
            self._registry.want(digest)

    def _call(self, call: Call) -> None:
        """Start an operation; its answer is among the `replies` when it is ready."""

        def done(result: Any) -> None:
            if isinstance(result, ServeError):
                self._replies.append(Reply(call.id, failure=Failure.of(result)))
            else:
                self._replies.append(Reply(call.id, msgspec.to_builtins(result)))

        try:
            if isinstance(call.operation, Drain):
                self._draining = [*(self._draining or []), call.id]
            else:
                start(call.operation, self._registry, done)
        except ServeError as error:
            done(error)
