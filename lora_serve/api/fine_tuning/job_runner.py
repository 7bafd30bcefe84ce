"""One fine-tuning job, from its files to a published adapter, as a client of the engine's training runs.

The job's record says what is wanted: a runner looks at its status before every step, and ends when that is paused. What
it needs to go on is on the disk: whenever the engine or this process is lost, training continues from the last save,
and computes what it would have. A full disk makes it wait, and go on by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from lora_serve.api.fine_tuning.batch_order import BatchOrder
from lora_serve.api.fine_tuning.encoded_data import EncodedData
from lora_serve.api.fine_tuning.job_control import Intervals, JobControl, Stopped, TrainingEngine
from lora_serve.api.fine_tuning.job_preparation import data_folder, is_prepared, prepare
from lora_serve.api.fine_tuning.job_progress import JobProgress
from lora_serve.api.fine_tuning.job_records import JobError, JobRecord, Position
from lora_serve.api.fine_tuning.job_results import JobResults
from lora_serve.api.fine_tuning.job_saves import RUN
from lora_serve.api.fine_tuning.job_store import TRAINING, VALIDATION, JobStore, disk_errors
from lora_serve.api.fine_tuning.objectives import make_objective, write_reference
from lora_serve.api.fine_tuning.training_loop import is_complete, train
from lora_serve.errors import EngineFault, Overloaded, RunNotFound, ServeError, Unavailable
from lora_serve.job_metrics import RunningJob
from lora_serve.learning_rate import LearningRate
from lora_serve.messages import Operation
from lora_serve.training_messages import CloseRun, CreateRun, RestoreRun

MOST_FAILURES = 5  # of training without a new save, and of publishing

log = logging.getLogger(__name__)


class JobRunner:
    """Runs one job as far as it gets.

    Attributes:
        publishing: whether it is too late to pause or cancel.
        ended: set by the queue, when nothing runs any more.
    """

    def __init__(
        self,
        store: JobStore,
        id_: str,
        engine: TrainingEngine,
        tokenizer: Any,
        results: JobResults,
        intervals: Intervals,
    ) -> None:
        self._store, self.id, self._engine, self._tokenizer, self._results = store, id_, engine, tokenizer, results
        self.control = JobControl(store, id_, engine, intervals)
        self.publishing = False
        self.ended = asyncio.Event()
        self._progress: JobProgress | None = None

    @property
    def estimated_finish(self) -> int | None:
        """Unix time in seconds; None if nothing is known yet."""
        return None if self._progress is None else self._progress.estimated_finish

    @property
    def measured(self) -> RunningJob | None:
        """How far it is; None if it does not train."""
        return None if self._progress is None or self.publishing else self._progress.measured

    async def prepare(self) -> None:
        """Validate and encode the job's files. Raises nothing."""
        await self._to_its_end(self._prepare)

    async def run(self) -> None:
        """Train and publish. Raises nothing."""
        await self._to_its_end(self._run)

    async def _to_its_end(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Stopped:
            pass
        except ServeError as error:
            await self._fail(error)
        except Exception:
            log.exception("fine-tuning job %s failed", self.id)
            await self._fail(ServeError("the server failed on this job"))
        finally:
            with suppress(ServeError):
                await self._engine.call(CloseRun(self.id))
            if self.control.job.finished:
                await asyncio.to_thread(self._store.clean_up, self.id)

    async def _prepare(self) -> None:
        await self.control.wait_for_engine()
        info = self._engine.info
        assert info is not None
        await self.control.with_space(partial(prepare, self._store, self.id, self._tokenizer, info, self.control.check))

    async def _run(self) -> None:
        if not is_prepared(self._store, self.control.job):
            await self._prepare()
        saved, failures = -1, 0
        while True:
            await self.control.wait_for_engine()
            restarts = self._engine.restarts
            try:
                position = await self._train()
                break
            except ServeError as error:
                if not isinstance(error, Unavailable | RunNotFound) and self._engine.restarts == restarts:
                    raise
                reason = error.message
            if self.control.draining:  # it takes no operations any more; the next start goes on from the last save
                raise Stopped
            step = await asyncio.to_thread(self._store.saves(self.id).newest_step)
            saved, failures = step, failures + 1 if step == saved else 1
            if failures == MOST_FAILURES:  # perhaps it is this job that the engine dies of
                raise EngineFault(f"training failed {failures} times after step {step}: {reason}")
            if self._engine.restarts != restarts or not self._engine.ready:
                await self.control.wait(self.control.intervals.engine)  # which ends here if the server ends
                self.control.tell("warn", "The engine was lost; training goes on from the last save when it is back")
            else:
                self.control.tell("warn", f"Training goes on from the last save: {reason}")
                await self.control.wait(self.control.intervals.retry)
            with suppress(ServeError):
                await self._engine.call(CloseRun(self.id))
        with suppress(ServeError):
            await self._engine.call(CloseRun(self.id))
        await self._publish(position)

    # --- training ----------------------------------------------------------------------------------------------------

    async def _train(self) -> Position:
        """Go on from the newest save to the end; returns where that is."""
        job = self.control.job
        assert job.numbers is not None
        newest = await asyncio.to_thread(self._store.saves(self.id).newest)
        position = Position() if newest is None else newest[1].position
        with disk_errors():
            training = await self._open(job, TRAINING)
            validation = None if job.validation is None else await self._open(job, VALIDATION)
        pairs = 2 if job.method == "dpo" else 1
        order = BatchOrder(training.sequences // pairs, job.numbers.batch_size, job.numbers.n_epochs, job.seed)
        if is_complete(job.trainer, order, position):
            return position
        await self._create_run(job)
        await self._begin(position)
        if job.method == "dpo":
            for data in filter(None, (training, validation)):
                await self._ensure_reference(data)
        if newest is not None:  # after the reference, which is of a run that has not learnt anything
            await self.control.call(RestoreRun(self.id, str(newest[0] / RUN)))
        rate = job.numbers.learning_rate
        schedule = LearningRate(rate, order.steps, job.numbers.warmup, job.trainer.lr_scheduler_type)
        told = await asyncio.to_thread(self._store.events(self.id).last_step)
        self._progress = JobProgress(self.control, position, told)
        return await train(
            self.control.call,
            self.id,
            make_objective(job.method, job.numbers, training),
            None if validation is None else make_objective(job.method, job.numbers, validation),
            order,
            schedule,
            job.trainer,
            position,
            self._progress,
        )

    async def _open(self, job: JobRecord, name: str) -> EncodedData:
        return await asyncio.to_thread(EncodedData, data_folder(self._store, job, name))

    async def _ensure_reference(self, data: EncodedData) -> None:
        """Write what the base computes of the data, once: the run has not learnt anything yet."""
        if data.has_reference:
            return

        async def call(operation: Operation) -> Any:
            if self.control.draining or self.control.job.status == "paused":  # nothing of it is kept
                raise Stopped
            return await self.control.call(operation)

        async def write() -> None:
            with disk_errors():
                await write_reference(call, self.id, data, self._store.disk)

        await self.control.with_space(write)

    async def _create_run(self, job: JobRecord) -> None:
        """Create the run, when there is memory for it."""
        told = False
        while True:
            try:
                await self.control.call(CreateRun(self.id, job.settings, owner=job.tenant))
                return
            except Overloaded as error:
                if not told:
                    self.control.tell("info", f"The job waits for training memory: {error.message}")
                told = True
            await self.control.wait(self.control.intervals.retry)
            if self.control.job.status == "paused":
                raise Stopped

    async def _begin(self, position: Position) -> None:
        await self.control.begin()
        if position.step:
            self.control.tell("info", f"Training goes on after step {position.step}")
        else:
            self.control.tell("info", "Fine-tuning job started")

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _publish(self, position: Position) -> None:
        def begin(job: JobRecord) -> JobRecord:
            if job.status not in ("running", "queued"):
                raise Stopped
            self.publishing = True
            return job

        job = await asyncio.to_thread(partial(self._store.update, self.id, begin, on_disk=False))
        best = job.trainer.load_best_model_at_end and position.best_step > 0
        step = position.best_step if best else position.step
        failures = 0
        while True:
            try:
                digest = await self.control.with_space(lambda: self._results.publish(job, step))
                files = await self.control.with_space(lambda: self._results.keep_metrics(job))
                break
            except Unavailable as error:
                failures += 1
                if failures == MOST_FAILURES and not self.control.draining:  # perhaps the engine dies of the adapter
                    raise EngineFault(f"publishing failed {failures} times: {error.message}") from None
                await self.control.wait(self.control.intervals.engine)
                await self.control.wait_for_engine()

        def succeed(job: JobRecord) -> JobRecord:
            return msgspec.structs.replace(
                job,
                status="succeeded",
                digest=digest,
                result_files=tuple(files),
                trained_tokens=position.tokens,
                finished_at=int(self._store.clock()),
            )

        self.control.tell("info", f"New fine-tuned model created: {job.model_name} (adapter {job.adapter})")
        self.control.tell("info", "The job has successfully completed")  # before the status is seen
        await self.control.with_space(lambda: self.control.update(succeed))

    async def _fail(self, error: ServeError) -> None:
        failure = JobError(error.kind, error.message, error.param)
        now = int(self._store.clock())
        told = False

        def fail(job: JobRecord) -> JobRecord:
            nonlocal told
            if job.finished:
                return job
            if not told:  # before the status is seen: who waits for it reads the events then
                self.control.tell("error", f"The job failed: {error.message}")
            told = True
            return msgspec.structs.replace(job, status="failed", error=failure, finished_at=now)

        try:
            await self.control.update(fail)
        except ServeError:  # the next start runs it again, and it fails again
            self._store.update(self.id, fail, on_disk=False)
