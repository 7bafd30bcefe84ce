"""The requests being served: admission, processing of step outputs, and completion.

Every request ends in `finish`, on every path; its KV blocks and adapter leases are released there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from lora_serve.adapters.registry import Lease, Registry
from lora_serve.engine.admission import check, check_settings, pooling_of
from lora_serve.engine.grammar_compiler import CompiledGrammar, Done, GrammarCompiler
from lora_serve.engine.pooling import EmbeddingSums
from lora_serve.engine.runner import SequenceOutput
from lora_serve.engine.scheduled_sequence import ScheduledSequence
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.sequence import Sequence
from lora_serve.errors import BadRequest, EngineFault, Failure, Overloaded, ServeError
from lora_serve.messages import EngineInfo
from lora_serve.request import Admitted, Embedded, Event, Finished, Logprob, Request, Served, Tokens


class ActiveRequests:
    """Requests by id, from admission to their last event.

    Args:
        info: limits that requests are checked against.
        max_queue: maximum number of waiting requests.
        clock: seconds.
    """

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        registry: Registry,
        grammars: GrammarCompiler,
        max_queue: int,
        clock: Callable[[], float],
    ) -> None:
        self._info = info
        self._scheduler = scheduler
        self._registry = registry
        self._grammars = grammars
        self._max_queue = max_queue
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._compiling: dict[Sequence, Done] = {}  # admitted, not queued before their grammars are compiled
        self._leases: dict[str, list[Lease]] = {}
        self._prompt_logprobs: dict[str, list[Logprob | None]] = {}
        self._embedding_sums = EmbeddingSums()
        self._events: list[Event] = []
        self._admitted = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def waiting(self) -> int:
        """Number of requests that hold no KV blocks."""
        return len(self._scheduler.waiting) + len(self._compiling)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would return any."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def admit(self, request: Request) -> None:
        """Check a request, lease its adapters and queue it; if it is refused, that is its only event."""
        try:
            self._admit(request)
        except ServeError as error:
            self.refuse(request, error)

    def refuse(self, request: Request, error: ServeError) -> None:
        """Refuse a request: its only event is the error."""
        self._events.append(Finished(request.id, "error", failure=Failure.of(error)))

    def abort(self, request_id: str) -> None:
        """End a request whose client is gone; unknown and finished ids are ignored."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self.finish(seq, "abort")

    def finish_all(self, error: ServeError) -> None:
        """End every request with an error."""
        for seq in list(self._sequences.values()):
            self.finish(seq, "error", error)

    def process(self, output: SequenceOutput) -> None:
        """Process a step's output for one sequence: emit its token or embedding as an event, or end the request."""
        part, seq = output.part, output.part.seq
        if self._sequences.get(seq.request.id) is not seq:
            return  # it ended while the step was in flight
        if output.failure is not None:
            self.finish(seq, "error", output.failure, forget=True)
            return
        self._scheduler.mark_computed(part)
        if seq.pooling is not None:
            self._embed(output)
            return
        prompt_logprobs = None if output.prompt_logprobs is None else self._collect(part, output.prompt_logprobs)
        if output.token is None:
            return
        first = part.end == seq.prompt_end
        cached = seq.cached or 0
        queued, started = (seq.started - seq.arrived, seq.started) if first else (0.0, 0.0)
        if part.end < seq.limit and output.token not in seq.stop_ids:
            seq.tokens[part.end] = output.token
            logprobs = None if output.logprob is None else [output.logprob]
            tokens = Tokens(seq.request.id, [output.token], logprobs, prompt_logprobs, cached, queued, started)
            self._events.append(tokens)
            self._continue(seq, tokens.token_ids, part.end + 1)
            return
        if prompt_logprobs is not None or first:
            self._events.append(Tokens(seq.request.id, [], None, prompt_logprobs, cached, queued, started))
        if part.end >= seq.limit:
            self.finish(seq, "length")
        else:
            self.finish(seq, "stop", stop_token=output.token, stop_logprob=output.logprob)

    def _continue(self, seq: Sequence, new: list[int], end: int) -> None:
        """Advance a sequence's grammar by a sampled token, the last before `end`; finish it if that is where it ends.

        Tokens that the grammar forces are appended to the sequence and to `new`, and computed in the next step.
        """
        matcher = seq.matcher
        if matcher is not None:
            try:
                matcher.advance(new[-1])
                if seq.request.sampling.logprobs is None:  # these need the logits
                    forced = matcher.force_tokens(seq.limit - end, seq.stop_ids)
                    if forced:
                        seq.append_known(forced)
                        new += forced
                        end += len(forced)
                matcher.check_length(end - seq.prompt_end)
            except ServeError as error:
                self.finish(seq, "error", error)
                return
            if matcher.complete:
                self.finish(seq, "stop")
                return
        if end == seq.limit:
            self.finish(seq, "length")

    def finish(
        self,
        seq: Sequence,
        reason: str,
        error: ServeError | None = None,
        *,
        stop_token: int | None = None,
        stop_logprob: Logprob | None = None,
        forget: bool = False,
    ) -> None:
        """End a request: free its KV blocks, leases and state (`forget`: drop its blocks from the prefix index)."""
        if (done := self._compiling.pop(seq, None)) is not None:
            self._grammars.cancel(seq.request.sampling.grammar or "", done)
        else:
            self._scheduler.remove(seq, forget=forget)
        del self._sequences[seq.request.id]
        self._prompt_logprobs.pop(seq.request.id, None)
        self._embedding_sums.discard(seq)
        for lease in self._leases.pop(seq.request.id):
            self._registry.release(lease)
        failure = None if error is None else Failure.of(error)
        self._events.append(Finished(seq.request.id, reason, stop_token, stop_logprob, failure))

    def _admit(self, request: Request) -> None:
        """Admit a request, or raise the ServeError that refuses it."""
        if request.id in self._sequences:
            raise BadRequest("a request with this id is already running", param="request_id")
        if self.waiting >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests are waiting already", retry_after=1)
        leases: list[Lease] = []
        try:
            for use in request.adapters:
                leases.append(self._registry.acquire(use, request.routing))
            check_settings(request, leases)
            check(request, leases, self._info)
            self._registry.check_possible([lease.digest for lease in leases])
        except ServeError:
            for lease in leases:
                self._registry.release(lease)
            raise
        seq = self._new_sequence(request, leases)
        self._admitted += 1
        self._sequences[request.id] = seq
        self._leases[request.id] = leases
        if request.sampling.grammar is None:
            self._queue(seq)
        else:
            self._compiling[seq] = partial(self._on_compiled, seq)
            self._grammars.compile(request.sampling.grammar, self._compiling[seq])

    def _on_compiled(self, seq: Sequence, result: CompiledGrammar | ServeError) -> None:
        """Queue a sequence whose grammar was compiled, or refuse its request; it may have been aborted meanwhile."""
        if seq not in self._compiling:
            return
        sampling = seq.request.sampling
        if isinstance(result, BadRequest):
            result = BadRequest(result.message, param=sampling.grammar_field)
        if isinstance(result, ServeError):
            self.finish(seq, "error", result)
            return
        try:
            self._registry.check_possible(seq.digests)
        except ServeError as error:  # a load failed meanwhile, or a pin took their place
            self.finish(seq, "error", error)
            return
        del self._compiling[seq]
        seq.matcher = result.matcher(sampling)
        seq.stop_ids |= seq.matcher.eos_ids  # allowed despite `ignore_eos` where nothing else is
        self._queue(seq)

    def _queue(self, seq: Sequence) -> None:
        self._events.append(Admitted(seq.request.id, list(seq.adapters), len(self._scheduler.waiting)))
        self._scheduler.add(seq)

    def _new_sequence(self, request: Request, leases: list[Lease]) -> Sequence:
        sampling = request.sampling
        virtual = max((lease.traits.virtual for lease in leases), default=0)
        return Sequence(
            request=request,
            order=self._admitted,
            adapters=tuple(Served(lease.name, lease.digest, lease.weight) for lease in leases),
            seed=int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed,
            stop_ids=frozenset(sampling.stop_token_ids)
            | (frozenset() if sampling.ignore_eos else frozenset(self._info.eos_token_ids)),
            limit=min(virtual + len(request.prompt) + sampling.max_tokens, self._info.max_model_len),
            traits={lease.digest: lease.traits for lease in leases},
            pooling=pooling_of(request, leases, self._info),
            arrived=self._clock(),
        )

    def _embed(self, output: SequenceOutput) -> None:
        """Add a step's part of an embedding; once the whole prompt is in it, send it and end the request."""
        part, seq = output.part, output.part.seq
        self._embedding_sums.add(part, output.hidden_sum)
        if part.end < len(seq.tokens):
            return
        vector = self._embedding_sums.embedding(seq)
        if vector is None:
            error = EngineFault("the model's output for this request is not finite")
            self.finish(seq, "error", error, forget=True)
            return
        self._events.append(Embedded(seq.request.id, vector))
        self.finish(seq, "stop")

    def _collect(self, part: ScheduledSequence, found: list[Logprob]) -> list[Logprob | None] | None:
        """Collect the log-probabilities of a chunked prompt; returns all of them once the prompt is computed."""
        request = part.seq.request
        if part.start <= part.seq.virtual:  # the first chunk, perhaps again after preemption
            self._prompt_logprobs[request.id] = [None]
        self._prompt_logprobs[request.id] += found
        return self._prompt_logprobs.pop(request.id) if part.samples else None
