"""A model of Tinker's API: its calls, carried out in order, each giving a result that is asked for later."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from lora_serve.api.services import EngineProtocol
from lora_serve.api.tinker.checkpoint_store import ModelFacts, TinkerCheckpoints
from lora_serve.api.tinker.future_results import FutureResult, FutureResults
from lora_serve.api.tinker.model_journal import ModelJournal, ResultRecord
from lora_serve.api.tinker.ordered_calls import HeldBytes, ModelCall, OrderedCalls
from lora_serve.api.tinker.resumable_run import ResumableRun
from lora_serve.api.tinker.sampler_weights import SamplerWeights
from lora_serve.errors import BadRequest, EngineFault, Failure, ServeError

MOST_RECENT = 4096  # calls whose results may be kept with a state
JOURNAL_BYTES = 128 << 20  # of calls, after which a state is saved that they need not be repeated from
MADE, REFUSED = "made", "refused"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinkerParts:
    """What models work with; `held`: bytes of calls that wait."""

    engine: EngineProtocol
    futures: FutureResults
    checkpoints: TinkerCheckpoints
    weights: SamplerWeights
    check_base_model: Callable[[str], str]
    held: HeldBytes


Carry = Callable[[ModelCall], Awaitable[FutureResult]]


class TinkerModel:
    """One model.

    Args:
        carry: carries out a call that is not `refused`.

    Attributes:
        facts: None until it was made.
        run: of the engine; None until it was made.
        last_request: seconds since the epoch.
    """

    def __init__(self, id_: str, owner: str, parts: TinkerParts, journal: ModelJournal) -> None:
        self.id, self.owner, self.parts, self.journal = id_, owner, parts, journal
        self.facts: ModelFacts | None = None
        self.run: ResumableRun | None = None
        self.last_request = time.time()
        self._calls = OrderedCalls(0, parts.held)
        self._journaled = 0  # bytes since the last state
        self._recent: deque[int] = deque(maxlen=MOST_RECENT)
        self._failure: ServeError | None = None  # why it was not made
        self._worker: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<TinkerModel {self.id}: {self._calls!r}>"

    def request_id(self, seq: int) -> str:
        """What the result of a call is asked for by."""
        return f"{self.id}:{seq}"

    def start(self, carry: Carry) -> None:
        """Begin to carry out calls."""
        self._worker = asyncio.create_task(self._work(carry))

    def resume(self) -> None:
        """Take up what the journal says; before `start`. Raises OSError."""
        content = self.journal.read()
        if content.state is not None:
            self.facts = msgspec.json.decode(content.calls[0].body, type=ModelFacts)
            state = self.journal.state(content.state)
            self.make_run(self.facts, state)
            self._calls = OrderedCalls(content.state + 1, self.parts.held)
        for seq, result in content.results.items():
            self.parts.futures.open(self.request_id(seq), self.owner)
            self.parts.futures.finish(self.request_id(seq), FutureResult(result.media_type, result.body))
        for _, call in sorted(content.calls.items()):
            if call.kind != MADE and self._calls.add(call):
                self.parts.futures.open(self.request_id(call.seq), self.owner)

    def make_run(self, facts: ModelFacts, state: Any = None) -> ResumableRun:
        """The run of the engine, which is not begun yet."""
        self.facts = facts
        self.run = ResumableRun(self.parts.engine, self.id, self.owner, facts.settings, state)
        return self.run

    async def accept(self, seq: int, kind: str, body: bytes) -> str:
        """Take a call, or one that came before; returns what its result is asked for by. Raises TooMuchWaits."""
        self.last_request = time.time()
        id_, call = self.request_id(seq), ModelCall(seq, kind, body)
        self.parts.futures.open(id_, self.owner)
        try:
            fresh = self._calls.add(call)
        except ServeError:
            self.parts.futures.discard(id_)
            raise
        if fresh and self._failure is None:
            self._journaled += len(body)
            try:
                await asyncio.to_thread(self.journal.append, call)
            except OSError as error:
                log.warning("a call was not written down, so it is lost if the server ends: %s", error.strerror)
        elif seq < self._calls.next and seq not in self._recent:
            self.parts.futures.finish(id_, FutureResult.failed(EngineFault("the result of this call was lost")))
        return id_

    async def refuse(self, seq: int, error: ServeError) -> str:
        """Take a call that cannot be carried out: its result is the error, and the next ones have their turn."""
        return await self.accept(seq, REFUSED, msgspec.json.encode(Failure.of(error)))

    async def save_state(self, seq: int) -> None:
        """Save the state after a call, so that nothing before it has to be repeated. Raises the engine's errors."""
        assert self.run is not None
        folder = self.journal.state(seq)
        await asyncio.to_thread(self.journal.clear, folder)
        self._journaled = 0
        await self.run.save_state(folder)
        results = [
            ResultRecord(recent, result.media_type, result.body)
            for recent in reversed(self._recent)
            if (result := self.parts.futures.kept(self.request_id(recent))) is not None
        ]
        made = ModelCall(0, MADE, msgspec.json.encode(self.facts))
        await asyncio.to_thread(self.journal.follow_state, seq, made, results)

    async def stop(self) -> None:
        """Carry out no more calls; what is in the journal goes on when the server starts again."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._calls.clear()

    async def close(self) -> None:
        """End the model and forget it."""
        await self.stop()
        if self.run is not None:
            await self.run.close()
        await asyncio.to_thread(self.journal.remove)
        self.parts.futures.forget(f"{self.id}:")

    async def _work(self, carry: Carry) -> None:
        while True:
            call = await self._calls.awaited()
            result = await self._result(call, carry)
            self._recent.append(call.seq)
            self._calls.finish()
            self.parts.futures.finish(self.request_id(call.seq), result)
            run = self.run
            if run is not None and run.can_save and (run.is_long or self._journaled > JOURNAL_BYTES):
                try:
                    await self.save_state(call.seq)
                except (ServeError, OSError) as error:
                    log.warning("the state of a model was not saved: %s", error)

    async def _result(self, call: ModelCall, carry: Carry) -> FutureResult:
        try:
            if self._failure is not None:
                raise BadRequest(f"the model was not made: {self._failure.message}")
            if call.kind == REFUSED:
                raise msgspec.json.decode(call.body, type=Failure).error()
            return await carry(call)
        except ServeError as error:
            if call.seq == 0:
                self._failure = error
            return FutureResult.failed(error)
        except Exception:
            log.exception("a call of a model failed: %s", call.kind)
            failure = EngineFault("the server failed on this request")
            if call.seq == 0:
                self._failure = failure
            return FutureResult.failed(failure)
