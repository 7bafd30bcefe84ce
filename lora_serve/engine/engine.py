"""The engine: take messages, schedule and run steps, send events. Synchronous, one thread, no sockets.

A step is: schedule, launch on the device, process the outputs. On a CPU these follow each other. On a GPU the next step
is scheduled and launched while one is in flight, and only then are the outputs of that one read, so the device never
waits for Python; what was computed for a sequence that turns out to have ended is dropped.

The loop never touches the disk and never waits for a load: publishing and loading adapters run in the registry's
threads, and their results are picked up at the beginning of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from lora_serve.adapters.registry import InMemory, LoadFailed, Registry
from lora_serve.config import ServeConfig
from lora_serve.engine.active_requests import ActiveRequests
from lora_serve.engine.in_flight import InFlightStep, launch
from lora_serve.engine.prefill_pacer import PrefillPacer
from lora_serve.engine.runner import Runner
from lora_serve.engine.scheduler import ScheduledSequence, Scheduler
from lora_serve.engine.startup import build_parts
from lora_serve.errors import Failure, ServeError, Unavailable
from lora_serve.messages import (
    Abort,
    Call,
    DeleteAdapter,
    DescribeAdapter,
    Drain,
    EngineInfo,
    EvictAdapter,
    Generate,
    Inspect,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Publish,
    Reply,
    Stats,
    StepReport,
    Update,
)

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
        self._requests = ActiveRequests(info, scheduler, registry, max_queue)
        self._replies: list[Reply] = []
        self._draining: list[int] | None = None  # ids of the calls to answer when nothing runs any more
        self._in_flight: InFlightStep | None = None
        self._last_outputs = 0.0  # when those of the last step were there
        self._pacer = PrefillPacer()
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
            overlap: see `build_parts`.
        """
        parts = build_parts(config, wake, progress, overlap)
        return cls(parts.info, parts.scheduler, parts.runner, parts.registry, max_queue=config.max_queue)

    @property
    def busy(self) -> bool:
        """Whether another step would do something now."""
        running = bool(self._requests) and not self._stalled
        return running or self._requests.has_events or bool(self._replies) or self.step_in_flight

    @property
    def step_in_flight(self) -> bool:
        """Whether a step runs on the device whose outputs are not read yet."""
        return self._in_flight is not None

    def receive(self, message: Generate | Abort | Call) -> None:
        """Take one message in. Refusals become events or replies; nothing is raised."""
        self._stalled = False
        match message:
            case Generate(request) if self._draining is not None:
                self._requests.refuse(request, Unavailable("the server is shutting down", retry_after=5))
            case Generate(request):
                self._requests.admit(request)
            case Abort(request_id):
                self._requests.abort(request_id)
            case Call():
                self._call(message)

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> Update:
        """Run a step, if anything can run; returns all events since the last call."""
        if self._registry.poll():
            self._stalled = False
        report = self._step_overlapped() if self._runner.overlaps else self._step()
        self._shrink_after_out_of_memory()
        self._stalled = report is None and not self.step_in_flight  # finished sequences may have made room
        if self._draining is not None and not self._requests:
            self._replies += [Reply(call) for call in self._draining]
            self._draining = []
        return Update(self._requests.take_events(), None, report)

    def _step(self) -> StepReport | None:
        """Schedule, launch, process the outputs."""
        step = self._launch(self._schedule())
        return None if step is None else self._process(step)

    def _step_overlapped(self) -> StepReport | None:
        """Launch the next step, then process the outputs of the one before."""
        report = self._process_in_flight() if self._in_flight is not None and self._in_flight.blocks_next else None
        previous, self._in_flight = self._in_flight, self._launch(self._schedule())
        if previous is not None:
            report = self._process(previous)
        return self._process_in_flight() or report if self._runner.out_of_memory else report

    def _schedule(self) -> list[ScheduledSequence]:
        scheduled = self._scheduler.schedule(self._is_loaded, self._registry.pinned, self._pacer.budget)
        self._request_loads()
        return scheduled

    def _launch(self, scheduled: list[ScheduledSequence]) -> InFlightStep | None:
        """Start a step; the one after it may be scheduled from then on."""
        if not scheduled:
            return None
        step = launch(scheduled, self._runner, self._registry)
        for part in step.scheduled:
            self._scheduler.mark_launched(part)
        return step

    def _process_in_flight(self) -> StepReport | None:
        step, self._in_flight = self._in_flight, None
        return None if step is None else self._process(step)

    def _process(self, step: InFlightStep) -> StepReport:
        """Wait for a step's outputs and process them; what it took of the device's time."""
        for output in step.outputs():
            self._requests.process(output)
        self._steps += 1
        now = time.perf_counter()
        seconds, self._last_outputs = now - max(step.started, self._last_outputs), now
        tokens = sum(part.count for part in step.scheduled)
        decoding = sum(part.count == 1 for part in step.scheduled)
        self._pacer.record(decoding, tokens - decoding, seconds)
        return StepReport(len(step.scheduled), tokens, step.adapters, seconds)

    def _shrink_after_out_of_memory(self) -> None:
        """After a step that ran out of memory: smaller ones from now on."""
        if self._runner.out_of_memory:
            self._runner.out_of_memory = False
            self._scheduler.max_tokens = max(LEAST_TOKENS, self._scheduler.max_tokens // 2)
            log.warning("a step ran out of memory; steps take %d tokens at most now", self._scheduler.max_tokens)

    # --- adapters ------------------------------------------------------------------------------------------------

    def _is_loaded(self, digest: str) -> bool:
        return isinstance(self._registry.state(digest), InMemory)

    def _request_loads(self) -> None:
        """Load adapters that the oldest sequences lack, as many as there are slots; end those whose load failed."""
        wanted: dict[str, None] = {}
        for adapter_set in self._scheduler.unloaded():
            states = {digest: self._registry.state(digest) for digest in adapter_set}
            failed = next((state for state in states.values() if isinstance(state, LoadFailed)), None)
            if failed is None:
                wanted |= dict.fromkeys(digest for digest, state in states.items() if not isinstance(state, InMemory))
                continue
            for seq in self._scheduler.users(adapter_set):
                self._requests.finish(seq, "error", failed.error)
        for digest in list(wanted)[: self._scheduler.rotation.slots]:
            self._registry.request_load(digest)

    def _call(self, call: Call) -> None:
        """Start an admin operation; its answer is among the `replies` when it is ready."""

        def done(result: Any) -> None:
            if isinstance(result, ServeError):
                self._replies.append(Reply(call.id, failure=Failure.of(result)))
            else:
                self._replies.append(Reply(call.id, msgspec.to_builtins(result)))

        try:
            self._dispatch(call, done)
        except ServeError as error:
            done(error)

    def _dispatch(self, call: Call, done: Callable[[Any], None]) -> None:
        """Dispatch an admin operation (publish, load, evict, …) to the adapter registry.

        `done` gets its result or a ServeError, now or when it is ready. Raises ServeError too.
        """
        registry = self._registry
        match call.operation:
            case Drain():
                self._draining = [*(self._draining or []), call.id]
            case Publish():
                registry.publish(call.operation, done)
            case Inspect():
                registry.inspect(call.operation, done)
            case ListAdapters():
                done(registry.describe_all())
            case DescribeAdapter(name):
                done(registry.describe(name))
            case LoadAdapter(name):
                registry.load(name, done)
            case EvictAdapter(name):
                registry.evict(name, done)
            case PinAdapter(name, pinned):
                registry.pin(name, pinned, done)
            case DeleteAdapter(name):
                registry.delete(name, done)

    # --- the outside ---------------------------------------------------------------------------------------------

    def replies(self) -> list[Reply]:
        """Answers to calls that became ready."""
        replies, self._replies = self._replies, []
        return replies

    def stats(self) -> Stats:
        """The engine's state in numbers."""
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
        self._registry.fill_stats(stats)
        return stats

    def close(self) -> None:
        """End all that runs (a last `step` hands out the events) and free the adapters."""
        self._requests.finish_all(Unavailable("the server is shutting down", retry_after=5))
        self._registry.close()
