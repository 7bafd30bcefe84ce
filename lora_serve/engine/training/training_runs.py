"""Training runs: carries out the operations that the API process sends, in quanta between the steps that serve.

Operations on one run follow each other, those of different runs go on beside each other: batches that wait at the same
time share passes as far as memory allows (`shared_pass.py`). Priority, owners and age say who is next (`run_turns.py`),
the pacer whether a quantum may run now. Files are read and written in a thread. An operation that fails leaves other
runs as they are.

Quanta are: one of a pass, a step of an optimizer, the creation of an adapter, a copy of its state from or to the host.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from lora_serve.adapters.memory import AdapterMemory
from lora_serve.adapters.workers import Workers
from lora_serve.engine.training.fused_pass import pass_bytes
from lora_serve.engine.training.losses import find_loss
from lora_serve.engine.training.method_settings import adapter_settings
from lora_serve.engine.training.micro_batch import TrainingSequence
from lora_serve.engine.training.run_operations import (
    PART_TOKENS,
    Done,
    QueuedOperation,
    QueuedPass,
    TrainingRun,
    parts_of,
)
from lora_serve.engine.training.run_turns import RunTurn, RunTurns
from lora_serve.engine.training.shared_pass import PassShare, SharedPass, fill_pass
from lora_serve.engine.training.short_operations import ShortOperations, run_not_found
from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_pacer import ServingLoad, TrainingPacer
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import BadRequest, EngineFault, RunExists, RunNotFound, ServeError, Unavailable
from lora_serve.messages import Stats
from lora_serve.model.trainable_base import TrainableBase
from lora_serve.training_messages import (
    CloseRun,
    CreateRun,
    ForwardBackward,
    RunOperation,
)

FIRST_TOKENS = 128  # of a pass while it is not known what one costs
MOST_TOKENS = 1 << 20  # of a pass, and of an operation, which the engine's loop reads and checks at once
MOST_LEAD = (
    1.0  # seconds that an owner may have had more than others whose passes wait, for short operations to go first
)
MOST_EXAMPLES = 1 << 16  # of an operation

log = logging.getLogger(__name__)


class _Quantum(NamedTuple):
    """What training would do next: its kind and size, and whom its time is charged to, by weight."""

    kind: str
    size: int
    run: Callable[[], Any]
    owners: list[tuple[str, int]]


class TrainingRuns:
    """All training runs of an engine.

    Attributes:
        pacer: decides when a quantum may run.

    Args:
        base: checked.
        memory: bytes of all adapters in training and a running pass.
        lent_to: served adapters, which may have that memory while there are no runs.
        workers: threads for files.
        base_name: what exported adapters say of their base.
    """

    def __init__(
        self,
        base: TrainableBase,
        memory: int,
        lent_to: AdapterMemory,
        pacer: TrainingPacer,
        workers: Workers,
        base_name: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._base, self._trainer, self.pacer = base, Trainer(base, memory), pacer
        self._lent_to = lent_to
        self._short, self._clock = ShortOperations(self._trainer, workers, base_name, self._remove_closed), clock
        self._runs: dict[str, TrainingRun] = {}
        self._pass: SharedPass | None = None
        self._turns = RunTurns()
        self._orders = itertools.count()
        self._most: tuple[int, int] = (-1, 0)  # free bytes, and the tokens of a pass that takes them
        self._tokens = 0
        self._seconds: dict[str, float] = {}
        self._quanta: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<TrainingRuns {len(self._runs)} runs, {self._pass!r}, {self._trainer!r}>"

    # --- operations --------------------------------------------------------------------------------------------------

    def start(self, operation: RunOperation, done: Done) -> None:
        """Queue an operation.

        `done` is called with its result or a ServeError, now or later. Also raises ServeError.
        """
        match operation:
            case CreateRun():
                self._create(operation, done)
            case CloseRun(name):
                self._close(name, done)
            case ForwardBackward():
                run = self._find(operation)
                self._enqueue(run, self._queued_pass(run, operation, done))
            case _:
                self._enqueue(self._find(operation), QueuedOperation(operation, done, next(self._orders)))

    def _create(self, operation: CreateRun, done: Done) -> None:
        if operation.run in self._runs:
            raise RunExists(f"there is a training run {operation.run!r} already", param="run")
        settings = adapter_settings(operation.settings)
        memory = self._trainer.needed(settings, 1).adapter  # refuses what does not fit
        if operation.settings.num_virtual_tokens >= self._base.max_length:
            raise BadRequest(
                f"{operation.settings.num_virtual_tokens} virtual tokens leave none of {self._base.max_length} to a "
                "sequence",
                param="num_virtual_tokens",
            )
        if isinstance(settings, LoraSettings) and settings.reads_weights:
            self._trainer.check(operation.run, settings)  # before a thread reads all weights
        if not self._runs:
            self._lent_to.begin_training()
        run = self._runs[operation.run] = TrainingRun.of(operation)
        self._enqueue(run, QueuedOperation(operation, done, next(self._orders), memory=memory))

    def _find(self, operation: RunOperation) -> TrainingRun:
        run = self._runs.get(operation.run)
        if run is None or run.closed:
            raise run_not_found(operation.run)
        return run

    def _enqueue(self, run: TrainingRun, queued: QueuedOperation) -> None:
        run.operations.append(queued)
        self._short.begin(run)

    def _queued_pass(self, run: TrainingRun, operation: ForwardBackward, done: Done) -> QueuedPass:
        """A checked operation. Raises BadRequest."""
        loss = find_loss(operation.loss, operation.config)
        tokens = sum(len(example.tokens) for example in operation.examples)
        for count, most, what in (
            (len(operation.examples), MOST_EXAMPLES, "examples"),
            (tokens, MOST_TOKENS, "tokens"),
        ):
            if count > most:
                raise BadRequest(
                    f"{count} {what} are too many for one operation, {most} at most: send several, gradients add up",
                    param="examples",
                )
        loss.check(operation.examples)
        for index, example in enumerate(operation.examples):
            sequence = TrainingSequence(example.tokens, example.targets, [0.0] * len(example.targets))
            try:
                sequence.check(self._base.vocabulary, self._base.max_length - run.virtual_tokens)
            except BadRequest as error:
                raise BadRequest(error.message, param=f"examples.{index}.{error.param}") from None
        most = min(PART_TOKENS, self._most_tokens)
        parts, sizes = parts_of(operation, loss.group, most, run.virtual_tokens)
        if max(sizes) > self._most_tokens:
            raise BadRequest(
                f"a pass over {max(sizes)} tokens takes {_mib(pass_bytes(self._base, max(sizes)))}, and "
                f"{_mib(self._trainer.free)} of --training-memory are free: make the sequences shorter",
                param="examples",
            )
        return QueuedPass(operation, done, next(self._orders), loss=loss, parts=parts, sizes=sizes)

    def _close(self, name: str, done: Done) -> None:
        run = self._runs.get(name)
        if run is None:
            done(None)
            return
        run.fail_all(RunNotFound(f"training run {name!r} was closed", param="run"))
        run.on_close.append(done)
        run.closed = True
        if self._pass is not None and all(share.run.closed for share in self._pass.shares):
            self._pass = None
        self._remove_closed()

    def _remove_closed(self) -> None:
        """Remove closed runs that the running pass, if there is one, does not compute with."""
        used = set() if self._pass is None else {share.run.name for share in self._pass.shares}
        for run in [run for run in self._runs.values() if run.closed and run.name not in used]:
            del self._runs[run.name]
            if run.adapter is not None:
                self._trainer.close(run.adapter)
            if all(other.owner != run.owner for other in self._runs.values()):
                self._turns.forget(run.owner)
            if not self._runs:
                self._lent_to.end_training()
            for done in run.on_close:
                done(None)

    # --- quanta ------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether there is a quantum to run, as soon as it may."""
        return self._pass is not None or any(run.first is not None for run in self._runs.values())

    def advance(self, load: ServingLoad) -> float:
        """Run the next quantum if it may run now; returns the seconds it took, 0 if none was run."""
        quantum = self._next(load)
        if quantum is None or not self.pacer.allows(quantum.kind, quantum.size, load, self._clock()):
            return 0.0
        self._synchronize()
        begun = self._clock()
        quantum.run()
        self._synchronize()
        seconds = self._clock() - begun
        self.pacer.ran(quantum.kind, quantum.size, load, seconds)
        self._seconds[quantum.kind] = self._seconds.get(quantum.kind, 0.0) + seconds
        self._quanta[quantum.kind] = self._quanta.get(quantum.kind, 0) + 1
        weights = sum(weight for _, weight in quantum.owners)
        for owner, weight in quantum.owners:
            self._turns.charge(owner, seconds * weight / weights)
        self._remove_closed()
        return seconds

    def _synchronize(self) -> None:
        if self._base.device.type == "cuda":  # else durations would be those of launches
            torch.cuda.synchronize(self._base.device)

    def _next(self, load: ServingLoad) -> _Quantum | None:
        """The next quantum: short operations first, then that of the running pass, or of a new one."""
        waiting = list(self._in_turn())
        passes = [(run, first) for run, first in waiting if isinstance(first, QueuedPass)]
        computing = [run for run, _ in passes] if self._pass is None else [share.run for share in self._pass.shares]
        for run, first in waiting:
            # A new adapter takes memory, which a running pass has reserved.
            if isinstance(first, QueuedPass) or (run.adapter is None and self._pass is not None):
                continue
            if self._turns.lead(run.owner, (other.owner for other in computing)) > MOST_LEAD:
                continue  # else who sends short operations without end keeps all others' passes waiting
            kind, size = self._short.kind(run, first)
            return _Quantum(kind, size, partial(self._short.carry_out, run, first), [(run.owner, 1)])
        if self._pass is not None:
            running = self._pass
            owners = [(share.run.owner, share.tokens) for share in running.shares]
            return _Quantum(*running.next, self._advance_pass, owners)
        if not passes:
            return None
        slowest = "forward" if passes[0][1].forward_only else "backward"
        wanted = self.pacer.pass_tokens(slowest, load)
        shares = fill_pass(passes, FIRST_TOKENS if wanted is None else wanted, self._most_tokens)
        owners = [(share.run.owner, share.tokens) for share in shares]
        return _Quantum("embed", sum(share.tokens for share in shares), partial(self._begin_pass, shares), owners)

    def _in_turn(self) -> Iterator[tuple[TrainingRun, QueuedOperation]]:
        """Runs with an operation that could go on, in the order in which they should."""
        turns = [
            RunTurn(run.name, run.owner, run.priority, run.first.order)
            for run in self._runs.values()
            if run.first is not None
        ]
        for turn in self._turns.in_order(turns):
            run = self._runs[turn.run]
            first = run.first
            assert first is not None
            yield run, first

    def _begin_pass(self, shares: list[PassShare]) -> None:
        try:
            self._pass = SharedPass(self._trainer, shares)
        except Exception as error:
            if not isinstance(error, ServeError):
                log.exception("a training pass could not begin")
            for share in shares:
                if share.operation.taken:
                    share.run.lose_gradients()
                self._short.finish(
                    share.run, error if isinstance(error, ServeError) else EngineFault("the pass failed")
                )
            return
        self._advance_pass()

    def _advance_pass(self) -> None:
        running = self._pass
        assert running is not None
        try:
            if running.advance():
                return
            running.finish()
        except torch.OutOfMemoryError:
            log.warning("out of memory in a training pass over %d tokens", running.tokens)
            running.fail(Unavailable("training ran out of memory; send smaller batches", retry_after=5))
        except Exception:
            log.exception("a training pass failed")
            running.fail(EngineFault("the training pass failed"))
        else:
            self._tokens += running.tokens if running.gradients else 0
        self._pass = None
        for share in running.shares:
            self._short.begin(share.run)

    # --- memory and statistics ---------------------------------------------------------------------------------------

    @property
    def _most_tokens(self) -> int:
        """Tokens of the largest pass that the memory allows; 0 if there is none."""
        free = self._trainer.free
        if self._most[0] != free:
            low, high = 0, MOST_TOKENS
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if pass_bytes(self._base, middle) <= free else (low, middle - 1)
            self._most = (free, low)
        return self._most[1]

    def fill_stats(self, stats: Stats) -> None:
        """Add what concerns training."""
        stats.training_runs, stats.training_bytes = len(self._runs), self._trainer.used
        stats.training_tokens_total = self._tokens
        stats.training_quanta_total, stats.training_seconds_total = dict(self._quanta), dict(self._seconds)

    def close(self) -> None:
        """End all operations."""
        for run in self._runs.values():
            run.closed = True  # so that a thread does not go on
            run.fail_all(Unavailable("the server is shutting down", retry_after=5))
            for done in run.on_close:
                done(None)
        self._runs.clear()
        self._pass = None


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
