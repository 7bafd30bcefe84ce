"""The engine: take messages, schedule and run steps, send events. Synchronous, one thread, no sockets.

A step is: schedule, launch the forward pass, sample, process the outputs. On a CPU these follow each other. On a GPU
the next step is scheduled and its forward pass launched while one is in flight, and only then are the outputs of that
one read, so the device never waits for Python. Tokens computed for a sequence that turns out to have ended are dropped.

The loop never touches the disk and never waits for a load or a compilation: adapters are published and loaded, and
grammars compiled, in threads, whose results are picked up at the beginning of a step. Between steps, and while there
are none, it trains adapters, a quantum at a time (`training/`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.sharing import SharedOperations
from lora_serve.config import ServeConfig
from lora_serve.engine.active_requests import ActiveRequests
from lora_serve.engine.admin_calls import AdminCalls
from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.engine.in_flight import InFlightStep, LaunchedStep, launch
from lora_serve.engine.prefill_pacer import Demand, PrefillPacer
from lora_serve.engine.queue_times import QueueTimes
from lora_serve.engine.ranks import Ranks
from lora_serve.engine.runner import Runner
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.startup import build_parts
from lora_serve.engine.training.training_pacer import ServingLoad
from lora_serve.engine.training.training_runs import TrainingRuns
from lora_serve.errors import Unavailable
from lora_serve.messages import Abort, Call, Drain, EngineInfo, Generate, Reply, Stats, StepReport, Update

log = logging.getLogger(__name__)

MOST_TRAINING = 0.1  # seconds between two steps, from which on no further quantum begins
MIN_STEP_TOKENS = 16  # a step's token budget is not lowered below this after out-of-memory errors


class Engine:
    """One resident base serving many sequences.

    Args:
        info: the base model and limits, as reported to clients.
        max_queue: maximum number of waiting sequences.
        ranks: the other processes that share the base.
        shared: the changes that all replicas make, where these share a store.
        training: adapters that are trained on the base; None: there is no memory for any.
        clock: seconds, from which durations of steps are taken.
    """

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: Runner,
        registry: Registry,
        operations: AdapterOperations,
        grammars: GrammarCompiler,
        pacer: PrefillPacer,
        *,
        max_queue: int,
        ranks: Ranks | None = None,
        shared: SharedOperations | None = None,
        training: TrainingRuns | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._ranks = ranks
        self._training = training
        self._prompts_held = False  # by the last step, because of training
        self._trained = 0.0  # seconds of training since the outputs of the last step were read
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._registry = registry
        self._shared = shared
        self._calls = AdminCalls(info, registry, operations, shared, training)
        self._grammars = grammars
        self._requests = ActiveRequests(info, scheduler, registry, grammars, max_queue, clock)
        self._draining: list[int] | None = None  # ids of drain calls to answer when no request is left
        self._in_flight: InFlightStep | None = None
        self._last_outputs = 0.0  # when the outputs of the last step were read
        self._pacer = pacer
        self._clock = clock
        self._steps = 0
        self._queue_times = QueueTimes()
        self._told: tuple[list[str], int] = [], 0  # what the API must know before it sends another request
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
        """Build an engine from its configuration. Raises ModelUnsupported and other ServeErrors.

        Args:
            overlap: see `build_parts`.
        """
        parts = build_parts(config, wake, progress, overlap)
        return cls(
            parts.info,
            parts.scheduler,
            parts.runner,
            parts.registry,
            parts.operations,
            parts.grammars,
            PrefillPacer(config.itl_target, config.ttft_target, buckets=parts.runner.token_buckets),
            max_queue=config.max_queue,
            ranks=parts.ranks,
            shared=parts.shared,
            training=parts.training,
        )

    @property
    def busy(self) -> bool:
        """Whether another step, or a quantum of training, would do any work now."""
        training = self._training is not None and self._training.pending
        return self._serving or self._requests.has_events or self._calls.has_replies or training

    @property
    def _serving(self) -> bool:
        """Whether a step runs, or could."""
        return (bool(self._requests) and not self._stalled) or self.step_in_flight

    @property
    def _unfinished(self) -> int:
        """Number of requests that are being answered or wait for it."""
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    @property
    def step_in_flight(self) -> bool:
        """Whether a step runs on the device whose outputs are not read yet."""
        return self._in_flight is not None

    def receive(self, message: Generate | Abort | Call) -> None:
        """Handle one message. Refusals become events or replies; nothing is raised."""
        self._stalled = False
        match message:
            case Generate(request) if self._draining is not None:
                self._requests.refuse(request, Unavailable("the server is shutting down", retry_after=5))
            case Generate(request):
                self._requests.admit(request)
            case Abort(request_id):
                self._requests.abort(request_id)
            case Call(id, Drain()):
                self._draining = [*(self._draining or []), id]
            case Call():
                self._calls.start(message, draining=self._draining is not None)

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> Update:
        """Run a step if anything can run; returns all events since the last call."""
        if self._registry.poll():
            self._stalled = False
        if self._grammars.poll():
            self._stalled = False
        self._end_impossible()
        active = len(self._requests)
        report = self._step_overlapped() if self._runner.overlaps else self._step()
        self._shrink_after_out_of_memory()
        # Sequences that finished, or whose load failed, may have freed blocks for others.
        self._stalled = report is None and not self.step_in_flight and len(self._requests) == active
        if self._draining is not None and not self._requests:
            for call in self._draining:
                self._calls.reply(Reply(call))
            self._draining = []
        return Update(self._requests.take_events(), self._stats_of_names(), report)

    def _step(self) -> StepReport | None:
        """Schedule, launch, sample, process the outputs."""
        step = self._launch(self._schedule())
        return None if step is None else self._process(step.sample())

    def _step_overlapped(self) -> StepReport | None:
        """Launch the next step's forward pass; while it runs, process the outputs of the previous one; then sample."""
        step = self._launch(self._schedule())
        report = self._process_in_flight()
        self._in_flight = None if step is None else step.sample()
        return self._process_in_flight() or report if self._runner.out_of_memory else report

    def _schedule(self) -> list[ScheduledSequence]:
        memory, pinned = self._registry.memory, self._registry.pinned
        beginning = self._scheduler.assign_slots(memory.holds, pinned, arrived=memory.take_arrived())
        # What is on the device alone leaves memory with its slot: not before the step, in which it may still run.
        holds = self._scheduler.rotation.holds
        memory.prefetch(beginning, keep=lambda version: holds(version.digest) or not version.in_host)
        # What is copied before the step in flight ends delays nothing.
        hidden = self._pacer.costs.decode(1) if self.step_in_flight else 0.0
        return self._scheduler.schedule(self._prefill_budget, memory.copying(hidden))

    def _prefill_budget(self, demand: Demand) -> int:
        """Prompt tokens of a step beside streams: none, once, if these have already waited for training."""
        trained = self._training is not None and self._training.pacer.in_gap > 0
        self._prompts_held = trained and not self._prompts_held
        return self._pacer.hold(demand) if self._prompts_held else self._pacer.budget(demand)

    def _launch(self, scheduled: list[ScheduledSequence]) -> LaunchedStep | None:
        """Launch a step's forward pass, after which the next one may be scheduled."""
        if not scheduled:
            return None
        step = launch(scheduled, self._runner, self._registry.memory, self._clock())
        for part in step.scheduled:
            part.seq.started = part.seq.started or step.started
            self._scheduler.mark_launched(part)
        return step

    def _process_in_flight(self) -> StepReport | None:
        step, self._in_flight = self._in_flight, None
        return None if step is None else self._process(step)

    def _process(self, step: InFlightStep) -> StepReport:
        """Wait for a step's outputs and process them; reports its size and duration."""
        for output in step.outputs():
            self._requests.process(output)
        self._steps += 1
        now = self._clock()
        seconds = max(0.0, now - max(step.started, self._last_outputs) - self._trained)
        self._last_outputs, self._trained = now, 0.0
        tokens = sum(part.count for part in step.scheduled)
        decoding = sum(part.decodes for part in step.scheduled)
        self._pacer.record(decoding, tokens - decoding, seconds)
        if self._training is not None and decoding:
            self._training.pacer.served(seconds, self._unfinished, now)
        self._queue_times.record(self._scheduler.running.started, len(self._scheduler.waiting), now)
        return StepReport(len(step.scheduled), tokens, step.adapters, seconds)

    def train(self) -> bool:
        """Run a quantum of training, or what fits between two steps, if it is its turn; whether any was run.

        However large its share is, messages are received and a step runs after `MOST_TRAINING`.
        """
        if self._training is None:
            return False
        if not self._training.pending:
            self._training.pacer.rest()
            return False
        scheduler = self._scheduler
        prompts = len(scheduler.waiting) > 0 or any(seq.pending > 1 for seq in scheduler.running)
        load = ServingLoad(self._serving, prompts, self._unfinished)
        ran = seconds = self._training.advance(load)
        while seconds and load.active and self._training.pending and ran < MOST_TRAINING:
            seconds = self._training.advance(load)
            ran += seconds
        if not self._training.pending:
            self._training.pacer.rest()
        if self.step_in_flight:
            self._trained += ran
        return ran > 0

    def _shrink_after_out_of_memory(self) -> None:
        """After a step that ran out of memory, halve the token budget of later steps."""
        if self._runner.out_of_memory:
            self._runner.out_of_memory = False
            self._scheduler.max_tokens = max(MIN_STEP_TOKENS, self._scheduler.max_tokens // 2)
            log.warning("out of memory in a step; token budget lowered to %d", self._scheduler.max_tokens)

    # --- adapters ----------------------------------------------------------------------------------------------------

    def _stats_of_names(self) -> Stats | None:
        """Statistics if aliases go by other headers than were told, or settings may have changed.

        They come before the reply to who changed that.
        """
        now = self._registry.sticky_headers, self._registry.settings_state
        if now == self._told:
            return None
        self._told = now
        return self.stats()

    def _end_impossible(self) -> None:
        """End the requests whose adapters cannot be had any more, with the reason."""
        for adapter_set, error in self._registry.take_impossible(self._scheduler.adapter_sets):
            for seq in self._scheduler.users(tuple(adapter_set)):
                self._requests.finish(seq, "error", error)

    # --- replies and statistics --------------------------------------------------------------------------------------

    def replies(self) -> list[Reply]:
        """Replies that became ready since the last call."""
        return self._calls.take_replies()

    def stats(self) -> Stats:
        """Current statistics of the queues, KV cache and adapters."""
        scheduler, pool, costs = self._scheduler, self._scheduler.pool, self._pacer.costs
        now = self._clock()
        stats = Stats(
            waiting=self._requests.waiting,
            running=len(scheduler.running),
            kv_blocks_used=pool.used,
            kv_blocks=pool.blocks,
            prefix_tokens_total=scheduler.running.prefix_tokens,
            prefix_hit_tokens_total=scheduler.running.prefix_hits,
            preemptions_total=scheduler.running.preemptions,
            steps_total=self._steps,
            waiting_adapters=sorted({adapter.name for seq in scheduler.waiting for adapter in seq.adapters}),
            oldest_wait=max((now - seq.arrived for seq in scheduler.waiting.oldest), default=0.0),
            expected_wait=self._queue_times.expected(len(scheduler.waiting)),
            gaps_exceeded_total=self._pacer.gaps_exceeded,
            step_costs={"decode": costs.decode(1), "prompt": costs.fixed, "prompt_token": costs.per_token},
            memory=self.info.memory,
        )
        self._registry.fill_stats(stats)
        if self._shared is not None:
            stats.shared = self._shared.status()
        if self._training is not None:
            self._training.fill_stats(stats)
        return stats

    def close(self) -> None:
        """End all requests (a last `step` returns their events) and free the adapters."""
        self._requests.finish_all(Unavailable("the server is shutting down", retry_after=5))
        if self._training is not None:
            self._training.close()
        self._registry.close()
        self._grammars.close()
        if self._ranks is not None:
            self._ranks.close()
